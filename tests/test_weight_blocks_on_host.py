"""The gradient of o3.Linear's weights by blocks that have a tile of them each, on the CPU: both kernels alike."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from comparison import draw
from linear_parity import WEIGHTS_IN_HALVES, WEIGHTS_STAGED, built, check
from slow_cases import slow_but
from weight_blocks_parity import launches_of_few

from e3nn_accel.backends.cuda import (
    indexed_linear_launch,
    linear_weights_in_halves,
    linear_weights_staged,
)

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]
Kernels = tuple[ModuleType, torch.dtype]
IN_HALVES: Kernels = (linear_weights_in_halves, torch.float32)
STAGED: Kernels = (linear_weights_staged, torch.float64)
CASES = [
    *(pytest.param(IN_HALVES, irreps, id=f"{case}, by halves") for case, irreps in WEIGHTS_IN_HALVES.items()),
    *(pytest.param(STAGED, irreps, id=f"{case}, float64") for case, irreps in WEIGHTS_STAGED.items()),
]  # fmt: skip
BOTH = pytest.mark.parametrize("kernels", [IN_HALVES, STAGED], ids=["by halves", "float64"])


def exercise(irreps: tuple[str, str], rows: int, dtype: torch.dtype) -> None:
    """Values, first and second derivatives."""
    module = built(*irreps)
    check(module, draw((rows, module.irreps_in.dim), 3).requires_grad_(), dtype)


@pytest.mark.parametrize("rows", slow_but([1, 33, 70, 300], 70))
@pytest.mark.parametrize(("kernels", "irreps"), CASES)
def test_values_and_derivatives(
    kernels: Kernels, irreps: tuple[str, str], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = launches_of_few(monkeypatch, kernels[0])
    exercise(irreps, rows, kernels[1])
    assert launches
    assert set(launches) == {rows}


@pytest.mark.parametrize("multiprocessors", [1, 1000])
@BOTH
def test_any_number_of_blocks(
    kernels: Kernels, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows to a tile's block, and a step to each."""
    launches = launches_of_few(monkeypatch, kernels[0])
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: multiprocessors)
    exercise(WEIGHTS_IN_HALVES["parts of tiles"], 150, kernels[1])
    assert launches


@BOTH
def test_few_rows_take_another_kernel(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do forward."""
    launches = launches_of_few(monkeypatch, kernels[0])
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", 2)
    exercise(WEIGHTS_IN_HALVES["MACE"], 70, kernels[1])
    assert not launches
