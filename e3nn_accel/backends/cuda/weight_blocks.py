"""The gradient of weights, of many rows, by blocks that each have a tile of the weights and a share of the rows.

Two kernels do it so (kernels/weight_blocks.cuh): `linear_weights_in_halves` and `linear_weights_staged` say how.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.backends.cuda.tensor_product_plan import array, defines, for_each
from e3nn_accel.compile import KernelProgram
from e3nn_accel.launch import COPY_BYTES, Kernel, aligned
from e3nn_accel.new_memory import new_rows

SUMMING = 256
"""Threads of a block that adds tiles up, each warp 16 bytes to a lane."""
NARROWEST = 32
"""Channels, or columns: of tiles that would be emptier, indexed_linear_weights.cu makes more."""


class LeastWork(NamedTuple):
    """What is enough for a block, in what a step costs.

    Attributes:
        blocks: Of a multiprocessor: all blocks run at once.
        of_several: Where there is less for each of these, a multiprocessor has one: its beginning and end take as long.
        of_one: Of that one; of less work there are fewer blocks than multiprocessors.
    """

    blocks: int
    of_several: int
    of_one: int


class OfDim(NamedTuple):
    """Tiles of paths whose channels have so many components.

    Attributes:
        dim: Components.
        first, tiles: The first of the tiles, and how many there are.
        nodes: Of a step.
        cost: Of a step.
    """

    dim: int
    first: int
    tiles: int
    nodes: int
    cost: int


class Step(NamedTuple):
    """Nodes of a step, and how much it is to do."""

    nodes: int
    cost: int = 1


@dataclass(frozen=True)
class WeightBlocks:
    """Kernels of one linear.

    Attributes:
        entry: The kernel, and its file.
        real: "float" or "double".
        side: Paths, turned round where the input has changed places with the output.
        channels, columns: Of a tile.
        threads, shared: Of a block: its bytes of dynamic shared memory.
        steps: Of each number of components.
        least: What is enough for a block.
        sizes: What else ``plan.cuh`` says.
    """

    entry: str
    real: str
    side: MatrixPaths
    channels: int
    columns: int
    threads: int
    shared: int
    steps: dict[int, Step]
    least: LeastWork
    sizes: dict[str, int]

    @property
    def entries(self) -> tuple[tuple[str, str], ...]:
        """Kernels, and their parameters."""
        return ((self.entry, "PPqiP"), ("sum_of_blocks", "PqiP"))

    @cached_property
    def items(self) -> list[tuple[int, int, int]]:
        """(path, first u, first w) of each tile, those of fewer components first."""
        paths = self.side.by_output
        return [
            (n, u, w)
            for n, path in sorted(enumerate(paths), key=lambda one: one[1].dim)
            for u in range(0, path.channels, self.channels)
            for w in range(0, path.columns, self.columns)
        ]

    @cached_property
    def by_dim(self) -> tuple[OfDim, ...]:
        """Tiles by number of components."""
        dims = [self.side.by_output[path].dim for path, _, _ in self.items]
        return tuple(
            OfDim(dim, dims.index(dim), dims.count(dim), *self.steps[dim])
            for dim in sorted(set(dims))
        )

    def program(self, description: str, architecture: int) -> KernelProgram:
        """What is compiled, for that architecture alone."""
        sizes = {
            "IN_ROW": self.side.in_row,
            "OUT_ROW": self.side.out_row,
            "CHANNELS": self.channels,
            "COLUMNS": self.columns,
            **self.sizes,
        }
        lines = [
            f"#define REAL {self.real}",
            *defines(sizes),
            "struct Path { int in, channels, out, columns, dim, weight; REAL scale; };",
            "struct Item { int path, u, w; };",
            array("Path", "PATH", list(self.side.by_output)),
            array("Item", "ITEM", self.items),
            for_each("DIMS", [of[:3] for of in self.by_dim]),
            "template <int DIM> constexpr int NODES = 0;",
            "template <int DIM> constexpr int COST = 0;",
            *(f"template <> constexpr int NODES<{of.dim}> = {of.nodes};" for of in self.by_dim),
            *(f"template <> constexpr int COST<{of.dim}> = {of.cost};" for of in self.by_dim),
        ]
        return KernelProgram(
            self.entry,
            f"{self.entry}.cu",
            tuple(entry for entry, _ in self.entries),
            "\n".join(lines) + "\n",
            ("TRANSPOSED=1",) if self.side.transposed else (),
            description=description,
            features_of=architecture,
        )

    def weights(
        self, kernels: tuple[Kernel, ...], x: torch.Tensor, g: torch.Tensor, processors: int
    ) -> torch.Tensor:
        """[weights]; of some rows."""
        of_blocks, sum_of_blocks = kernels
        x, g, rows = aligned(x), aligned(g), x.shape[0]
        of_tile = self.channels * self.columns
        work, blocks = cut(self.by_dim, self.least, rows, processors)
        sums = new_rows(x, blocks, of_tile)
        left, right = (g, x) if self.side.transposed else (x, g)
        of_blocks(
            (blocks, 1, 1), (self.threads, 1, 1), left, right, rows, work, sums, shared=self.shared
        )
        out = new_rows(x, 1, self.side.weights)
        together = 32 * COPY_BYTES // x.element_size()
        grid = (len(self.items) * of_tile // together, 1, 1)
        sum_of_blocks(grid, (SUMMING, 1, 1), sums, rows, work, out)
        return out[0]


def copied_whole(paths: MatrixPaths, bytes_each: int) -> bool:
    """Whether all rows have the same weights, tiles aren't nearly empty, and bulk copies move what they need."""
    together = COPY_BYTES // bytes_each
    copies = paths.copies(bytes_each)
    sizes = [n for path in paths.paths for n in (path.channels, path.columns)]
    return (
        not paths.species
        and copies["X_COPY"] == copies["OUT_COPY"] == together
        and not any(n % together for n in sizes)
        and min(widest(paths)) > NARROWEST
    )


def widest(paths: MatrixPaths) -> tuple[int, int]:
    """Channels and columns of the paths that have most."""
    return max(path.channels for path in paths.paths), max(path.columns for path in paths.paths)


@lru_cache(256)
def cut(by_dim: tuple[OfDim, ...], least: LeastWork, rows: int, processors: int) -> tuple[int, int]:
    """(work of a block, blocks): as little as has all blocks run at once, unless tiles are more than that.

    Args:
        by_dim: Tiles, as the kernel has them.
        least: What is enough for a block.
        rows: Some.
        processors: Of the device.
    """
    of_tiles = [-(-rows // of.nodes) * of.cost for of in by_dim]
    in_all = sum(work * of.tiles for work, of in zip(of_tiles, by_dim, strict=True))
    processors = max(1, processors)
    several = in_all >= least.of_several * least.blocks * processors
    most = processors * (least.blocks if several else 1)

    def blocks(work: int) -> int:
        steps = [(max(1, work // of.cost) * of.nodes, of.tiles) for of in by_dim]
        return sum(-(-rows // each) * tiles for each, tiles in steps)

    work = max(least.of_one, in_all // most)
    while blocks(work) > most and work < max(of_tiles):
        work += 1 + work // 128
    return work, blocks(work)
