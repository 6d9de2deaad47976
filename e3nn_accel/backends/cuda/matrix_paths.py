"""The paths of linears, species-indexed or not: where rows and weights of each are, and how tiles walk along them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from e3nn_accel.backends.cuda.indexed_linear_layout import DEPTH, TILE
from e3nn_accel.backends.cuda.tensor_product_plan import offset_of
from e3nn_accel.descriptor import (
    LinearDescriptor,
    ProductPath,
    TensorProductDescriptor,
)
from e3nn_accel.irreps import dim_of
from e3nn_accel.launch import COPY_BYTES

MOST_PATHS = 1600
"""Of a table, which is text that a compiler reads; with feature columns there is a path from each to each."""
HIGHEST_DEGREE = 7
"""Components of a node have to fit in the 16 rows that the gradient of the weights sums at a time."""


class MatrixPath(NamedTuple):
    """A path as the kernels have it: where rows and weights are.

    Attributes:
        into, out: Where its blocks start in rows of the input and the output.
        channels, columns: Of the input and the output.
        dim: Components of a channel.
        weight: Where its weights start.
        scale: The constant of the path.
    """

    into: int
    channels: int
    out: int
    columns: int
    dim: int
    weight: int
    scale: float

    @property
    def turned(self) -> MatrixPath:
        """From the output to the input."""
        return MatrixPath(
            self.out, self.columns, self.into, self.channels, self.dim, self.weight, self.scale
        )


@dataclass(frozen=True)
class MatrixPaths:
    """All paths of an operation.

    Attributes:
        species: How many matrices each has; 0 where rows aren't told apart, for the single one of ``o3.Linear``.
        weights: In all.
        transposed: Whether in and out have been exchanged: a row of weights then is one of ``channels``.
    """

    paths: tuple[MatrixPath, ...]
    in_row: int
    out_row: int
    species: int
    weights: int
    transposed: bool = False

    @classmethod
    def of_linear(cls, d: LinearDescriptor) -> MatrixPaths | str:
        """Of an ``o3.Linear`` without columns or biases and with weights that rows share; or why it has no kernel."""
        paths, weight = [], 0
        for p in d.paths:
            if p.i_in == -1:
                continue
            if 0 not in p.path_shape:
                first, last = d.irreps_in[p.i_in], d.irreps_out[p.i_out]
                paths.append(
                    MatrixPath(
                        offset_of(d.irreps_in, p.i_in), first.mul,
                        offset_of(d.irreps_out, p.i_out), last.mul, first.ir_dim, weight, p.path_weight,
                    )
                )  # fmt: skip
            weight += prod(p.path_shape)
        return cls._checked(paths, dim_of(d.irreps_in), dim_of(d.irreps_out), 0, weight)

    @classmethod
    def of(cls, d: TensorProductDescriptor) -> MatrixPaths | str:
        """Of a product that `species_linear.applies` to; or why there is no kernel for it."""
        paths, weight = [], 0
        for p in d.paths:
            if 0 not in p.path_shape:
                first, last = d.irreps_in1[p.i_in1], d.irreps_out[p.i_out]
                scale = _scale(p)
                if scale is None:
                    return "constants of a path are not a multiple of the identity"
                paths.append(
                    MatrixPath(
                        offset_of(d.irreps_in1, p.i_in1), first.mul,
                        offset_of(d.irreps_out, p.i_out), last.mul, first.ir_dim, weight, scale,
                    )
                )  # fmt: skip
            weight += prod(p.path_shape)
        species = d.irreps_in2[0].mul
        return cls._checked(paths, dim_of(d.irreps_in1), dim_of(d.irreps_out), species, weight)

    @classmethod
    def _checked(
        cls, paths: list[MatrixPath], in_row: int, out_row: int, species: int, weights: int
    ) -> MatrixPaths | str:
        if not paths:
            return "no path contributes anything"
        degree = max(path.dim for path in paths) // 2
        if degree > HIGHEST_DEGREE:
            return f"degree {degree}, the kernels go to {HIGHEST_DEGREE}"
        if weights >= 1 << 31:
            return f"{weights} weights, the kernels count to 2^31"
        if len(paths) > MOST_PATHS:
            return f"{len(paths)} paths, tables hold {MOST_PATHS}"
        return cls(tuple(paths), in_row, out_row, species, weights)

    @property
    def turned(self) -> MatrixPaths:
        """The gradient of the input."""
        paths = tuple(path.turned for path in self.paths)
        return MatrixPaths(
            paths, self.out_row, self.in_row, self.species, self.weights, not self.transposed
        )

    @property
    def by_output(self) -> tuple[MatrixPath, ...]:
        """Paths into a block side by side, else as they came."""
        return tuple(sorted(self.paths, key=lambda path: path.out))

    @property
    def covered(self) -> int:
        """Components of the output that some path reaches."""
        return sum({path.out: path.columns * path.dim for path in self.paths}.values())

    @property
    def widest(self) -> int:
        """Components of a channel, at most."""
        return max(path.dim for path in self.paths)

    def row_items(self, tile: int = TILE) -> list[tuple[int, int, int]]:
        """(first path, end, first column) of each block of a tile, so many columns of an output block.

        Those of fewer components come first.
        """
        paths, items = self.by_output, []
        for n, path in enumerate(paths):
            if n and paths[n - 1].out == path.out:
                continue
            end = n + sum(other.out == path.out for other in paths)
            items += [(n, end, column) for column in range(0, path.columns, tile)]
        return sorted(items, key=lambda item: paths[item[0]].dim)

    def items_by_dim(self, tile: int = TILE) -> list[tuple[int, int, int]]:
        """(components, its first item, how many it has) for each number of components of a channel."""
        dims = [self.by_output[first].dim for first, _, _ in self.row_items(tile)]
        return [(dim, dims.index(dim), dims.count(dim)) for dim in sorted(set(dims))]

    @property
    def longest(self) -> int:
        """Channels that are summed for a number of the output, at most."""
        paths = self.by_output
        sums = (paths[first:end] for first, end, _ in self.row_items())
        return max(sum(path.channels for path in into) for into in sums)

    def steps(self, item: tuple[int, int, int]) -> int:
        """Of the sum that a block of `row_items` walks along."""
        first, end, _ = item
        return sum(-(-path.channels // DEPTH) for path in self.by_output[first:end])

    def weight_items(self) -> list[tuple[int, int, int]]:
        """(path, first u, first w) of each tile of weights, those that take longest first."""
        longest_first = sorted(enumerate(self.by_output), key=lambda one: -one[1].dim)
        return [
            (n, u, w)
            for n, path in longest_first
            for u in range(0, path.channels, TILE)
            for w in range(0, path.columns, TILE)
        ]

    def copies(self, bytes_each: int) -> dict[str, int]:
        """How many numbers of input, output and weights lie together, aligned, wherever a copy of them begins."""
        most = COPY_BYTES // bytes_each
        whole = {
            "X_COPY": [self.in_row, *(p.into for p in self.paths)],
            "OUT_COPY": [self.out_row, *(p.out for p in self.paths)],
            "W_COPY": [
                n
                for p in self.paths
                for n in (p.weight, p.channels if self.transposed else p.columns)
            ],
        }
        return {name: 1 if any(n % most for n in at) else most for name, at in whole.items()}

    def one_scale(self) -> bool:
        """Whether all paths into a block of the output have the same constant."""
        return len({(path.out, path.scale) for path in self.paths}) == len(
            {path.out for path in self.paths}
        )

    def scattered(self, bytes_each: int) -> bool:
        """Whether something is copied number by number, which is much to keep track of."""
        return 1 in self.copies(bytes_each).values()

    def whole(self, what: str, tile: int) -> int:
        """1 where all paths' channels, or columns, fill tiles."""
        return int(all(getattr(path, what) % tile == 0 for path in self.paths))


def _scale(path: ProductPath) -> float | None:
    """What the path's constants are times the identity, if they are."""
    matrix = (path.coupling.dense() * path.path_weight).squeeze(1)
    scale = float(matrix[0, 0])
    square = matrix.shape[0] == matrix.shape[1]
    return scale if square and np.array_equal(matrix, scale * np.eye(len(matrix))) else None
