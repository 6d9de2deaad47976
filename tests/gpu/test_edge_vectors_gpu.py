"""Vectors and lengths of edges on a GPU, by themselves and in captured calls of a model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory asks for it
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from edge_vector_parity import CASES, check, drawn, ours, stock

from e3nn_accel.backends.cuda.edge_vectors import EdgeVectors
from e3nn_accel.config import Config
from e3nn_accel.groupings import Neighbours

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@BOTH
@pytest.mark.parametrize("which", ["both", "vectors", "lengths"])
@pytest.mark.parametrize("case", CASES)
def test_all_derivatives(case: str, which: str, dtype: torch.dtype) -> None:
    check(case, which, dtype, "cuda")


@BOTH
def test_the_bits_are_torchs(dtype: torch.dtype) -> None:
    """Of vectors, of lengths, and of an edge's gradient."""
    (positions, shifts, dv, dl), edge_index = drawn("several blocks", dtype, "cuda")
    found, expected = (f(positions, shifts, edge_index) for f in (ours, stock))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    (of_ours,), (of_stock,) = (torch.autograd.grad(f, shifts, (dv, dl)) for f in (found, expected))
    assert torch.equal(of_ours, of_stock)


def test_offsets_beyond_2_to_the_31() -> None:
    """Rows of edges that begin beyond 2^31 numbers."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("wants 60 GiB of free memory")
    edges, last = 2**31 // 3 + 100, 70
    edge_index = torch.zeros((2, edges), dtype=torch.int64, device="cuda")
    edge_index[1, -last:] = 1
    positions = torch.tensor([[0.0, 0, 0], [3.0, 4, 0]], device="cuda")
    kernels = EdgeVectors(Config())
    vectors, lengths = kernels.vectors(positions, edge_index, None)
    assert vectors[-last:].eq(positions[1]).all()
    assert lengths[-last:].eq(5).all()
    assert not lengths[:-last].any()
    order = torch.arange(edges - last, edges, dtype=torch.int32, device="cuda")
    none, all_of_it = (
        torch.tensor(of, dtype=torch.int32, device="cuda") for of in ([0, 0, 0], [0, 0, last])
    )
    of = Neighbours(2, order, order, all_of_it, order, none)
    dl = torch.zeros_like(lengths)
    dl[-last:] = 1
    gradient, _ = kernels.gradients(None, dl, vectors, lengths, of, of_shifts=False)
    assert torch.allclose(gradient[1].cpu(), last * torch.tensor([0.6, 0.8, 0]))
    assert not gradient[0].any()
