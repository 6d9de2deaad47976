"""Nodes grouped by species in two kernels, where torch takes a dozen to sort, search and compare."""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.entries import Entries
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.compile import KernelProgram
from e3nn_accel.groupings import NodesBySpecies, in_torch, nodes_by_species
from e3nn_accel.plan import PlanContext

THREADS = 512
ROWS = 64
"""Rows of a tile that are looked at together; a tile has a multiple of them."""
MOST_TILES = 256
"""As many blocks as a large device holds at once; each reads the counts of all."""
MOST_KINDS = 5000
"""Two numbers of each are in shared memory."""
SIGNATURES = {"species_of_rows": "PqiiPPP", "order_of_rows": "PPqiiiPP"}


class SpeciesSort:
    """What sorts the rows of node_attrs of one dtype."""

    def __init__(self, context: PlanContext) -> None:
        sizes = {"REAL": REAL[context.dtype], "THREADS": THREADS, "ROWS": ROWS}
        header = "".join(f"#define {name} {value}\n" for name, value in sizes.items())
        self.program = KernelProgram(
            f"species_{REAL[context.dtype]}",
            "species.cu",
            tuple(SIGNATURES),
            header,
            description="nodes sorted by species",
        )
        self._entries = Entries(self.program, SIGNATURES, context.config)

    def nodes(self, attrs: torch.Tensor) -> NodesBySpecies:
        """The grouping of rows [.., species], found once for each content of ``attrs``."""
        return nodes_by_species(attrs, self._find)

    def _find(self, attrs: torch.Tensor) -> NodesBySpecies:
        kinds = attrs.shape[-1]
        attrs = attrs.reshape(-1, kinds).contiguous()
        if kinds > MOST_KINDS:
            return in_torch(attrs)
        rows = len(attrs)
        tile = -(-rows // (MOST_TILES * ROWS)) * ROWS
        tiles = -(-rows // tile) if rows else 0
        copy = torch.empty_like(attrs)
        numbers = attrs.new_empty(2 * rows + kinds + 2 + tiles * (kinds + 1), dtype=torch.int32)
        sizes = [rows, rows, kinds + 2, tiles * (kinds + 1)]
        species, order, first, counts = numbers.split_with_sizes(sizes)
        classify, place = self._entries.on(attrs.device).values()
        block, bytes_each = (THREADS, 1, 1), 4 * (kinds + 1)
        classify(
            (tiles, 1, 1), block, attrs, rows, kinds, tile, copy, species, counts, shared=bytes_each
        )
        # without rows, too: `first` has to be written
        place(
            (max(tiles, 1), 1, 1), block,
            species, counts, rows, kinds, tile, tiles, order, first, shared=2 * bytes_each,
        )  # fmt: skip
        return NodesBySpecies(copy, kinds, species, order, first)
