"""The kernel that orders the edges of small graphs, on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory asks for it
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from edges_parity import CASES, check
from graphs import random_edges
from replays import assert_replay_equals_eager, warmed_up

from e3nn_accel.backends.cuda.edges import EdgeSort
from e3nn_accel.config import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str) -> None:
    check(case, device="cuda")


def test_captured_in_a_cuda_graph() -> None:
    sort, edge_index = EdgeSort(Config()), random_edges(60, 2000).cuda()

    def found() -> tuple[torch.Tensor, ...]:
        of = sort.find(edge_index, 60)
        return of.by_receiver, of.first_of_receiver, of.by_sender, of.first_of_sender

    warmed_up(found)
    assert_replay_equals_eager(found, lambda: edge_index.random_(60))
