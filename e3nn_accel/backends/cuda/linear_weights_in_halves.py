"""The gradient of the weights of ``o3.Linear`` of many rows in float32, on Hopper: tables and launches of kernels."""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch

from e3nn_accel.backends.cuda.linear_in_halves import BYTES, CHUNK, HOPPER, LINE
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.backends.cuda.tensor_product_plan import array, defines, for_each
from e3nn_accel.compile import KernelProgram
from e3nn_accel.launch import Kernel, aligned
from e3nn_accel.new_memory import new_rows

WEIGHT_ENTRIES = (("linear_weights_in_halves", "PPqiP"), ("sum_of_blocks", "PqiP"))
THREADS, STAGES, LOTS = 256, 2, 2
"""Of a block, its slots of rows, and its lots of halves."""
CHANNELS, CHUNKS = 128, 2
"""Of a tile; of a step, each of as many components of nodes as tensor cores sum over at once."""
BLOCKS = 2
"""Of a multiprocessor: all blocks run at once."""
LEAST_STEPS, FEWEST_STEPS = 8, 4
"""Of a block, whose beginning and end take as long as some: of a multiprocessor's only one, and of less work still."""
TOGETHER = 4
"""Numbers that bulk copies move at once."""
SUMMED_TOGETHER = 128
"""Numbers of a tile that a block adds up."""
FEWEST = 32
"""Channels, or columns: of tiles that would be emptier, indexed_linear_weights.cu makes more."""


class LinearWeightsInHalves:
    """Kernels of one linear.

    Attributes:
        shared: Bytes of shared memory of a block: rings of rows and of halves.
    """

    def __init__(self, paths: MatrixPaths) -> None:
        # what has more channels is cut by those that multiply, and has the tile's longer side
        self._turned = max(path.channels for path in paths.paths) <= CHANNELS // 2
        self._side = paths.turned if self._turned else paths
        self._columns = 128 if max(path.columns for path in self._side.paths) > 64 else 64
        self._tile = CHANNELS * self._columns
        left, right = self._rooms
        self.shared = BYTES * (STAGES * (left + right) + LOTS * CHUNKS * CHUNK * self._columns)

    @staticmethod
    def takes(paths: MatrixPaths, architecture: int) -> bool:
        """Whether all rows have the same weights, tiles aren't nearly empty, and bulk copies move what they need."""
        sizes = [n for path in paths.paths for n in (path.channels, path.columns)]
        widest = [
            max(getattr(path, name) for path in paths.paths) for name in ("channels", "columns")
        ]
        return (
            architecture == HOPPER
            and not paths.species
            and paths.copies(BYTES)["X_COPY"] == paths.copies(BYTES)["OUT_COPY"] == TOGETHER
            and not any(n % TOGETHER for n in sizes)
            and min(widest) > FEWEST
            and max(widest) > CHANNELS // 2
        )

    @cached_property
    def _items(self) -> list[tuple[int, int, int]]:
        """(path, first u, first w) of each tile, those of fewer components first."""
        paths = self._side.by_output
        return [
            (n, u, w)
            for n, path in sorted(enumerate(paths), key=lambda one: one[1].dim)
            for u in range(0, path.channels, CHANNELS)
            for w in range(0, path.columns, self._columns)
        ]

    @cached_property
    def _by_dim(self) -> tuple[tuple[int, int, int], ...]:
        """(components, its first item, how many it has)."""
        dims = [self._side.by_output[path].dim for path, _, _ in self._items]
        return tuple((dim, dims.index(dim), dims.count(dim)) for dim in sorted(set(dims)))

    @cached_property
    def _rooms(self) -> tuple[int, int]:
        """Numbers of x, and of g, that a slot holds: see Chunk in the kernel."""
        left = right = 0
        for dim, _, _ in self._by_dim:
            nodes = CHUNK // dim
            left = max(left, CHUNKS * nodes * (CHANNELS * dim + 8))
            right = max(right, CHUNKS * (nodes * self._columns * dim + 16))
        return -(-left // LINE) * LINE, -(-right // LINE) * LINE

    def program(self, description: str) -> KernelProgram:
        """What is compiled."""
        left, right = self._rooms
        sizes = {
            "IN_ROW": self._side.in_row,
            "OUT_ROW": self._side.out_row,
            "COLUMNS": self._columns,
            "LEFT_ROOM": left,
            "RIGHT_ROOM": right,
        }
        lines = [
            "#define REAL float",
            *defines(sizes),
            "struct Path { int in, channels, out, columns, dim, weight; REAL scale; };",
            "struct Item { int path, u, w; };",
            array("Path", "PATH", list(self._side.by_output)),
            array("Item", "ITEM", self._items),
            for_each("DIMS", self._by_dim),
        ]
        return KernelProgram(
            "linear_weights_in_halves",
            "linear_weights_in_halves.cu",
            tuple(entry for entry, _ in WEIGHT_ENTRIES),
            "\n".join(lines) + "\n",
            ("TRANSPOSED=1",) if self._turned else (),
            description=description,
            features_of=HOPPER,
        )

    def weights(
        self, kernels: tuple[Kernel, ...], x: torch.Tensor, g: torch.Tensor, processors: int
    ) -> torch.Tensor:
        """[weights]; of some rows."""
        of_blocks, sum_of_blocks = kernels
        x, g, rows = aligned(x), aligned(g), x.shape[0]
        steps, blocks = cut(self._by_dim, rows, processors)
        sums = new_rows(x, blocks, self._tile)
        left, right = (g, x) if self._turned else (x, g)
        of_blocks(
            (blocks, 1, 1), (THREADS, 1, 1), left, right, rows, steps, sums, shared=self.shared
        )
        out = new_rows(x, 1, self._side.weights)
        grid = (len(self._items) * self._tile // SUMMED_TOGETHER, 1, 1)
        sum_of_blocks(grid, (THREADS, 1, 1), sums, rows, steps, out)
        return out[0]


@lru_cache(256)
def cut(by_dim: tuple[tuple[int, int, int], ...], rows: int, processors: int) -> tuple[int, int]:
    """(steps of a block, blocks): as few steps as have all blocks run at once, unless tiles are more than that.

    Args:
        by_dim: (components, first tile, tiles), as the kernel has them.
        rows: Some.
        processors: Of the device.
    """
    work = [(-(-rows // (CHUNKS * (CHUNK // dim))), tiles) for dim, _, tiles in by_dim]
    in_all, longest = sum(steps * tiles for steps, tiles in work), max(steps for steps, _ in work)
    processors = max(1, processors)
    most = processors * (BLOCKS if in_all >= LEAST_STEPS * BLOCKS * processors else 1)

    def blocks(steps: int) -> int:
        return sum(-(-of_tile // steps) * tiles for of_tile, tiles in work)

    steps = max(FEWEST_STEPS, in_all // most)
    while blocks(steps) > most and steps < longest:
        steps += 1
    return steps, blocks(steps)
