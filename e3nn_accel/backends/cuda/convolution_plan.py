"""From a convolution's descriptor to the tables that ``kernels/convolution.cu`` is compiled with.

A kernel keeps the outputs of one channel in registers, so products with many paths are cut into
groups of paths whose outputs fit; each group is a kernel of its own over the same edges, which reads the
features that its paths take and writes their gradients edge by edge. So paths are cut in the order of their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np

from e3nn_accel.backends.cuda.convolution_schedule import Schedule, padded
from e3nn_accel.descriptor import ProductPath, TensorProductDescriptor
from e3nn_accel.irreps import Irreps, dim_of, offsets_of

OUTPUT_REGISTERS = 80
"""32-bit registers that the outputs of one group may take; twice that in the second derivative."""
SECOND_INPUT_LIMIT = 32
"""Components of the second input a group may use: a warp reduces that many sums at once."""


@dataclass(frozen=True)
class Term:
    """One path and one channel of the second input, in the group's own numbering of components."""

    x: int
    d1: int
    out: int
    d3: int
    m: int
    weight: int
    stride: int
    mul: int


@dataclass
class Group:
    """Paths that one kernel computes, as tables.

    Attributes:
        terms: The paths.
        inputs, outputs: (offset, stride, mul) of each component of a channel in its mul_ir row.
        second: Offset in the row of the second input of each component that is used.
        entries: (component of the second input, value) pairs of each non-zero M[i,k].
        index: For each term the entry of every (i, k), -1 where M is zero.
    """

    terms: list[Term] = field(default_factory=list)
    inputs: list[tuple[int, int, int]] = field(default_factory=list)
    outputs: list[tuple[int, int, int]] = field(default_factory=list)
    second: list[int] = field(default_factory=list)
    entries: list[list[tuple[int, float]]] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    _blocks: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def block(self, kind: str, i: int, v: int, rows: list[tuple[int, int, int]]) -> int:
        """Number of the first component of a block, added at its first use."""
        key = (kind, i, v)
        if key not in self._blocks and kind == "second":
            self._blocks[key] = len(self.second)
            self.second.extend(row[0] for row in rows)
        elif key not in self._blocks:
            table = self.inputs if kind == "in" else self.outputs
            self._blocks[key] = len(table)
            table.extend(rows)
        return self._blocks[key]


def groups_of(d: TensorProductDescriptor, real_bytes: int) -> list[Group]:
    """Cut the paths into groups; those with the same output stay together, those of an input as far as may be."""
    groups = _cut(d, list(_paths_by_output(d)), real_bytes)
    if len(groups) == 1:
        return groups
    by_input = sorted(_paths_by_output(d), key=lambda paths: min(p.i_in1 for p, _ in paths))
    return _cut(d, by_input, real_bytes)


def _cut(
    d: TensorProductDescriptor, outputs: list[list[tuple[ProductPath, int]]], real_bytes: int
) -> list[Group]:
    """Fill one group after the other."""
    limit = OUTPUT_REGISTERS * 4 // real_bytes
    groups: list[Group] = []
    for paths in outputs:
        width = d.irreps_out[paths[0][0].i_out].ir_dim
        second = len({(p.i_in2, v) for p, _ in paths for v in range(d.irreps_in2[p.i_in2].mul)})
        group = groups[-1] if groups else None
        if (
            group is None
            or len(group.outputs) + width > limit
            or len(group.second) + second > SECOND_INPUT_LIMIT
        ):
            group = Group()
            groups.append(group)
        for path, weight in paths:
            _add(group, d, path, weight)
    return groups


def _paths_by_output(d: TensorProductDescriptor) -> Iterator[list[tuple[ProductPath, int]]]:
    """Paths with their weights' offset (-1 without weights), gathered by output block."""
    sizes = [prod(p.path_shape) if p.has_weight else 0 for p in d.paths]
    numbered = [
        (p, o if p.has_weight else -1) for p, o in zip(d.paths, offsets_of(sizes), strict=True)
    ]
    for o in range(len(d.irreps_out)):
        paths = [(p, weight) for p, weight in numbered if p.i_out == o and 0 not in p.path_shape]
        if paths:
            yield paths


def _add(group: Group, d: TensorProductDescriptor, path: ProductPath, weight: int) -> None:
    c = path.coupling.dense() * path.path_weight
    mul, mul2 = d.irreps_in1[path.i_in1].mul, d.irreps_in2[path.i_in2].mul
    x = group.block("in", path.i_in1, 0, _rows(d.irreps_in1, path.i_in1))
    out = group.block("out", path.i_out, 0, _rows(d.irreps_out, path.i_out))
    for v in range(mul2):
        width = d.irreps_in2[path.i_in2].ir_dim
        offset = _offset(d.irreps_in2, path.i_in2) + v * width
        second = group.block("second", path.i_in2, v, [(offset + j, 1, 1) for j in range(width)])
        stride = mul2 if weight >= 0 else 0
        group.terms.append(
            Term(
                x,
                c.shape[0],
                out,
                c.shape[2],
                len(group.index),
                weight + v if weight >= 0 else -1,
                stride,
                mul,
            )
        )
        for i in range(c.shape[0]):
            for k in range(c.shape[2]):
                nonzero = np.nonzero(c[i, :, k])[0].tolist()
                group.index.append(len(group.entries) if nonzero else -1)
                if nonzero:
                    group.entries.append([(second + j, float(c[i, j, k])) for j in nonzero])


def _offset(irreps: Irreps, block: int) -> int:
    return sum(b.dim for b in irreps[:block])


def _rows(irreps: Irreps, block: int) -> list[tuple[int, int, int]]:
    """(offset, stride, mul) of each component: channel u lies at offset + u * stride of a mul_ir row."""
    b = irreps[block]
    return [(_offset(irreps, block) + component, b.ir_dim, b.mul) for component in range(b.ir_dim)]


def header(d: TensorProductDescriptor, group: Group, plan: Schedule, real: str) -> str:
    """The text of ``plan.cuh``."""
    widest_term = max(len(entry) for entry in group.entries) if group.entries else 1
    full = all(term.mul == plan.threads * plan.chunks for term in group.terms)
    dx_offsets, dx_row = _ir_mul_offsets(group)
    sizes = {
        "THREADS": plan.threads, "WARPS": plan.threads // 32, "EDGES": plan.edges, "BLOCKS": plan.blocks,
        "FULL": int(full), "TERMS": len(group.terms), "X_COMPONENTS": len(group.inputs),
        "Y_COMPONENTS": len(group.second), "Y_PADDED": padded(len(group.second)),
        "OUT_COMPONENTS": len(group.outputs), "M_ENTRIES": len(group.entries),
        "M_PADDED": -(-len(group.entries) // 4) * 4 or 4, "M_TERMS": widest_term,
        "MAX_D1": max(term.d1 for term in group.terms),
        "X_ROW": dim_of(d.irreps_in1), "Y_ROW": dim_of(d.irreps_in2), "OUT_ROW_SIZE": dim_of(d.irreps_out),
        "WEIGHT_ROW": d.weight_numel, "DX_ROW": dx_row, "SLOTS": plan.slots, "DYNAMIC_SHARED": plan.shared,
        "OUTPUTS_STAGED": int(_fits_the_ring(d, plan, real)),
    }  # fmt: skip
    padded_entries = [
        entry + [(0, 0.0)] * (widest_term - len(entry)) for entry in group.entries
    ] or [[(0, 0.0)]]
    terms = [(t.x, t.d1, t.out, t.d3, t.m, t.weight, t.stride, t.mul) for t in group.terms]
    lines = [f"#define REAL {real}", *(f"#define {name} {value}" for name, value in sizes.items())]
    lines += [
        "struct Term { int x, d1, out, d3, m, weight, stride, mul; };",
        "struct Row { int offset, stride, mul; };",
        _array("Term", "TERM", terms),
        _array("Row", "IN_ROW", group.inputs),
        _array("Row", "OUT_ROW", group.outputs),
        _array("int", "Y_AT", group.second),
        _array("int", "M_INDEX", group.index),
        _array("int", "DX_OFFSET", dx_offsets),
        _array(
            "int", "M_Y", [[j for j, _ in entry] for entry in padded_entries], f"[{widest_term}]"
        ),
        _array(
            real,
            "M_VALUE",
            [[repr(value) for _, value in entry] for entry in padded_entries],
            f"[{widest_term}]",
        ),
    ]
    return "\n".join(lines) + "\n"


def _fits_the_ring(d: TensorProductDescriptor, plan: Schedule, real: str) -> bool:
    """Whether a row of outputs can leave through the slots of one kernel."""
    size = 4 if real == "float" else 8
    out = dim_of(d.irreps_out) * size
    ring = plan.slots * (dim_of(d.irreps_in1) + d.weight_numel) * size
    return out % 16 == 0 and out <= ring


def _ir_mul_offsets(group: Group) -> tuple[list[int], int]:
    """Where each input component starts in an ir_mul row of the group's inputs, and the row's size."""
    muls = [mul for _, _, mul in group.inputs]
    return offsets_of(muls), sum(muls)


def _array(kind: str, name: str, values: list, inner: str = "") -> str:  # type: ignore[type-arg]
    def text(value: object) -> str:
        return (
            "{" + ", ".join(map(text, value)) + "}"
            if isinstance(value, list | tuple)
            else str(value)
        )

    return f"__device__ constexpr {kind} {name}[]{inner} = {text(values)};"
