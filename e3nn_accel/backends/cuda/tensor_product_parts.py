"""The parts of a tensor product that go by pairs of channels.

``tensor_product.cu`` has the pairs that go to an output as they are, ``tensor_product_mixed.cu`` those
that weights of each row mix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from e3nn_accel.backends.cuda.tensor_product_plan import (
    SHARED_BYTES,
    Numbered,
    Residence,
    Segment,
    array,
    defines,
    offset_of,
    pair_count,
    rows_of,
)
from e3nn_accel.backends.cuda.tensor_product_tables import Item, PairTables, lanes_for
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.irreps import dim_of

FILE, MIXED_FILE = "tensor_product.cu", "tensor_product_mixed.cu"
WARP, BLOCK = 32, 128
LONG_ROW = 1024
"""Numbers of a row from which a block, not a warp, works on it."""
Z_BYTES = 10 * 1024
"""Shared memory for the pairs' values of a part that mixes, and as much again for their gradients."""


@dataclass(frozen=True)
class ElementPart:
    """Pairs that go to the result as they are, times a weight or not.

    Attributes:
        tables: The pairs.
        segments: The matrices of the result.
        real_bytes: Size of a number.
    """

    d: TensorProductDescriptor
    tables: PairTables
    segments: tuple[Segment, ...]
    real_bytes: int
    file: str = FILE
    swapped: bool = False
    chunks: int = 1
    has_double: bool = False

    @cached_property
    def items(self) -> list[Item]:
        """Components of the result."""
        return self.tables.outputs()

    @property
    def covered(self) -> int:
        """Components of the output that it sets."""
        return len(self.items)

    @property
    def team(self) -> int:
        """Threads that work on a row."""
        return BLOCK if len(self.items) >= LONG_ROW else WARP

    @property
    def bytes(self) -> int:
        """Shared memory of a row."""
        return self.real_bytes * (dim_of(self.d.irreps_in1) + dim_of(self.d.irreps_in2))

    @property
    def rows(self) -> int:
        """That a block takes at a time."""
        return teams_for(self.team, self.bytes)

    @property
    def sums(self) -> int:
        """Partial sums of dw that a block makes where weights are shared."""
        return self.rows

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.team * self.rows

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.rows * self.bytes

    def residence(self, kind: str) -> Residence | None:
        """None: a block has its rows and ends."""
        return None

    def reached(self, operand: int) -> int:
        """Components of an input that play a part."""
        return len(self.tables.inputs(operand)[0])

    def header(self, kind: str, real: str) -> str:
        """The text of ``plan.cuh``."""
        items = self.items
        lines = self.tables.header(real)
        lanes = {"X": self.tables.inputs(0)[0], "Y": self.tables.inputs(1)[0], "OUT": items}
        sizes = rows_of(self.d) | {
            "MIX": 0,
            "TEAM": self.team,
            "TEAMS": self.rows,
            "OUT_ITEMS": len(items),
        }
        sizes |= {f"LANES_{name}": lanes_for(found, self.team) for name, found in lanes.items()}
        lines += [*defines(sizes), *segments(self.segments), array("Item", "OUT_ITEM", items)]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Mixed:
    """An output block and the paths that weights of each row mix into it."""

    i_out: int
    paths: tuple[Numbered, ...]
    pairs: int
    accumulate: bool


@dataclass(frozen=True)
class MixPart:
    """Output blocks whose pairs are mixed by weights of each row.

    Attributes:
        blocks: The output blocks.
        tables: Their pairs, block after block; ``out`` is a pair's place among the part's values.
    """

    d: TensorProductDescriptor
    blocks: tuple[Mixed, ...]
    tables: PairTables
    real_bytes: int
    file: str = MIXED_FILE
    swapped: bool = False
    chunks: int = 1
    has_double: bool = False
    sums: int = 1

    @classmethod
    def of(cls, d: TensorProductDescriptor, blocks: list[Mixed], real_bytes: int) -> MixPart:
        """Lay out the values of all pairs."""
        tables, at = PairTables(), 0
        for block in blocks:
            d3 = d.irreps_out[block.i_out].ir_dim
            for n in block.paths:
                count = pair_count(d, n)
                tables.add(d, n, [(at + q * d3, 1, 0) for q in range(count)])
                at += count * d3
        return cls(d, tuple(blocks), tables, real_bytes)

    @property
    def covered(self) -> int:
        """Components of the output that it sets."""
        return sum(self.d.irreps_out[b.i_out].dim for b in self.blocks if not b.accumulate)

    @property
    def values(self) -> int:
        """Components of all pairs."""
        return sum(b.pairs * self.d.irreps_out[b.i_out].ir_dim for b in self.blocks)

    @property
    def weights(self) -> int:
        """Weights of a row that the part reads."""
        return sum(b.pairs * self.d.irreps_out[b.i_out].mul for b in self.blocks)

    @property
    def team(self) -> int:
        """Threads that work on a row."""
        return BLOCK if self.weights >= LONG_ROW else WARP

    @property
    def gradients(self) -> int:
        """Components of the part's output."""
        return sum(self.d.irreps_out[b.i_out].dim for b in self.blocks)

    @property
    def tile(self) -> int:
        """Weights in shared memory at a time."""
        return max(
            96 * self.team // self.real_bytes,
            max(self.d.irreps_out[b.i_out].mul | 1 for b in self.blocks),
        )

    @property
    def bytes(self) -> int:
        """Shared memory of a row, backward; forward takes less or little more."""
        widest = max(self.d.irreps_out[b.i_out].ir_dim for b in self.blocks)
        backward = self.values + self.gradients + self.tile
        rows = dim_of(self.d.irreps_in1) + dim_of(self.d.irreps_in2) + self.values
        return self.real_bytes * (rows + max(backward, 2 * self.team * widest))

    @property
    def rows(self) -> int:
        """That a block takes at a time."""
        return teams_for(self.team, self.bytes)

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.team * self.rows

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.rows * self.bytes

    def residence(self, kind: str) -> Residence | None:
        """None: a block has its rows and ends."""
        return None

    def reached(self, operand: int) -> int:
        """Components of an input that play a part."""
        return len(self.tables.inputs(operand)[0])

    def header(self, kind: str, real: str) -> str:
        """The text of ``plan.cuh``."""
        blocks, at, first, gradients = [], 0, 0, 0
        for b in self.blocks:
            out = self.d.irreps_out[b.i_out]
            tile = min(b.pairs, max(1, self.tile // (out.mul | 1)))
            lanes = next(n for n in (8, 4, 2, 1) if n == 1 or n * tile * out.ir_dim <= self.team)
            blocks.append(
                (offset_of(self.d.irreps_out, b.i_out), out.mul, out.ir_dim, first, b.pairs, at, gradients, tile, lanes,
                 int(b.accumulate))
            )  # fmt: skip
            at, first, gradients = at + b.pairs * out.ir_dim, first + b.pairs, gradients + out.dim
        sizes = rows_of(self.d) | {
            "TEAM": self.team, "TEAMS": self.rows, "BLOCKS": len(blocks), "G_ITEMS": gradients,
            "W_TILE": self.tile, "MAX_D3": max(b[2] for b in blocks),
        }  # fmt: skip
        lines = [
            *self.tables.unrolled_header(real, self.team),
            *defines(sizes),
            "struct Block { int out, mul, d3, first, pairs, z, g, tile, lanes, accumulate; };",
            *segments((Segment(0, dim_of(self.d.irreps_out)),)),
            array("Block", "BLOCK", blocks),
        ]
        return "\n".join(lines) + "\n"


def segments(found: tuple[Segment, ...]) -> list[str]:
    """The matrices of a result."""
    return ["struct Segment { long long base, size; };", array("Segment", "SEGMENT", list(found))]


def teams_for(team: int, row_bytes: int) -> int:
    """Rows a block works on at a time: a block of one team, or as many warps as have room."""
    return max(1, min(BLOCK // team, SHARED_BYTES // max(row_bytes, 1)))
