"""The kernels of MACE's reshape_irreps against stock MACE, on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory asks for it
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from comparison import accelerated, usage
from replays import assert_replay_equals_eager, warmed_up
from reshape_parity import CASES, built, check, rows

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.mace,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float64"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("nodes", [0, 1, 700])
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case: str, nodes: int, dtype: torch.dtype) -> None:
    module = built(case)
    check(module, rows(module, nodes, dtype), device="cuda")


def test_captured_in_a_cuda_graph() -> None:
    module = built("MACE")
    x = rows(module, 300, torch.float32).detach().cuda().requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(module(x).pow(2).sum(), (x,))

    with accelerated(backend="cuda"):
        warmed_up(gradients)
        assert usage(module) == {("reshape_irreps", "cuda"): 3}
        assert_replay_equals_eager(gradients, x.normal_)
