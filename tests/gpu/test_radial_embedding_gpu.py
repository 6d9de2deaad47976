"""The kernels of MACE's radial embedding against float64 stock MACE: values and both derivatives, on a GPU."""

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
from radial_embedding_parity import CASES, R_MAX, block, check, embedding, lengths
from replays import assert_replay_equals_eager, warmed_up
from small_models import energy_and_forces, mace, molecules, same

import e3nn_accel

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.mace,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float64"),
]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@BOTH
@pytest.mark.parametrize("edges", [0, 1, 64, 3000])
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case: str, edges: int, dtype: torch.dtype) -> None:
    check(block(*CASES[case]), lengths(edges), dtype, device="cuda")


@BOTH
def test_beyond_the_cutoff_all_is_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([[R_MAX], [R_MAX * 1.0001], [2 * R_MAX], [1e3]], dtype=dtype).cuda()
    module, x = block().to("cuda", dtype), x.requires_grad_()
    with accelerated(backend="cuda"):
        out = embedding(module)(x)
        (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.sum(), x)
    assert all(bool((t == 0).all()) for t in (out, dx, second))


def test_captured_in_a_cuda_graph() -> None:
    """A replay equals the eager call, bit by bit; second derivatives, too."""
    module = block().to("cuda", torch.float32)
    x = lengths(500).detach().float().cuda().requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        out = embedding(module)(x)
        g = torch.ones_like(out).requires_grad_()
        (first,) = torch.autograd.grad(out, x, g, create_graph=True)
        return first.detach(), *torch.autograd.grad(first.pow(2).sum(), (g, x))

    with accelerated(backend="cuda"):
        warmed_up(gradients)
        assert usage(module) == {("radial_embedding", "cuda"): 3}
        assert_replay_equals_eager(gradients, lambda: x.mul_(0.9))


def test_a_whole_model() -> None:
    """Both targets in a MACE, nothing of theirs on stock; energies and forces are stock's."""
    model, batch = mace().cuda(), molecules()
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    stock = energy_and_forces(model, batch)
    with e3nn_accel.enabled(graph="0"):
        same(energy_and_forces(model, batch), stock, 1e-9)
        used = {(row.cls, row.backend) for row in e3nn_accel.report().rows}
    assert {("SphericalHarmonics", "cuda"), ("RadialEmbeddingBlock", "cuda")} <= used
    assert not {("SphericalHarmonics", "e3nn"), ("RadialEmbeddingBlock", "e3nn")} & used
