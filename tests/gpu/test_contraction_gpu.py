"""The kernels of the symmetric contraction against float64 stock MACE, on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory asks for it
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from contraction_parity import check, saved_and_loaded
from mace_parts import Contraction, node_attrs
from replays import assert_replay_equals_eager, warmed_up

import e3nn_accel
from e3nn_accel.backends.cuda import contraction_kernels

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SH = "0e+1o+2e+3o"
CASES = {
    "correlation 1": Contraction("0e+1o", "0e+1o", 1, channels=33),
    "correlation 4": Contraction("0e+1o+2e", "0e+1o", 4, channels=5),
    "both parities": Contraction("0e+0o+1o+1e", "0e+0o+1o+1e", 3, channels=8),
    "MACE's last layer": Contraction(SH, "0e", 3, channels=128, species=10),
    "MACE": Contraction(SH, "0e+1o", 3, channels=128, species=10),
    "MACE large": Contraction(SH, "0e+1o+2e", 3, channels=160, species=3),
}
MACE = CASES["MACE"]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@BOTH
@pytest.mark.parametrize("case", list(CASES))
def test_values_and_derivatives(case: str, dtype: torch.dtype) -> None:
    """Within rounding of stock MACE, to the second derivative."""
    check(CASES[case], 23, dtype, device="cuda")


@BOTH
@pytest.mark.parametrize("attrs", ["random", "zero rows", "one row mixed", "absent species"])
@pytest.mark.parametrize("gradient", [False, True], ids=["constant", "wants gradient"])
def test_node_attrs(attrs: str, gradient: bool, dtype: torch.dtype) -> None:
    """One-hot or not."""
    check(Contraction(SH, "0e+1o", 2), 9, dtype, attrs, gradient, "cuda")


@BOTH
def test_tables(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be too long a code loops over tables."""
    monkeypatch.setattr(contraction_kernels, "MOST_LINES", 0)
    check(CASES["correlation 4"], 7, dtype, device="cuda")


def test_bit_reproducible() -> None:
    """Weight gradients, too: no atomics."""
    module = saved_and_loaded(MACE.build(torch.float32)).cuda()
    x, y = MACE.features(3000, dtype=torch.float32).cuda().requires_grad_(), _attrs(3000)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    with e3nn_accel.enabled(strict=True, backend="cuda"):
        runs = [torch.autograd.grad(module(x, y).sin().sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_captured_in_a_cuda_graph() -> None:
    """A replay equals the eager call on new features."""
    module = saved_and_loaded(MACE.build(torch.float32)).cuda().requires_grad_(False)
    x, y = MACE.features(200, dtype=torch.float32).cuda().requires_grad_(), _attrs(200)

    def step() -> tuple[torch.Tensor, ...]:
        out = module(x, y)
        return (out.detach(), *torch.autograd.grad(out.sin().sum(), x))

    with e3nn_accel.enabled(strict=True, backend="cuda"):
        warmed_up(step)
        assert_replay_equals_eager(step, x.normal_)


def _attrs(nodes: int) -> torch.Tensor:
    return node_attrs("all species", nodes, MACE.species).float().cuda()
