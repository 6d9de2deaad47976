"""Nodes sorted by species on a GPU, against the same in torch operations."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from mace_parts import node_attrs
from species_parity import CASES, assert_sorted, attrs_of

from e3nn_accel.backends.cuda.species import SpeciesSort
from e3nn_accel.config import Config
from e3nn_accel.plan import PlanContext

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def sort(dtype: torch.dtype) -> SpeciesSort:
    return SpeciesSort(PlanContext(dtype, torch.device("cuda", 0), Config()))


@BOTH
@pytest.mark.parametrize("case", list(CASES))
def test_cases(case: str, dtype: torch.dtype) -> None:
    """The same bits, of every field."""
    assert_sorted(sort(dtype), attrs_of(case).to("cuda", dtype))


@BOTH
@pytest.mark.parametrize(("rows", "species"), [(5000, 89), (1_000_000, 10), (20_003, 4999)])
def test_sizes(rows: int, species: int, dtype: torch.dtype) -> None:
    """MACE's; tiles of many parts; as much shared memory as there is."""
    kinds = torch.randint(species, (rows,), generator=torch.Generator().manual_seed(1))
    attrs = torch.zeros((rows, species), dtype=dtype, device="cuda")
    attrs[torch.arange(rows, device="cuda"), kinds.cuda()] = 1
    attrs[::7] = 0
    assert_sorted(sort(dtype), attrs)


def test_captured_in_a_cuda_graph() -> None:
    """A replay sorts what the tensor holds then, without waiting for the device."""
    by = sort(torch.float32)
    attrs = node_attrs("all species", 500).float().cuda()
    by.nodes(attrs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by.nodes(attrs)
    attrs.copy_(node_attrs("zero rows", 500).float().flip(0))
    graph.replay()
    expected = by.nodes(attrs)
    assert torch.equal(captured.order, expected.order)
    assert torch.equal(captured.first, expected.first)
    assert torch.equal(captured.species, expected.species)
