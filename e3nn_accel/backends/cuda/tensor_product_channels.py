"""The parts of a tensor product that go channel by channel, for ``tensor_product_channels.cu``."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from e3nn_accel.backends.cuda.tensor_product_plan import (
    SHARED_BYTES,
    Numbered,
    Residence,
    array,
    defines,
    offset_of,
)
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.irreps import dim_of

FILE = "tensor_product_channels.cu"
NARROWEST = 8
"""Channels from which a thread a channel pays; fewer leave most of a warp idle."""
TERM_WORDS, INPUT_WORDS, ENTRIES, SECOND = 28, 40, 512, 32
"""Bounds of a group: 32-bit words of a row's weights and features in registers, non-zeros of M
(shared memory, code), components of the second input (a warp reduces at most 32 sums at once)."""
OTHER_REGISTERS = {(True, 4): 40, (True, 8): 40, (False, 4): 44, (False, 8): 24}
"""Of a thread besides what it holds, forward or not, by the bytes of a number. Fitted on an H100: float64
gains more by occupancy than it loses by some spills."""
ROWS = 16
REGISTER_FILE = 65536


@dataclass(frozen=True)
class Term:
    """One path and one channel of the second input."""

    x: int
    d1: int
    m: int
    weight: int
    stride: int
    mul: int


@dataclass
class ChannelPart:
    """Output blocks that one kernel computes, as tables.

    Attributes:
        d: The product, with its inputs exchanged where ``swapped``.
        inputs: (offset, d, mul, first register) of each input block.
        outputs: (offset, d, mul, first term, end) of each output block.
        second: Offset in the row of the second input of each component that is used.
        entries: (component of the second input, value) pairs of each non-zero M[i,k].
        index: For each term the entry of every (i, k), -1 where M is zero.
    """

    d: TensorProductDescriptor
    swapped: bool
    real_bytes: int
    terms: list[Term] = field(default_factory=list)
    inputs: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    outputs: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    second: dict[int, int] = field(default_factory=dict)
    entries: list[list[tuple[int, float]]] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    file: str = FILE
    has_double: bool = True

    def add(self, i_out: int, paths: list[Numbered]) -> None:
        """Append an output block."""
        first = len(self.terms)
        for n in paths:
            self._add_path(n)
        out = self.d.irreps_out[i_out]
        self.outputs.append(
            (offset_of(self.d.irreps_out, i_out), out.ir_dim, out.mul, first, len(self.terms))
        )

    def _add_path(self, n: Numbered) -> None:
        p, d = n.path, self.d
        c = p.coupling.dense() * p.path_weight
        a, b = d.irreps_in1[p.i_in1], d.irreps_in2[p.i_in2]
        if p.i_in1 not in self.inputs:
            self.inputs[p.i_in1] = (
                offset_of(d.irreps_in1, p.i_in1),
                a.ir_dim,
                a.mul,
                self.x_components,
            )
        for v in range(b.mul):
            start = offset_of(d.irreps_in2, p.i_in2) + v * b.ir_dim
            second = [self.second.setdefault(start + j, len(self.second)) for j in range(b.ir_dim)]
            weight = n.weight + v if n.weight >= 0 else -1
            self.terms.append(
                Term(self.inputs[p.i_in1][3], a.ir_dim, len(self.index), weight, b.mul, a.mul)
            )
            for i, k in np.ndindex(c.shape[0], c.shape[2]):
                nonzero = np.nonzero(c[i, :, k])[0].tolist()
                self.index.append(len(self.entries) if nonzero else -1)
                if nonzero:
                    self.entries.append([(second[j], float(c[i, j, k])) for j in nonzero])

    @property
    def x_components(self) -> int:
        """Components of the first input that a thread holds."""
        return sum(d for _, d, _, _ in self.inputs.values())

    @property
    def fits(self) -> bool:
        """Whether registers and code are in bounds."""
        words = self.real_bytes // 4
        return (
            len(self.terms) * words <= TERM_WORDS
            and self.x_components * words <= INPUT_WORDS
            and len(self.entries) <= ENTRIES
            and len(self.second) <= SECOND
            and self._shared_bytes(1) <= SHARED_BYTES
        )

    @property
    def covered(self) -> int:
        """Components of the output that it writes."""
        return sum(d * mul for _, d, mul, _, _ in self.outputs)

    @property
    def widest(self) -> int:
        """Channels."""
        return max(mul for _, _, mul, _, _ in self.outputs)

    @property
    def threads(self) -> int:
        """Of a block."""
        return min(128, -(-self.widest // 32) * 32)

    @property
    def chunks(self) -> int:
        """Blocks that share a row; each has its own dy."""
        return -(-self.widest // self.threads)

    @property
    def rows(self) -> int:
        """That a block takes at a time."""
        return next(
            (n for n in (ROWS, ROWS // 2, ROWS // 4) if self._shared_bytes(n) <= SHARED_BYTES), 1
        )

    @property
    def sums(self) -> int:
        """Partial sums of dw that a block makes where weights are shared."""
        return 1

    @property
    def largest(self) -> int:
        """Components of the largest irrep."""
        return max(d for _, d, *_ in [*self.inputs.values(), *self.outputs])

    def _shared_bytes(self, rows: int) -> int:
        """Of the second derivative, which needs M twice."""
        warps = self.threads // 32
        row = 2 * (len(self.second) + len(self.entries) + 4) + warps * padded(len(self.second))
        return self.real_bytes * (rows * row + warps * 32 * self.largest)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self._shared_bytes(self.rows)

    def residence(self, kind: str) -> Residence | None:
        """None: a block has its rows and ends."""
        return None

    def reached(self, operand: int) -> int:
        """Components of an input that play a part."""
        if operand == 1:
            return len(self.second)
        return sum(d * mul for _, d, mul, _ in self.inputs.values())

    def resident(self, kind: str) -> int:
        """Blocks that should fit one multiprocessor, by an estimate of a thread's registers."""
        held = 2 * (len(self.terms) + self.x_components) + self.largest
        if kind != "forward":
            held += self.largest + self.x_components + padded(len(self.second))
        if kind == "double":
            held += 2 * self.largest
        registers = (
            int(1.15 * (self.real_bytes // 4) * held)
            + OTHER_REGISTERS[kind == "forward", self.real_bytes]
        )
        return max(1, min(REGISTER_FILE // (self.threads * registers), 1536 // self.threads, 16))

    def header(self, kind: str, real: str) -> str:
        """The text of ``plan.cuh``."""
        terms = [(t.x, t.d1, t.m, t.weight, t.stride, t.mul) for t in self.terms]
        entries = self.entries or [[(0, 0.0)]]
        longest = max(map(len, entries))
        even = [entry + [(0, 0.0)] * (longest - len(entry)) for entry in entries]
        muls = [mul for _, _, mul, _ in self.inputs.values()] + [
            mul for _, _, mul, _, _ in self.outputs
        ]
        sizes = {
            "X_ROW": dim_of(self.d.irreps_in1), "Y_ROW": dim_of(self.d.irreps_in2),
            "OUT_ROW": dim_of(self.d.irreps_out),
            "WEIGHT_ROW": self.d.weight_numel, "SHARED_WEIGHTS": int(self.d.shared_weights),
            "THREADS": self.threads, "ROWS": self.rows, "RESIDENT": self.resident(kind),
            "FULL": int(set(muls) == {self.threads * self.chunks}),
            "TERMS": len(terms), "INPUTS": len(self.inputs), "OUTPUTS": len(self.outputs), "MAX_D": self.largest,
            "X_COMPONENTS": self.x_components, "Y_COMPONENTS": len(self.second), "Y_PADDED": padded(len(self.second)),
            "MAX_TERMS": max(end - first for *_, first, end in self.outputs),
            "M_ENTRIES": len(entries), "M_PADDED": -(-len(entries) // 4) * 4, "M_TERMS": longest,
        }  # fmt: skip
        lines = [
            f"#define REAL {real}",
            *defines(sizes),
            "struct Term { int x, d1, m, weight, stride, mul; };",
            "struct Input { int offset, d, mul, first; };",
            "struct Output { int offset, d, mul, first, end; };",
            array("Term", "TERM", terms),
            "struct Component { int offset, stride, mul; };",
            array(
                "Component",
                "COMPONENT",
                [(at + i, d, mul) for at, d, mul, _ in self.inputs.values() for i in range(d)],
            ),
            array("Input", "INPUT", list(self.inputs.values())),
            array("Output", "OUTPUT", self.outputs),
            array("int", "Y_AT", list(self.second)),
            array("int", "M_INDEX", self.index),
            array("int", "M_Y", [[j for j, _ in entry] for entry in even], f"[{longest}]"),
            array(
                real,
                "M_VALUE",
                [[repr(value) for _, value in entry] for entry in even],
                f"[{longest}]",
            ),
        ]
        return "\n".join(lines) + "\n"


def padded(components: int) -> int:
    """The power of two, at most 32, that a warp's reduction works on."""
    return 1 << max(components - 1, 0).bit_length()
