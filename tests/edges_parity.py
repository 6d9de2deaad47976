"""The edges of small graphs in order by a kernel, against the same in torch operations, number by number."""

from __future__ import annotations

from dataclasses import fields

import torch
from comparison import poisoned_memory
from graphs import GRAPHS, random_edges

from e3nn_accel.backends.cuda.edges import MOST_EDGES, MOST_NODES, EdgeSort
from e3nn_accel.config import Config
from e3nn_accel.groupings import find_neighbours

Graph = tuple[int, torch.Tensor]
CASES: dict[str, Graph] = {
    **GRAPHS,
    "several blocks": (70, random_edges(70, 900)),
    "as many as there may be": (50, random_edges(50, MOST_EDGES)),
    "more than there may be": (50, random_edges(50, MOST_EDGES + 1)),
    "too many nodes": (MOST_NODES + 1, random_edges(MOST_NODES + 1, 20)),
    "counted from the end": (6, random_edges(6, 40) - 3),
    "of no node": (6, random_edges(9, 40)),
    "other strides": (7, random_edges(7, 30).T.contiguous().T),
    "every second": (7, random_edges(7, 30)[:, ::2]),
    "int32": (7, random_edges(7, 30).int()),
}


def check(case: str, device: str = "cpu") -> None:
    """All of it, however many edges; what is below all nodes or above them where torch has it."""
    nodes, edge_index = CASES[case]
    edge_index = edge_index.to(device) if edge_index.is_contiguous() else edge_index
    expected = find_neighbours(edge_index, nodes)
    with poisoned_memory():
        found = EdgeSort(Config()).find(edge_index.to(device), nodes)
    for field in fields(expected):
        ours, wanted = (getattr(of, field.name) for of in (found, expected))
        if isinstance(wanted, int):
            assert ours == wanted
            continue
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours.cpu(), wanted.cpu()), field.name
