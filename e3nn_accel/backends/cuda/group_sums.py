"""Rows of few numbers summed by the groups that they belong to, where torch copies them in order first."""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.entries import Entries
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config

THREADS = 128
SIGNATURES = {"sum_groups": "PPPqP"}
MOST_COLUMNS = 16
"""A lane has as many sums."""


class GroupSums:
    """What sums rows on a device, a program for each number of columns and dtype."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._entries: dict[tuple[int, torch.dtype], Entries] = {}

    def takes(self, rows: torch.Tensor) -> bool:
        """Whether `sum` does."""
        return rows.dtype in REAL and 0 < rows[:1].numel() <= MOST_COLUMNS

    def sum(self, rows: torch.Tensor, order: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """[groups, ..] of ``rows`` [rows, ..]; rows ``order[first[n]:first[n + 1]]`` belong to group n."""
        groups = len(first) - 1
        out = rows.new_empty((groups, *rows.shape[1:]))
        entries = self._entries_of(rows[:1].numel(), rows.dtype)
        grid, block = (-(-groups * 32 // THREADS), 1, 1), (THREADS, 1, 1)
        entries.on(rows.device)["sum_groups"](
            grid, block, rows.contiguous(), order, first, groups, out
        )
        return out

    def program(self, columns: int, dtype: torch.dtype) -> KernelProgram:
        """Of rows of so many numbers."""
        sizes = {"REAL": REAL[dtype], "THREADS": THREADS, "COLUMNS": columns}
        return KernelProgram(
            f"sum_groups_{REAL[dtype]}_{columns}",
            "sum_groups.cu",
            tuple(SIGNATURES),
            "".join(f"#define {name} {value}\n" for name, value in sizes.items()),
            description=f"rows of {columns} numbers summed by group",
        )

    def _entries_of(self, columns: int, dtype: torch.dtype) -> Entries:
        key = columns, dtype
        if key not in self._entries:
            self._entries[key] = Entries(self.program(*key), SIGNATURES, self._config)
        return self._entries[key]
