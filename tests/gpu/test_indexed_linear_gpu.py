"""The species-indexed linear's kernels against float64 stock e3nn: values, first and second derivatives, on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory asks for it
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from typing import Any

import pytest
import torch
from comparison import accelerated, draw
from indexed_parity import IN_HALVES, SHAPES, built, check, rows_of_any_company, scaled, shrinkage
from mace_parts import ATTRS, node_attrs
from replays import assert_replay_equals_eager, warmed_up

from e3nn_accel.backends.cuda import indexed_linear_launch
from e3nn_accel.backends.cuda.linear_in_halves import LinearInHalves, least_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
MACE = ("128x0e+128x1o", "89x0e", "128x0e+128x1o")


@pytest.fixture(autouse=True)
def attrs_in_float64(float64: None) -> None:
    """They are drawn exactly and rounded with the other operands."""


@BOTH
@pytest.mark.parametrize("attrs", ATTRS)
def test_attrs(attrs: str, dtype: torch.dtype) -> None:
    """Sorted or not, absent species, scaled rows, rows that aren't one-hot, rows of zeros."""
    check(("33x0e+5x1o", "4x0e", "5x0e+70x1o"), node_attrs(attrs, 90, 4), dtype, "cuda")


@BOTH
@pytest.mark.parametrize("irreps", SHAPES.values(), ids=SHAPES)
def test_shapes(irreps: tuple[str, str, str], dtype: torch.dtype) -> None:
    species = int(irreps[1].split("x")[0])
    check(irreps, node_attrs("one row mixed", 12, species), dtype, "cuda")


@BOTH
@pytest.mark.parametrize("channels", [1, 5, 33, 128, 192])
def test_channels(channels: int, dtype: torch.dtype) -> None:
    irreps = f"{channels}x0e+{channels}x1o"
    check((irreps, "3x0e", irreps), node_attrs("all species", 50, 3), dtype, "cuda")


@BOTH
@pytest.mark.parametrize("rows", [0, 1, 2, 70, 600])
def test_numbers_of_rows(rows: int, dtype: torch.dtype) -> None:
    check(("8x0e+8x1o", "4x0e", "8x0e+8x1o"), node_attrs("all species", rows, 4), dtype, "cuda")


def on_gpu(rows: int, species: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """MACE's skip connection in float32, features that want gradients, species."""
    module = built((MACE[0], f"{species}x0e", MACE[2])).to("cuda", torch.float32)
    x = draw((rows, module.irreps_in1.dim), 1, torch.float32).cuda().requires_grad_()
    return module, x, node_attrs("all species", rows, species).float().cuda()


def gradients(module: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the features and of the weights."""
    return torch.autograd.grad(module(x, y).pow(2).sum(), (x, module.weight))


@pytest.fixture
def by_halves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call that goes by halves."""
    found: list[int] = []
    rows = LinearInHalves.rows

    def counted(self: Any, kernels: Any, blocks: int, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(x.shape[0])
        return rows(self, kernels, blocks, x, *rest)

    monkeypatch.setattr(LinearInHalves, "rows", counted)
    return found


@pytest.fixture
def in_halves(monkeypatch: pytest.MonkeyPatch, by_halves: list[int]) -> list[int]:
    """The same, where all calls do, of however few rows."""
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", -1)
    monkeypatch.setattr(indexed_linear_launch, "least_rows", lambda species: 0)
    return by_halves


@pytest.mark.parametrize("rows", [1, 90, 5000])
@pytest.mark.parametrize("case", IN_HALVES)
def test_in_halves(case: str, rows: int, in_halves: list[int]) -> None:
    irreps = IN_HALVES[case]
    species = int(irreps[1].split("x")[0])
    check(irreps, node_attrs("one row mixed", rows, species), torch.float32, "cuda")
    assert in_halves


@pytest.mark.parametrize("attrs", ATTRS)
def test_attrs_in_halves(attrs: str, in_halves: list[int]) -> None:
    """Sorted or not, absent species, one for all rows, scaled rows, rows that aren't one-hot, zeros."""
    check(IN_HALVES["parts of tiles"], node_attrs(attrs, 900, 3), torch.float32, "cuda")
    assert in_halves


@pytest.mark.parametrize(("species", "missing"), [(20, 0), (20, 1), (89, 89 * 185)])
def test_rows_of_a_species_decide(species: int, missing: int, by_halves: list[int]) -> None:
    """Whether cutting its weights pays."""
    rows = least_rows(species) - missing
    attrs = node_attrs("one row mixed", rows, species)
    check((MACE[0], f"{species}x0e", MACE[2]), attrs, torch.float32, "cuda")
    assert set(by_halves) == (set() if missing else {rows})


def test_sizes_of_rows_columns_and_species(in_halves: list[int]) -> None:
    """None is lost beside others, in rows of several species neither."""
    errors, sizes = scaled("cuda")
    assert in_halves
    assert (errors <= 1e-6 * sizes).all()


def test_rows_depend_on_nothing_but_themselves(in_halves: list[int]) -> None:
    """To the bit: outputs and gradients of some rows, by themselves and in other company."""
    assert all(torch.equal(*found) for found in rows_of_any_company("cuda"))
    assert in_halves


def test_errors_of_single_precision_do_not_add_up(in_halves: list[int]) -> None:
    """As they would if nothing made up for tensor cores that round towards zero: it is 5e-8 then."""
    shares = shrinkage("cuda", rows=40000)
    assert in_halves
    assert max(map(abs, shares)) < 1.5e-8, shares


@pytest.mark.parametrize("species", [20, 89])
def test_bit_reproducible(species: int) -> None:
    """Two runs give the same bits, by halves and by tf32."""
    module, x, y = on_gpu(10000, species)
    with accelerated(backend="cuda"):
        first, second = (gradients(module, x, y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("rows", "species"), [(500, 89), (10000, 20)])
def test_captured_in_a_cuda_graph(rows: int, species: int) -> None:
    """A replay equals the eager call on new features and on new species in the same tensors."""
    module, x, y = on_gpu(rows, species)
    with accelerated(backend="cuda"):
        warmed_up(lambda: gradients(module, x, y))
        assert_replay_equals_eager(
            lambda: gradients(module, x, y), lambda: (x.normal_(), y.copy_(y.flip(0)))
        )
