"""Adds up what several blocks made of the same sums, each of a share of what is summed, in a fixed order."""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.entries import Entries
from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config

THREADS = 128
SIGNATURES = {"sum_shares": "PiqP"}


class ShareSums:
    """Of rows of so many numbers.

    Attributes:
        program: What is compiled.
    """

    def __init__(self, row: int, real: str, real_bytes: int, config: Config) -> None:
        self._vector = 16 // real_bytes if row * real_bytes % 16 == 0 else 1
        sizes = {"REAL": real, "THREADS": THREADS, "VECTOR": self._vector}
        self.program = KernelProgram(
            f"sum_shares_{real}",
            "sum_shares.cu",
            tuple(SIGNATURES),
            "".join(f"#define {name} {value}\n" for name, value in sizes.items()),
            description=f"shares of rows summed, {self._vector} numbers a thread",
        )
        self._entries = Entries(self.program, SIGNATURES, config)

    def load(self, device: torch.device) -> None:
        """Compiled and loaded, which may not be done while a CUDA graph is being captured."""
        self._entries.on(device)

    def sum(self, shares: torch.Tensor) -> torch.Tensor:
        """[rows, row] of ``shares`` [count, rows, row]; the first share first."""
        out = shares.new_empty(shares.shape[1:])
        numbers = out.numel()
        blocks = -(-numbers // (THREADS * self._vector))
        self._entries.on(out.device)["sum_shares"](
            (blocks, 1, 1), (THREADS, 1, 1), shares, shares.shape[0], numbers, out
        )
        return out
