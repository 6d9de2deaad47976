"""Tensor products whose weights are moved by bulk copies, on the CPU, where copies are as late as they may be."""

from __future__ import annotations

import pytest
import torch
from comparison import accelerated, derivatives
from product_parity import Product, check
from slow_cases import slow_but

from e3nn_accel.backends.cuda import tensor_product, tensor_product_launch, tensor_product_staged
from e3nn_accel.backends.cuda.tensor_product_launch import ProductLaunch
from e3nn_accel.backends.cuda.tensor_product_staged import StagedMixPart

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]

CASES = {
    "DiffDock": Product(
        "12x0e+10x1o",
        "0e+1o",
        (
            (0, 0, "0e", "uvw", True, 12),
            (1, 1, "0e", "uvw", True, 12),
            (0, 1, "1o", "uvw", True, 10),
            (1, 0, "1o", "uvw", True, 10),
            (1, 1, "1e", "uvw", True, 10),
        ),
    ),
    "columns in several groups": Product(
        "9x0e+3x1o",
        "2x0e+1o",
        (
            (0, 0, "0e", "uvw", True, 140),
            (1, 1, "0e", "uvw", True, 140),
            (0, 1, "1o", "uvw", True, 36),
        ),
    ),
    "odd columns": Product(
        "12x0e+4x2e",
        "0e+2e",
        (
            (0, 0, "0e", "uvw", True, 7),
            (1, 1, "2e", "uvw", True, 4),
            (0, 1, "2e", "uvw", True, 5),
            (1, 1, "0e", "uvw", True, 9),
        ),
    ),
    "other modes": Product(
        "12x0e+12x1o",
        "12x0e+12x1o",
        (
            (0, 0, "0e", "u<vw", True, 4),
            (1, 1, "0e", "uuw", True, 8),
            (0, 1, "1o", "uvw", True, 4),
        ),
    ),
}
"""Several output blocks with several paths, one that two share, and one that nothing reaches."""


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plans are made for compute capability 9.0, also for short rows; notes which kinds of kernels run."""
    seen: list[str] = []
    launched = ProductLaunch.grid

    def noted(self: ProductLaunch, part: object, kind: str, *of: object) -> object:
        if isinstance(part, StagedMixPart):
            seen.append(kind)
        return launched(self, part, kind, *of)  # type: ignore[arg-type]

    monkeypatch.setattr(tensor_product, "architecture_of", lambda device: 90)
    monkeypatch.setattr(tensor_product_staged, "SHORTEST", 0)
    monkeypatch.setattr(tensor_product_staged, "FEWEST_PAIRS", 0)
    monkeypatch.setattr(ProductLaunch, "grid", noted)
    return seen


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float32), ids=str)
@pytest.mark.parametrize("case", slow_but(CASES, "DiffDock", "odd columns"))
def test_values_and_derivatives(case: str, dtype: torch.dtype, hopper: list[str]) -> None:
    """Within rounding of stock e3nn, each path's part by itself; blocks have more rows than a ring has slots."""
    check(CASES[case], 9, dtype)
    assert set(hopper) == {"forward", "backward", "double"}


@pytest.mark.parametrize("rows", slow_but([0, 1, 2, 3, 8], 0, 1, 8))
def test_odd_numbers_of_rows(rows: int, hopper: list[str]) -> None:
    """None, fewer than blocks, and one more for a block than for another."""
    check(CASES["DiffDock"], rows, torch.float64)
    assert hopper


@pytest.mark.parametrize("residence", [(1, 2), (2, 2), (3, 4)])
def test_rings_of_other_lengths(
    residence: tuple[int, int], hopper: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot is asked for again as soon as it may be, however many there are."""
    monkeypatch.setattr(tensor_product_staged, "RESIDENCES", (residence,))
    check(CASES["DiffDock"], 13, torch.float32)
    assert "double" in hopper


@pytest.mark.parametrize("wanted", slow_but(["x", "y", "w", "xy", "yw"], "w", "xy"))
def test_some_gradients(wanted: str, hopper: list[str]) -> None:
    """Where nobody wants the weights' gradient they are read alone, and where nobody wants another, they are not."""
    product = CASES["DiffDock"]
    module = product.build()
    operands = product.operands(module, 7, torch.float64, wanted)

    def first() -> tuple[torch.Tensor, ...]:
        leaves = [t for t in operands.values() if t.requires_grad]
        out = product.call(module, operands)
        return torch.autograd.grad(out, leaves, out.detach().cos())

    expected = first()
    with accelerated(self_check=False):
        found = first()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert set(hopper) == {"forward", "backward"}


def test_weights_that_begin_anywhere(hopper: list[str]) -> None:
    """A copy is made of weights that don't begin where a bulk copy may."""
    product = CASES["DiffDock"]
    module = product.build()
    operands = product.operands(module, 5, torch.float64)
    with torch.no_grad():
        expected = product.call(module, operands)
        room = torch.empty(operands["weight"].numel() + 1, dtype=torch.float64)
        shifted = room[1:].view_as(operands["weight"]).copy_(operands["weight"])
        assert shifted.data_ptr() % 16
        with accelerated(self_check=False):
            found = product.call(module, {**operands, "weight": shifted})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert hopper == ["forward"]


def test_blocks_go_through_the_rows(hopper: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, however many blocks there are."""
    product = CASES["DiffDock"]
    module = product.build()
    operands = product.operands(module, 11, torch.float64)
    found = []
    for number in (1, 2, 50):
        monkeypatch.setattr(tensor_product_launch, "multiprocessors", lambda device: number)  # noqa: B023
        with accelerated(self_check=False):
            found.append(derivatives(lambda o: product.call(module, o), operands))
    for other in found[1:]:
        assert all(torch.equal(t, found[0].tensors[name]) for name, t in other.tensors.items())
    assert "double" in hopper
