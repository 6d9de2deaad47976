"""The kernels that map MACE's weights to the reduced basis, and gradients back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.compile import KernelProgram
from e3nn_accel.launch import Kernel, load_all
from e3nn_accel.new_memory import new_matrices
from e3nn_accel.plan import PlanContext

GROUP = 4
"""Results of a thread."""
THREADS = 128
BLOCK = (THREADS, 1, 1)


@dataclass(frozen=True)
class _Item:
    """As in contraction_basis.cu."""

    block: int
    first: int
    count: int
    source: int
    terms: int
    row: int


class ChangeOfBasis:
    """`e3nn_accel.ops.change_of_basis` differentiates with these.

    Args:
        projections: [original, reduced] of each weight; each has reduced paths.
        channels: Of the weights.
        context: Their dtype.
        description: Of the plan.
    """

    def __init__(
        self,
        projections: Sequence[NDArray[np.float64]],
        channels: int,
        context: PlanContext,
        description: str,
    ) -> None:
        self.blocks, self.channels = len(projections), channels
        self.config, self.dtype = context.config, context.dtype
        self.paths = [len(projection) for projection in projections]
        *offsets, self.reduced = accumulate((p.shape[1] for p in projections), initial=0)
        zeros = [0] * self.blocks
        self._to, self._to_table = _items(projections, offsets, zeros)
        self._from, self._from_table = _items([p.T for p in projections], zeros, offsets)
        real, pointers = REAL[context.dtype], "P" * self.blocks
        self.program = KernelProgram(
            f"contraction_basis_{real}",
            "contraction_basis.cu",
            ("weights_to_basis", "weights_from_basis"),
            self._header(real),
            description=description,
        )
        self._signatures = (f"{pointers}PiP", f"PPi{pointers}")
        self._loaded: dict[torch.device, tuple[tuple[Kernel, torch.Tensor], ...]] = {}

    def to_basis(self, weights: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """All reduced weights [species, paths, channels]; every number is written."""
        like = weights[0]
        if like is None:
            like = next(w for w in weights if w is not None)
        species = like.shape[0]
        out = new_matrices(like, species, self.reduced, self.channels)
        kernel, table = (self._loaded.get(like.device) or self._on(like.device))[0]
        grid = -(-species * self.channels // THREADS), len(self._to), 1
        kernel(grid, BLOCK, *weights, table, species, out)
        return out

    def from_basis(
        self, w: torch.Tensor, wanted: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        """The transpose: [species, paths of the block, channels] of each wanted block."""
        species = w.shape[0]
        found = tuple(
            w.new_empty((species, paths, self.channels)) if want else None
            for paths, want in zip(self.paths, wanted, strict=True)
        )
        kernel, table = self._on(w.device)[1]
        grid = -(-species * self.channels // THREADS), len(self._from), 1
        kernel(grid, BLOCK, w, table, species, *found)
        return found

    def _on(self, device: torch.device) -> tuple[tuple[Kernel, torch.Tensor], ...]:
        """Each kernel with its coefficients, which are no part of the program: there may be many."""
        if device not in self._loaded:
            (loaded,) = load_all([self.program], device, self.config)
            tables = (self._to_table, self._from_table)
            self._loaded[device] = tuple(
                (
                    loaded.kernel(entry, signature),
                    torch.as_tensor(table, dtype=self.dtype, device=device),
                )
                for entry, signature, table in zip(
                    self.program.entries, self._signatures, tables, strict=True
                )
            )
        return self._loaded[device]

    def _header(self, real: str) -> str:
        last = self.blocks - 1
        choice = "".join(f"(n) == {n} ? w{n} : " for n in range(last))
        constants = {
            "REAL": real,
            "THREADS": THREADS,
            "GROUP": GROUP,
            "CHANNELS": self.channels,
            "REDUCED": self.reduced,
            "PATHS_OF_BLOCKS": ", ".join(map(str, self.paths)),
            "ORIGINALS(T)": ", ".join(f"T w{n}" for n in range(self.blocks)),
            "ORIGINAL(n)": f"({choice}w{last})",
            "TO_BASIS": _listed(self._to),
            "FROM_BASIS": _listed(self._from),
        }
        return "".join(f"#define {name} {value}\n" for name, value in constants.items())


def _items(
    matrices: Sequence[NDArray[np.float64]], firsts: Sequence[int], sources: Sequence[int]
) -> tuple[list[_Item], NDArray[np.float64]]:
    """What the blocks of a grid do, with their coefficients [rows, GROUP].

    Args:
        matrices: [terms, results] of each block.
        firsts: Where the results of each block begin in what is written.
        sources: Where its terms begin in what is read.
    """
    items: list[_Item] = []
    rows: list[NDArray[np.float64]] = []
    for block, (matrix, first, source) in enumerate(zip(matrices, firsts, sources, strict=True)):
        terms, results = matrix.shape
        for n in range(0, results, GROUP):
            group = matrix[:, n : n + GROUP]
            items.append(
                _Item(block, first + n, group.shape[1], source, terms, sum(map(len, rows)))
            )
            rows.append(np.pad(group, ((0, 0), (0, GROUP - group.shape[1]))))
    return items, np.ascontiguousarray(np.concatenate(rows))


def _listed(items: Iterable[_Item]) -> str:
    return ", ".join(f"{{{', '.join(map(str, astuple(item)))}}}" for item in items)
