"""Edge lists with every irregularity a neighbour list may have."""

from __future__ import annotations

import torch


def random_edges(nodes: int, edges: int, seed: int = 0) -> torch.Tensor:
    """Unsorted senders and receivers; duplicates, self loops and isolated nodes happen."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(nodes, (2, edges), generator=generator)


def _pairs(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()


def _one_receiver(nodes: int, edges: int, receiver: int) -> torch.Tensor:
    found = random_edges(nodes, edges)
    found[1] = receiver
    return found


GRAPHS: dict[str, tuple[int, torch.Tensor]] = {
    "unsorted": (6, random_edges(6, 23)),
    "sorted by receiver": (6, random_edges(6, 23)[:, torch.argsort(random_edges(6, 23)[1])]),
    "dense": (3, random_edges(3, 90)),
    "middle": (4, random_edges(4, 40)),
    "isolated nodes": (9, _pairs((3, 5), (5, 3), (4, 3))),
    "self loops": (3, _pairs((0, 0), (1, 1), (1, 1), (2, 0))),
    "duplicate edges": (3, _pairs((0, 1), (0, 1), (0, 1), (2, 1), (0, 1))),
    "one receiver": (5, _one_receiver(5, 17, 4)),
    "ghosts send only": (7, _pairs((5, 0), (6, 0), (6, 1), (0, 1), (5, 2), (1, 2))),
    "one edge": (2, _pairs((1, 0))),
    "no edges": (4, _pairs()),
    "no nodes": (0, _pairs()),
}
"""Number of nodes and edge_index [2, edges] by name."""
