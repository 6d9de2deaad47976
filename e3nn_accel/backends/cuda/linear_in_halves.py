"""Linears of many rows in float32: tables and launches of the kernels that cut numbers into halves.

The weights are cut in a launch of their own, once a call, which takes as long as some rows do; of species-indexed
linears those of each species that has rows.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch

from e3nn_accel.backends.cuda.indexed_linear_layout import SortedRows, pitch
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.backends.cuda.tensor_product_plan import array, defines, for_each
from e3nn_accel.branches import branches_of_streams, early
from e3nn_accel.compile import KernelProgram
from e3nn_accel.launch import Kernel
from e3nn_accel.new_memory import new_rows

ENTRIES = (("halve_weights", "PP"), ("linear_in_halves", "PPqP"))
ENTRIES_BY_SPECIES = (("halve_weights", "PPP"), ("linear_in_halves", "PPPPPqP"))
CUTTERS, CUTTERS_WHO_READ_TWICE = 512, 256
"""Threads of a block that cuts weights; of weights turned round, with species (halve_weights.cuh)."""
WARPGROUP = 128
COLUMNS_OF_A_CUTTER = 8
COLUMNS_THAT_LEAVE = 64
"""At once, of blocks that stay: AT_ONCE in linear_in_halves_staged.cu."""
BYTES = 4
HOPPER = 90
LINE = 32
"""Numbers that lie side by side in all banks of shared memory."""
CHUNK = 16
"""Channels that tensor cores sum over at once."""
ROWS_OF_A_SPECIES, LEAST_ROWS = 200, 3000
"""From so many rows a species and in all, products by halves save more than cutting all species' weights takes.

Found by tests/gpu/tune_linear.py on an H200; how many of the species occur nobody knows without waiting for the device.
"""
SHORT = 128
"""Channels of a sum, at most, whose blocks do with fewer registers, where they have a tile each.

After the convolution dx takes an H200 0.074 ms for 0.083 so, forward, of longer sums, 0.068 for 0.065.
"""
MOST_ROOM = 64 << 20
"""Bytes that the halves of all species may take: more are not in the second-level cache when tiles read them."""


class Cut(NamedTuple):
    """How the kernel is cut.

    Attributes:
        rows: (node, component) pairs of a tile, 64 or 128.
        columns: Of a tile, 64 or 128.
        depth: Channels that are copied at a time, 16 or 32.
        stages: Slots of the ring in shared memory.
        blocks: Of a multiprocessor: what registers are bounded by.
        warpgroups: Whether tensor cores take the products of four warps together, as they do in Hopper alone.
        columns_at_once: Whose products a warpgroup asks for together, 64 or 128; 0 for all.
        multipliers: Warpgroups that multiply, of a block that stays and has tile after tile, beside one that copies for
            them; 0: blocks of one warpgroup have a tile each, and copy for themselves.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    blocks: int
    warpgroups: bool = False
    columns_at_once: int = 0
    multipliers: int = 0


def cut_of(side: MatrixPaths, architecture: int) -> Cut:
    """Found by tests/gpu/tune_linear.py on an H100, and of warpgroups on an H200, all without species.

    With species a warpgroup asks for 64 columns at once, because 772 bytes were spilled with 128, and none are so.
    """
    columns = max(path.columns for path in side.paths)
    if architecture == HOPPER:
        if not side.species and side.whole("channels", 32) and side.whole("columns", 128):
            return Cut(
                rows=64, columns=128, depth=32, stages=2, blocks=1, warpgroups=True, columns_at_once=64, multipliers=3
            )  # fmt: skip
        if columns > 64:
            # short sums spend much of their time where tiles begin and end, beside which a fourth block has work
            short = not side.species and side.widest > 1 and side.longest <= SHORT
            blocks, at_once = 4 if short else 3, 64 if short or side.species else 0
            return Cut(
                rows=64, columns=128, depth=32, stages=2, blocks=blocks, warpgroups=True, columns_at_once=at_once
            )  # fmt: skip
        return Cut(rows=64, columns=64, depth=32, stages=3, blocks=4, warpgroups=True)
    if side.widest > 1 and side.whole("columns", 128):
        return Cut(rows=64, columns=128, depth=32, stages=2, blocks=3)
    if side.widest > 1 or columns > 64:
        return Cut(rows=64, columns=64, depth=32, stages=3, blocks=4)
    return Cut(rows=64, columns=64, depth=32, stages=2, blocks=3)


def least_rows(species: int) -> int:
    """That go by halves, unless they are few; 0 species: of a single matrix all do."""
    return max(LEAST_ROWS, ROWS_OF_A_SPECIES * species) if species else 0


class LinearInHalves:
    """Kernels of one side of a linear: its output of its input, or its input's gradient of the output's.

    Attributes:
        whole: Whether all of a row of the result is written.
        room_for_halves: Numbers that the halves of the weights take.
        cutters: Blocks that cut the weights.
        cutting: Threads of one of these.
        block: Threads of one that multiplies.
        overlapping: Whether these may begin before the weights are cut, if nothing else is in between.
    """

    def __init__(self, side: MatrixPaths, architecture: int) -> None:
        self.side, self.cut = side, cut_of(side, architecture)
        self._items = self._chunked_items()
        self._by_dim = side.items_by_dim(self.cut.columns)
        self._blocks = [(self.cut.rows // dim, here) for dim, _, here in self._by_dim]
        self._classes = side.species + 1 if side.species else 0
        self.block = (WARPGROUP * (1 + self.cut.multipliers), 1, 1)
        self.overlapping = self.cut.warpgroups
        self.whole = side.covered == side.out_row
        of_items = len(self._items) * self.cut.columns
        matrices = max(1, side.species)
        self.room_for_halves = matrices * (self._chunks * CHUNK * self.cut.columns + of_items)
        self.cutters = (of_items // COLUMNS_OF_A_CUTTER, matrices, 1)
        read_twice = bool(side.species) and side.transposed
        self.cutting = (CUTTERS_WHO_READ_TWICE if read_twice else CUTTERS, 1, 1)
        self.entries = ENTRIES_BY_SPECIES if side.species else ENTRIES

    @classmethod
    def takes(cls, side: MatrixPaths, architecture: int) -> bool:
        """Whether rows are copied four numbers at a time, and there is room for all species' halves."""
        copies = side.copies(BYTES)
        if not copies["X_COPY"] == copies["OUT_COPY"] == 4:
            return False
        return not side.species or BYTES * cls(side, architecture).room_for_halves <= MOST_ROOM

    def _chunked_items(self) -> list[tuple[int, int, int, int]]:
        """(first path, end, first column, first chunk) of each block of a grid's column."""
        items, chunks, depth = [], 0, self.cut.depth
        for first, end, column in self.side.row_items(self.cut.columns):
            items.append((first, end, column, chunks))
            paths = self.side.by_output[first:end]
            chunks += sum(-(-path.channels // depth) for path in paths) * (depth // CHUNK)
        self._chunks = chunks
        return items

    @cached_property
    def _room(self) -> int:
        """Numbers of x of a slot; W, which follows, begins where tensor cores read it in one turn."""
        of_rows = max(self.cut.rows // dim * pitch for dim, pitch in self._pitches.items())
        return -(-of_rows // LINE) * LINE if self.cut.warpgroups else of_rows

    @cached_property
    def _pitches(self) -> dict[int, int]:
        """From one node's numbers to the next's, by components of a channel."""
        dims = sorted({path.dim for path in self.side.paths})
        return {dim: pitch(dim, BYTES, of_weights=False, depth=self.cut.depth) for dim in dims}

    @cached_property
    def shared(self) -> int:
        """Bytes of shared memory: the ring, or results on their way out; of blocks that stay, both."""
        rows, columns, depth, stages = self.cut[:4]
        ring = stages * (self._room + depth * columns)
        if self.cut.multipliers:
            return BYTES * self.cut.multipliers * (ring + rows * (COLUMNS_THAT_LEAVE + 4))
        return BYTES * max(ring, rows * (columns + 4))

    def program(self, suffix: str, description: str) -> KernelProgram:
        """What is compiled."""
        return KernelProgram(
            f"{'indexed_' if self.side.species else ''}linear_in_halves{suffix}",
            f"linear_in_halves{'_staged' if self.cut.multipliers else ''}.cu",
            tuple(entry for entry, _ in self.entries),
            self._header(),
            ("TRANSPOSED=1",) if self.side.transposed else (),
            description=description,
            features_of=HOPPER if self.cut.warpgroups else 0,
        )

    def _header(self) -> str:
        side = self.side
        by_species = {"SORTED": 1, "SPECIES": side.species, "ITEMS": len(self._items)}
        lines = [
            "#define REAL float",
            *defines(
                {
                    "IN_ROW": side.in_row,
                    "OUT_ROW": side.out_row,
                    "CHUNKS": self._chunks,
                    "CUTTERS": self.cutting[0],
                    "ROWS": self.cut.rows,
                    "COLUMNS": self.cut.columns,
                    "DEPTH": self.cut.depth,
                    "STAGES": self.cut.stages,
                    "BLOCKS": self.cut.blocks,
                    "WARPGROUPS": int(self.cut.warpgroups),
                    "COLUMNS_AT_ONCE": self.cut.columns_at_once or self.cut.columns,
                    **({"MULTIPLIERS": self.cut.multipliers} if self.cut.multipliers else {}),
                    "WHOLE_CHANNELS": side.whole("channels", self.cut.depth),
                    "WHOLE_COLUMNS": side.whole("columns", self.cut.columns),
                    "LEFT_ROOM": self._room,
                    "SCALARS": int(side.widest == 1 and not side.species),
                    **(by_species if side.species else {}),
                }
            ),
            "struct Path { int in, channels, out, columns, dim, weight; REAL scale; };",
            "struct Item { int first, end, column, chunk; };",
            array("Path", "PATH", list(side.by_output)),
            array("Item", "ITEM", self._items),
            "template <int DIM> constexpr int PITCH = 0;",
            *(f"template <> constexpr int PITCH<{dim}> = {n};" for dim, n in self._pitches.items()),
            for_each("DIMS", self._by_dim),
        ]
        return "\n".join(lines) + "\n"

    def blocks(self, rows: int, processors: int) -> int:
        """Of so many rows: of sorted ones, that have something to do, at most; that stay, one to a multiprocessor."""
        if self._classes:
            unfilled = min(rows, self._classes)
            return sum((rows // nodes + unfilled) * here for nodes, here in self._blocks)
        tiles = sum(-(-rows // nodes) * here for nodes, here in self._blocks)
        return min(tiles, max(1, processors)) if self.cut.multipliers else tiles

    def rows(
        self,
        kernels: tuple[Kernel, ...],
        blocks: int,
        x: torch.Tensor,
        w: torch.Tensor,
        sorted_rows: SortedRows,
    ) -> torch.Tensor:
        """[rows, out]; both tensors begin where a copy may."""
        halve_weights, product = kernels
        rows, columns = x.shape[0], self.side.out_row
        # where weights are cut in another stream, the last kernel of this one is any
        overlapping = self.overlapping and not branches_of_streams
        # two calls where one with `*sorted_rows` would do: that takes a microsecond
        if not self._classes:
            halves = early(lambda: self._halved(halve_weights, w), (w,))
            out = new_rows(x, rows, columns) if self.whole else x.new_zeros((rows, columns))
            product(
                (blocks, 1, 1), self.block, x, halves, rows, out,
                shared=self.shared, overlapping=overlapping,
            )  # fmt: skip
            return out
        attrs, order, first = sorted_rows
        halves = early(lambda: self._halved(halve_weights, w, first), (w, first))
        out = new_rows(x, rows, columns) if self.whole else x.new_zeros((rows, columns))
        product(
            (blocks, 1, 1), self.block, x, attrs, order, first, halves, rows, out,
            shared=self.shared, overlapping=overlapping,
        )  # fmt: skip
        return out

    def _halved(self, kernel: Kernel, w: torch.Tensor, *first: torch.Tensor | None) -> torch.Tensor:
        """The weights, of each species that has rows."""
        halves = new_rows(w, 1, self.room_for_halves)
        kernel(self.cutters, self.cutting, w, *first, halves)
        return halves
