"""The radial MLP's kernels against float64 stock e3nn: values, first and second derivatives, on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory asks for it
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from comparison import accelerated, draw, poisoned_memory, relative_error, usage
from radial_parity import CASES, Net, check, compare_of_forces
from replays import assert_replay_equals_eager, warmed_up

import e3nn_accel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float64"),
]

MACE = Net((8, 64, 64, 64, 1280))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("edges", [0, 1, 70, 600])
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case: str, edges: int, dtype: torch.dtype) -> None:
    module = CASES[case].build()
    check(module, draw((edges, module.hs[0]), 3).requires_grad_(), dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_tiles_for_each_block(dtype: torch.dtype) -> None:
    """More edges than all multiprocessors have at a time; the last tile isn't full."""
    check(MACE.build(), draw((50_001, 8), 3).requires_grad_(), dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("edges", [0, 1, 70, 50_001])
@pytest.mark.parametrize("case", ["MACE", "odd widths", "wider than a tile", "tanh", "sigmoid"])
def test_second_derivatives_of_training(case: str, edges: int, dtype: torch.dtype) -> None:
    """Of the gradient by x alone: one kernel."""
    compare_of_forces(case, dtype, edges, device="cuda")


def test_first_derivatives_of_large_inputs() -> None:
    """Where exponentials overflow, SiLU and its slope are still those of stock."""
    module = Net((8, 64, 64, 32)).build().cuda()
    x = (1e3 * draw((500, 8), 1)).cuda()
    exact = x.clone().requires_grad_()
    expected = module(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    ours, here = module.float(), x.float().requires_grad_()
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        found = ours(here)
        (found_slope,) = torch.autograd.grad(found.sum(), here)
    assert relative_error(found, expected) < 5e-6
    assert relative_error(found_slope, slope) < 5e-6


def test_captured_in_a_cuda_graph() -> None:
    """A replay equals the eager call, bit by bit; so does a second eager call."""
    module = MACE.build().to("cuda", torch.float32)
    x = draw((5000, 8), 1, torch.float32).cuda().requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(module(x).pow(2).sum(), (x, *module.parameters()))

    with accelerated(backend="cuda"):
        warmed_up(gradients)
        assert usage(module) == {("radial_mlp", "cuda"): 3}
        assert_replay_equals_eager(gradients, x.normal_)
        eager, again = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(again, eager, strict=True))


def test_on_a_gpu_it_is_accelerated_without_being_asked_for() -> None:
    """And on the CPU of the same process it is stock's by choice."""
    module, x = MACE.build().float(), draw((50, 8), 1, torch.float32)
    e3nn_accel.enable(strict=True)
    module(x)
    assert not e3nn_accel.report().rows
    module.cuda()(x.cuda())
    [row] = e3nn_accel.report().rows
    assert (row.operation, row.backend, row.calls) == ("radial_mlp", "cuda", 1)
