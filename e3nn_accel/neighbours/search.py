"""Every pair of atoms within a distance, each both ways: by vesin on a GPU, if it is installed, else by MACE's search.

MACE's is matscipy's, on one core of the host, whose arrays then go to the device: 29 ms for the 74 thousand pairs of
1000 atoms of silicon, beside an H200. vesin makes them there, in 1.6 ms (`tests/time_neighbours.py`). It says nothing
of the order of an atom's pairs, and sums over edges go by that, so pairs are brought into one. On the host that
takes what vesin is faster by.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch

from e3nn_accel.compat import vesin_neighbor_list
from e3nn_accel.neighbours.snapshot import Snapshot

log = logging.getLogger(__name__)
LARGEST_KEY = 1 << 62


class Found(NamedTuple):
    """Pairs, on one device.

    Attributes:
        edge_index: [2, pairs], int64: sender and receiver.
        cells: [pairs, 3], float64: how many cells beyond its own the receiver is.
        shifts: [pairs, 3], float64: those cells' vectors, added up.
        by: Who searched.
    """

    edge_index: torch.Tensor
    cells: torch.Tensor
    shifts: torch.Tensor
    by: str


def search(now: Snapshot, within: float, device: torch.device) -> Found:
    """Every pair that is less than ``within`` apart, and its images."""
    if device.type != "cuda":
        return by_mace(now, within, device)
    try:
        return by_vesin(now, within, device)
    except (
        Exception
    ) as error:  # more pairs than it has room for, say; MACE's search has no such bounds
        reason = f"{type(error).__name__}: {error}"
        log.info("vesin finds no pairs: %s", reason)
        found = by_mace(now, within, device)
        return found._replace(by=f"{found.by}, not vesin on the device ({reason})")


def by_mace(now: Snapshot, within: float, device: torch.device) -> Found:
    """On the host."""
    from mace.data.neighborhood import get_neighborhood

    arrays = get_neighborhood(now.positions, within, now.pbc, now.cell.copy())
    edge_index, shifts, cells = (torch.from_numpy(array) for array in arrays[:3])
    return Found(
        edge_index.to(device, torch.int64),
        cells.to(device, torch.float64),
        shifts.to(device, torch.float64),
        "matscipy",
    )


def by_vesin(now: Snapshot, within: float, device: torch.device) -> Found:
    """On the device, sorted by sender, receiver and cell.

    Raises:
        ImportError: There is no vesin, or one that isn't known.
        OverflowError: There are too many atoms to sort pairs by a single number.
        RuntimeError: vesin's own.
    """
    finder: Any = vesin_neighbor_list()(cutoff=within, full_list=True)
    points, cell = (torch.from_numpy(array).to(device) for array in (now.positions, now.cell))
    if device.type == "cuda":  # its kernels are on a stream of their own
        torch.cuda.synchronize(device)
    pairs, cells = finder.compute(points, cell, list(now.pbc), "PS")
    # vesin's unsigned integers, for which torch has next to nothing
    edge_index, cells = pairs.view(torch.int64).T, cells.to(torch.int64)
    order = _order(edge_index, cells, len(points))
    edge_index = edge_index.index_select(1, order)
    cells = cells.index_select(0, order).double()
    return Found(edge_index, cells, cells @ cell, "vesin")


def _order(edge_index: torch.Tensor, cells: torch.Tensor, atoms: int) -> torch.Tensor:
    """By sender, receiver and cell, a single number for each pair."""
    if not len(cells):
        return torch.zeros(0, dtype=torch.int64, device=cells.device)
    least, most = (t.tolist() for t in torch.aminmax(cells, dim=0))
    spans = [b - a + 1 for a, b in zip(least, most, strict=True)]
    if atoms * atoms * spans[0] * spans[1] * spans[2] > LARGEST_KEY:
        raise OverflowError(f"{atoms} atoms over {spans} cells")
    key = edge_index[0] * atoms + edge_index[1]
    for n, (start, span) in enumerate(zip(least, spans, strict=True)):
        key = key * span + (cells[:, n] - start)
    return key.argsort()
