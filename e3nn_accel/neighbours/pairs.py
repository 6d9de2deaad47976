"""Verlet's list: pairs of atoms up to somewhat beyond the cutoff, good until atoms have moved so far.

Let r be the cutoff, s the skin. A pair that wasn't listed was at least r + s apart. A cell that turns
into another takes it to at least q (r + s), with q the least stretch of that change, and two atoms
that move by u besides bring it nearer by 2 u at most. So the list has every pair within r as long as
2 u <= q (r + s) - r. Of the listed ones those within r are the edges: never more, never fewer.

The list is MACE's own search with a longer cutoff. vesin makes it in half the time (`tests/time_neighbours.py`; README
has figures): of 4096 atoms that saves once a list what filtering takes in three steps, and a list serves many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SKIN = 1.0
"""In units of length. Half as much: a list of half the excess, made anew more than twice as often."""
MARGIN = 1e-9
"""Kept from the bound: far more than rounding."""


@dataclass(frozen=True)
class Snapshot:
    """Where atoms were.

    Attributes:
        positions: [atoms, 3], float64.
        cell: [3, 3], rows are the cell's vectors.
        pbc: Along which of them it repeats.
    """

    positions: Any
    cell: Any
    pbc: tuple[bool, bool, bool]

    def reach(self, now: Snapshot, within: float) -> float:
        """Up to which distance every pair that there is now was within ``within`` before.

        Not a number, or minus infinity, where nothing can be said.
        """
        if now.pbc != self.pbc or now.positions.shape != self.positions.shape:
            return -np.inf
        if np.array_equal(now.cell, self.cell):
            moved, stretch = now.positions - self.positions, 1.0
        elif all(self.pbc) and abs(np.linalg.det(self.cell)) > MARGIN:
            change = np.linalg.solve(self.cell, now.cell)
            moved = now.positions - self.positions @ change
            stretch = float(np.linalg.svd(change, compute_uv=False)[-1])
        else:
            return -np.inf
        furthest = np.sqrt(np.einsum("ij,ij->i", moved, moved).max())
        return float(stretch * within - 2 * furthest - MARGIN)


@dataclass(frozen=True)
class Edges:
    """Of one structure.

    Attributes:
        edge_index: [2, edges], int64: sender and receiver.
        shifts: [edges, 3].
        unit_shifts: [edges, 3].
    """

    edge_index: torch.Tensor
    shifts: torch.Tensor
    unit_shifts: torch.Tensor


class Pairs:
    """The list, on the device of the model.

    Attributes:
        start: Where atoms were when it was made.
        cutoff: Of the edges.
        number: How many pairs there are.
    """

    def __init__(
        self, start: Snapshot, cutoff: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        from mace.data.neighborhood import get_neighborhood

        self.start, self.cutoff = start, cutoff
        edge_index, shifts, unit_shifts, _ = get_neighborhood(
            start.positions, cutoff + SKIN, start.pbc, start.cell.copy()
        )
        self.number = edge_index.shape[1]
        self._dtype = dtype
        self._edge_index = torch.from_numpy(edge_index).to(device, torch.int64)
        self._units = torch.from_numpy(unit_shifts).to(device, torch.float64)
        self._unit_shifts = self._units.to(dtype)
        self._set_cell(start.cell, torch.from_numpy(shifts).to(device, torch.float64))

    def _set_cell(self, cell: Any, shifts: torch.Tensor) -> None:
        self._cell = cell
        self._shifts = shifts.to(self._dtype)
        self._components = shifts.T.contiguous()

    def cover(self, now: Snapshot) -> bool:
        """Whether every edge that there is now is in the list."""
        return self.start.reach(now, self.cutoff + SKIN) >= self.cutoff

    def edges(self, now: Snapshot, positions: torch.Tensor) -> Edges:
        """The pairs within the cutoff, in the order of the list; waits for the device once.

        Args:
            now: A structure that the list covers.
            positions: Its positions [atoms, 3], float64, on the device.
        """
        if not np.array_equal(now.cell, self._cell):
            cell = torch.from_numpy(now.cell).to(positions.device)
            self._set_cell(now.cell, self._units @ cell)
        # component by component: rows of three are slow to gather and to add up
        components = positions.T.contiguous()
        sender, receiver = self._edge_index
        between = components.index_select(1, receiver)
        between -= components.index_select(1, sender)
        between += self._components
        near = between.square_().sum(0) < self.cutoff * self.cutoff
        [kept] = near.nonzero(as_tuple=True)
        return Edges(
            self._edge_index.index_select(1, kept),
            self._shifts.index_select(0, kept),
            self._unit_shifts.index_select(0, kept),
        )
