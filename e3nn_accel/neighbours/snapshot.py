"""Where atoms were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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
