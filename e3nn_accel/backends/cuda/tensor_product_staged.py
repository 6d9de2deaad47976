"""The part of a tensor product whose weights, tens of KiB a row, are moved by bulk copies.

A `MixPart` that has all weights of a row, where the device has bulk copies and room for some rows of them:
``tensor_product_mixed_staged.cu``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from e3nn_accel.backends.cuda.convolution_schedule import BLOCK_RESERVE, STAGED_SHARED
from e3nn_accel.backends.cuda.tensor_product_parts import MixPart
from e3nn_accel.backends.cuda.tensor_product_plan import (
    Part,
    Residence,
    array,
    defines,
    offset_of,
    pair_count,
    rows_of,
)
from e3nn_accel.backends.cuda.tensor_product_warps import (
    THREADS,
    Cut,
    Output,
    Run,
    Shapes,
    cuts,
    gradient_room,
    tasks,
)
from e3nn_accel.irreps import dim_of
from e3nn_accel.launch import COPY_BYTES

STAGED_FILE = "tensor_product_mixed_staged.cu"
SHORTEST = 8 * 1024
"""Bytes of a row of weights from which it is copied whole: the barriers of a row take as long as some KiB."""
FEWEST_PAIRS = THREADS // 4
"""Backward a thread has pairs of its own."""
RESIDENCES = ((3, 2), (2, 3), (2, 2), (1, 3), (1, 2))
"""Blocks of a multiprocessor and slots of a ring, the best first: on an H200 warps counted for more than slots."""
STRUCTS = (
    "struct Block { int out, mul, d3, g, sums, run, run_end, vector, lanes, slices, accumulate; };",
    "struct Run { int weight, pairs, z; };",
    "struct Task { int warp, block, column, slice; };",
    "struct Shape { int mul, d3, vector, shift, first, end; };",
    "struct Pair { int weight, z, g; };",
)


@dataclass(frozen=True)
class StagedMixPart(MixPart):
    """As `MixPart`; with a kernel for second derivatives where there is room for the rows of tangents, too.

    Attributes:
        architecture: The compute capability that it is made for.
    """

    file: str = STAGED_FILE
    architecture: int = 0

    @property
    def rows(self) -> int:
        """That a block takes at a time."""
        return 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return THREADS

    @property
    def shared_bytes(self) -> int:
        """That the kernel declares: none, all of it comes with the launch."""
        return 0

    def residence(self, kind: str) -> Residence | None:
        """The blocks of a multiprocessor, and shared memory of each; None where there is no room."""
        room = STAGED_SHARED.get(self.architecture, 0)
        for blocks, slots in RESIDENCES:
            needed = self._bytes(kind, slots)
            if blocks * (needed + BLOCK_RESERVE) <= room:
                return Residence(blocks, slots, needed)
        return None

    def _bytes(self, kind: str, slots: int) -> int:
        """Shared memory of a block, as ``struct Stage`` lays it out, or a little more."""
        sets, gradients = 1 + (kind == "double"), kind != "forward"
        operands = sets * (dim_of(self.d.irreps_in1) + dim_of(self.d.irreps_in2))
        operands += gradients * sum(gradient_room(of, self.real_bytes) for of in self.outputs)
        numbers = slots * sets * self.d.weight_numel + 2 * operands
        numbers += (1 + gradients) * sets * self.values
        numbers += self._sums if kind != "backward" else 0
        return -(-(numbers * self.real_bytes + 8 * slots + 6 * COPY_BYTES) // 128) * 128

    @cached_property
    def outputs(self) -> list[Output]:
        """The output blocks with the runs of their pairs."""
        found, z = [], 0
        for b in self.blocks:
            out, runs = self.d.irreps_out[b.i_out], []
            for n in b.paths:
                count = pair_count(self.d, n)
                runs.append(Run(n.weight, count, z))
                z += count * out.ir_dim
            at = offset_of(self.d.irreps_out, b.i_out)
            found.append(Output(at, out.mul, out.ir_dim, int(b.accumulate), tuple(runs)))
        return found

    @cached_property
    def cuts(self) -> list[Cut]:
        """How warps go through each."""
        return cuts(self.outputs, self.real_bytes)

    @property
    def _sums(self) -> int:
        """Partial sums of a row."""
        both = zip(self.outputs, self.cuts, strict=True)
        return sum(of.dim * cut.slices for of, cut in both)

    def header(self, kind: str, real: str) -> str:
        """The text of ``plan.cuh``."""
        residence = self.residence(kind)
        assert residence is not None
        blocks, sums, g, run = [], 0, 0, 0
        for of, cut in zip(self.outputs, self.cuts, strict=True):
            end = run + len(of.runs)
            place = (of.at, of.mul, of.d3, g, sums, run, end)
            blocks.append((*place, cut.vector, cut.lanes, cut.slices, of.accumulate))
            sums, g, run = sums + of.dim * cut.slices, g + gradient_room(of, self.real_bytes), end
        dealt = tasks(self.outputs, self.cuts)
        shapes, pairs = Shapes.of(self.outputs, self.real_bytes)
        sizes = rows_of(self.d) | {
            "OUT_ROW": dim_of(self.d.irreps_out), "OUTPUTS": self.gradients, "SUMS": sums, "G_ROOM": g,
            "THREADS": THREADS, "RESIDENT": residence.blocks, "SLOTS": residence.slots,
            "DYNAMIC_SHARED": residence.shared, "BLOCKS": len(blocks), "TASKS": len(dealt), "SHAPES": len(shapes),
            "PAIRS": len(pairs),
        }  # fmt: skip
        tables: dict[str, list[Any]] = {
            "Block": blocks,
            "Run": [tuple(run) for of in self.outputs for run in of.runs],
            "Task": dealt,
            "Shape": shapes,
            "Pair": pairs,
        }
        lines = [*self.tables.unrolled_header(real, THREADS), *defines(sizes), *STRUCTS]
        lines += [array(name, name.upper(), rows) for name, rows in tables.items()]
        return "\n".join(lines) + "\n"


def staged(part: Part, architecture: int) -> Part:
    """The part with its weights moved by bulk copies, where that is possible and pays."""
    if type(part) is not MixPart or part.d.shared_weights:
        return part
    row = part.d.weight_numel * part.real_bytes
    moved = StagedMixPart(
        part.d, part.blocks, part.tables, part.real_bytes, architecture=architecture
    )
    if part.weights != part.d.weight_numel or row % COPY_BYTES or row < SHORTEST:
        return part
    if sum(of.pairs for of in moved.outputs) < FEWEST_PAIRS:
        return part
    if not all(moved.residence(kind) for kind in ("forward", "backward")):
        return part
    return replace(moved, has_double=moved.residence("double") is not None)
