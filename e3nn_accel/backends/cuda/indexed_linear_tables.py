"""The tables that the kernels of a species-indexed linear are compiled with."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from e3nn_accel.backends.cuda.tensor_product_plan import array, defines, offset_of
from e3nn_accel.descriptor import ProductPath, TensorProductDescriptor, dim_of

TILE = 64
"""Channels of a block, and rows of a tile: (node, component) pairs. As in matrix_tile.cuh."""
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
        species: How many matrices each has.
    """

    paths: tuple[MatrixPath, ...]
    in_row: int
    out_row: int
    species: int
    weights: int

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
                if first.l > HIGHEST_DEGREE:
                    return f"degree {first.l}, the kernels go to {HIGHEST_DEGREE}"
                paths.append(
                    MatrixPath(
                        offset_of(d.irreps_in1, p.i_in1), first.mul,
                        offset_of(d.irreps_out, p.i_out), last.mul, first.ir_dim, weight, scale,
                    )
                )  # fmt: skip
            weight += prod(p.path_shape)
        if not paths:
            return "no path contributes anything"
        if weight >= 1 << 31:
            return f"{weight} weights"
        rows = dim_of(d.irreps_in1), dim_of(d.irreps_out)
        return cls(tuple(paths), *rows, d.irreps_in2[0].mul, weight)

    @property
    def turned(self) -> MatrixPaths:
        """The gradient of the input."""
        paths = tuple(path.turned for path in self.paths)
        return MatrixPaths(paths, self.out_row, self.in_row, self.species, self.weights)

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

    def row_items(self) -> list[tuple[int, int, int]]:
        """(first path, end, first column) of each block of a grid's column."""
        paths, items = self.by_output, []
        for n, path in enumerate(paths):
            if n and paths[n - 1].out == path.out:
                continue
            end = n + sum(other.out == path.out for other in paths)
            items += [(n, end, column) for column in range(0, path.columns, TILE)]
        return items

    def weight_items(self) -> list[tuple[int, int, int]]:
        """(path, first u, first w) of each tile of weights."""
        return [
            (n, u, w)
            for n, path in enumerate(self.by_output)
            for u in range(0, path.channels, TILE)
            for w in range(0, path.columns, TILE)
        ]

    def header(self, real: str, of_weights: bool) -> str:
        """The text of ``plan.cuh``."""
        fields = "path, u, w" if of_weights else "first, end, column"
        items = self.weight_items() if of_weights else self.row_items()
        lines = [
            f"#define REAL {real}",
            *defines(
                {
                    "IN_ROW": self.in_row,
                    "OUT_ROW": self.out_row,
                    "SPECIES": self.species,
                    "WEIGHTS": self.weights,
                }
            ),
            "struct Path { int in, channels, out, columns, dim, weight; REAL scale; };",
            f"struct Item {{ int {fields}; }};",
            array("Path", "PATH", list(self.by_output)),
            array("Item", "ITEM", items),
        ]
        return "\n".join(lines) + "\n"


def _scale(path: ProductPath) -> float | None:
    """What the path's constants are times the identity, if they are."""
    matrix = (path.coupling.dense() * path.path_weight).squeeze(1)
    scale = float(matrix[0, 0])
    square = matrix.shape[0] == matrix.shape[1]
    return scale if square and np.array_equal(matrix, scale * np.eye(len(matrix))) else None
