"""The kernels of spherical harmonics against float64 stock e3nn: values, first and second derivatives, on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory asks for it
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import copy

import pytest
import torch
from comparison import accelerated, usage
from e3nn import o3
from harmonics_parity import CASES, built, check, vectors
from replays import assert_replay_equals_eager, warmed_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float64"),
]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@BOTH
@pytest.mark.parametrize("rows", [0, 1, 64, 1000])
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case: str, rows: int, dtype: torch.dtype) -> None:
    check(built(case), vectors(rows), dtype, device="cuda")


@BOTH
@pytest.mark.parametrize("degree", range(1, 12))
def test_each_degree(degree: int, dtype: torch.dtype) -> None:
    module = o3.SphericalHarmonics([degree], True, "component")
    check(module, vectors(300, seed=degree), dtype, device="cuda")


def test_zero_and_nan() -> None:
    """As stock on the same device."""
    module = built("MACE")
    x = vectors(5).detach().cuda()
    x[1], x[3, 2] = 0, float("nan")
    expected = module(x)
    with accelerated(backend="cuda"):
        found = copy.deepcopy(module)(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_captured_in_a_cuda_graph() -> None:
    """A replay equals the eager call, bit by bit; second derivatives, too."""
    module = built("MACE").cuda()
    x = vectors(500).detach().float().cuda().requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        out = module(x)
        g = torch.ones_like(out).requires_grad_()
        (first,) = torch.autograd.grad(out, x, g, create_graph=True)
        return first.detach(), *torch.autograd.grad(first.pow(2).sum(), (g, x))

    with accelerated(backend="cuda"):
        warmed_up(gradients)
        assert usage(module) == {("spherical_harmonics", "cuda"): 3}
        assert_replay_equals_eager(gradients, x.normal_)
