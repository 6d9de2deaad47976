"""The kernels of MACE's reshape_irreps on the CPU against stock MACE."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import Behaviour, accelerated, usage
from host_kernels import HostCompiler
from reshape_parity import CASES, built, check, rows

import e3nn_accel

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [pytest.mark.mace, pytest.mark.usefixtures("float64", "kernels_on_host")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case: str, dtype: torch.dtype) -> None:
    module = built(case)
    check(module, rows(module, 3, dtype))


@pytest.mark.parametrize("nodes", [0, 1, 40])
def test_numbers_of_nodes(nodes: int) -> None:
    module = built("odd")
    check(module, rows(module, nodes))


@pytest.mark.parametrize("layout", ["columns of wider rows", "transposed", "expanded"])
def test_rows_that_are_not_contiguous(layout: str) -> None:
    module = built("odd")
    x = rows(module, 4).detach()
    x = {
        "columns of wider rows": lambda: x.repeat(1, 2)[:, : x.shape[1]],
        "transposed": lambda: x.T.contiguous().T,
        "expanded": lambda: x[:1].expand(4, -1),
    }[layout]()
    assert not x.is_contiguous()
    expected = module(x)
    with accelerated(self_check=False, backend="cuda"):
        assert torch.equal(copy.deepcopy(module)(x), expected)


def test_a_gradient_without_memory_of_its_own() -> None:
    """That of a sum is one number, expanded."""
    module = built("odd")
    x = rows(module, 4)
    with accelerated(self_check=False, backend="cuda"):
        (found,) = torch.autograd.grad(copy.deepcopy(module)(x).sum(), x)
    assert torch.equal(found, torch.ones_like(x))


def test_third_derivatives() -> None:
    module = built("odd")
    x = rows(module, 2)

    def third(of: Any) -> torch.Tensor:
        level = (of(x) ** 4).sum()
        for order in range(3):
            (found,) = torch.autograd.grad(level, x, create_graph=order < 2)
            level = found.sum()
        return found

    expected = third(module)
    with accelerated(self_check=False, backend="cuda"):
        assert torch.equal(third(copy.deepcopy(module)), expected)


def test_self_check_passes() -> None:
    module = built("odd")
    with accelerated(self_check=True, backend="cuda"):
        module(rows(module, 3))
        assert usage(module) == {("reshape_irreps", "cuda"): 1}


def _of_cuequivariance(module: Any) -> Any:
    class Layout:
        layout_str = "ir_mul"

    module.cueq_config = Layout()
    return module


def _several(module: Any) -> Any:
    from mace.modules.irreps_tools import reshape_irreps

    return reshape_irreps("4x0e+3x1o")


STOCK = {
    "another layout": (_of_cuequivariance, "cuEquivariance's layout"),
    "multiplicities": (_several, "wanted one that all irreps share"),
    "a wrong row": (lambda module: module, "wanted [nodes,"),
}


@pytest.mark.parametrize("case", STOCK)
def test_what_stays_with_stock_mace(case: str) -> None:
    """The very same results or errors, and the reason."""
    build, reason = STOCK[case]
    module = build(built("in another order"))
    width = module.irreps.dim - (case == "a wrong row")
    x = torch.randn(3, width)
    stock = Behaviour.of(lambda: module(x))
    with e3nn_accel.enabled():
        Behaviour.of(lambda: module(x)).assert_like(stock)
        assert reason in str(e3nn_accel.report())


def test_a_layout_that_is_assigned_later() -> None:
    module = built("in another order")
    x = rows(module, 3)
    with e3nn_accel.enabled():
        module(x)
        found = _of_cuequivariance(module)(x)
        assert "assigned after it was planned" in str(e3nn_accel.report())
    assert torch.equal(found, module(x))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing(sanitizer: str, kernels_on_host: HostCompiler) -> None:
    kernels_on_host.sanitizer = sanitizer
    module = built("chunks that aren't full")
    check(module, rows(module, 2))
