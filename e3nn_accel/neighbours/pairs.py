"""Verlet's list: pairs of atoms up to somewhat beyond the cutoff, good until atoms have moved so far.

Let r be the cutoff, s the skin. A pair that wasn't listed was at least r + s apart. A cell that turns
into another takes it to at least q (r + s), with q the least stretch of that change, and two atoms
that move by u besides bring it nearer by 2 u at most. So the list has every pair within r as long as
2 u <= q (r + s) - r. Of the listed ones those within r are the edges: never more, never fewer.

A step finds its edges among the pairs, on the model's device. The list is made by a search with a longer cutoff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from e3nn_accel.neighbours.search import search
from e3nn_accel.neighbours.snapshot import Snapshot

SKIN = 1.0
"""In units of length. Half as much: a list of half the excess, made anew more than twice as often."""


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
        by: Who found them.
    """

    def __init__(
        self, start: Snapshot, cutoff: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.start, self.cutoff = start, cutoff
        self._edge_index, self._units, shifts, self.by = search(start, cutoff + SKIN, device)
        self.number = self._edge_index.shape[1]
        self._dtype = dtype
        self._unit_shifts = self._units.to(dtype)
        self._set_cell(start.cell, shifts)

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
