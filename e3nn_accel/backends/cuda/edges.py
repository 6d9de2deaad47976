"""The edges of a small graph ordered in one kernel, where torch takes a dozen to convert, sort and search."""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.entries import Entries
from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config
from e3nn_accel.groupings import Neighbours, find_neighbours

THREADS, EACH = 256, 4
SIGNATURES = {"edges_in_order": "PiiP"}
MOST_EDGES, MOST_NODES = 6144, 8192
"""The work grows with the square of the edges; where torch's sorts take less is an estimate."""


class EdgeSort:
    """What orders edges on a device."""

    def __init__(self, config: Config) -> None:
        self.program = KernelProgram(
            "edges",
            "edges.cu",
            tuple(SIGNATURES),
            f"#define THREADS {THREADS}\n#define EACH {EACH}\n",
            description="edges of a small graph by receiver and by sender",
        )
        self._entries = Entries(self.program, SIGNATURES, config)

    def find(self, edge_index: torch.Tensor, nodes: int) -> Neighbours:
        """Both orders of the edges of ``edge_index`` [2, edges]."""
        edges = edge_index.shape[1]
        if edges > MOST_EDGES or nodes > MOST_NODES or edge_index.dtype != torch.int64:
            return find_neighbours(edge_index, nodes)
        sizes = [edges] * 3 + [nodes + 1] * 2
        numbers = torch.empty(sum(sizes), dtype=torch.int32, device=edge_index.device)
        senders, by_sender, by_receiver, of_sender, of_receiver = numbers.split_with_sizes(sizes)
        items = THREADS // 32 * EACH
        grid, block = (-(-(edges + nodes + 1) // items), 2, 1), (THREADS, 1, 1)
        self._entries.on(edge_index.device)["edges_in_order"](
            grid, block, edge_index.contiguous(), edges, nodes, numbers, shared=4 * edges
        )
        return Neighbours(nodes, senders, by_receiver, of_receiver, by_sender, of_sender)
