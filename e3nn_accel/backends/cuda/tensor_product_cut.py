"""Cuts a tensor product by its output blocks into parts, each for one kernel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from e3nn_accel.backends.cuda.tensor_product_channels import NARROWEST, ChannelPart
from e3nn_accel.backends.cuda.tensor_product_layout import Layout
from e3nn_accel.backends.cuda.tensor_product_parts import Z_BYTES, ElementPart, Mixed, MixPart
from e3nn_accel.backends.cuda.tensor_product_plan import PAIR_LIMIT, Numbered, Part, pair_count
from e3nn_accel.backends.cuda.tensor_product_tables import PairTables
from e3nn_accel.descriptor import Coupling, TensorProductDescriptor


def parts_of(
    d: TensorProductDescriptor, layout: Layout, paths: list[Numbered], real_bytes: int
) -> list[Part]:
    """The kernels of a product; a part that adds to an output block comes after the one that sets it."""
    later = {n for block in layout.blocks for n in block.paths}
    by_output: dict[int, list[Numbered]] = {}
    for n in paths:
        if n not in later:
            by_output.setdefault(n.path.i_out, []).append(n)
    parts: list[Part] = []
    taken: set[int] = set()
    if not layout.blocks:
        channels, taken = channel_parts(d, by_output, real_bytes)
        parts += channels
    left = [n for i_out, group in by_output.items() if i_out not in taken for n in group]
    single = [n for n in left if not n.mixes]
    parts += [
        ElementPart(d, tables, layout.segments, real_bytes) for tables in _cut(d, layout, single)
    ]
    return [*parts, *mix_parts(d, [n for n in left if n.mixes], single, real_bytes)]


def _cut(d: TensorProductDescriptor, layout: Layout, single: list[Numbered]) -> list[PairTables]:
    """Tables of at most `PAIR_LIMIT` pairs, but for what goes to one output block."""
    outputs = dict.fromkeys(n.path.i_out for n in single)
    pieces = [layout.element([n for n in single if n.path.i_out == o], ()) for o in outputs]
    pieces += [layout.element([], (block,)) for block in layout.blocks]
    tables: list[PairTables] = []
    for piece in pieces:
        if not tables or len(tables[-1].pairs) + len(piece.pairs) > PAIR_LIMIT:
            tables.append(PairTables())
        tables[-1].extend(piece)
    return tables


def orientation(d: TensorProductDescriptor, n: Numbered) -> bool | None:
    """Whether a path goes by the channels of the second input (the first: False); None if neither."""
    mul1, mul2 = d.irreps_in1[n.path.i_in1].mul, d.irreps_in2[n.path.i_in2].mul
    if n.path.mode == "uvu" or (n.path.mode == "uvuv" and mul2 == 1):
        return False if mul1 >= NARROWEST else None
    if n.path.mode in ("uvv", "uvuv") and mul1 == 1:
        return True if mul2 >= NARROWEST else None
    return None


def channel_parts(
    d: TensorProductDescriptor, blocks: dict[int, list[Numbered]], real_bytes: int
) -> tuple[list[ChannelPart], set[int]]:
    """Parts for the output blocks that go channel by channel, and which those are."""
    parts: list[ChannelPart] = []
    taken: set[int] = set()
    exchanged = _exchanged(d)
    for swapped, product in ((False, d), (True, exchanged)):
        part: ChannelPart | None = None
        for i_out, paths in blocks.items():
            if {orientation(d, n) for n in paths} != {swapped}:
                continue
            turned = [_turned(n) for n in paths] if swapped else paths
            alone = ChannelPart(product, swapped, real_bytes)
            alone.add(i_out, turned)
            if not alone.fits:
                continue
            taken.add(i_out)
            if part is None or not _joined(part, i_out, turned):
                parts.append(part := alone)
    return parts, taken


def _joined(part: ChannelPart, i_out: int, paths: list[Numbered]) -> bool:
    """Append a block where the part stays in bounds."""
    tried = replace(
        part, terms=[*part.terms], inputs=dict(part.inputs), outputs=[*part.outputs],
        second=dict(part.second), entries=[*part.entries], index=[*part.index],
    )  # fmt: skip
    tried.add(i_out, paths)
    if not tried.fits:
        return False
    for name in ("terms", "inputs", "outputs", "second", "entries", "index"):
        setattr(part, name, getattr(tried, name))
    return True


def _exchanged(d: TensorProductDescriptor) -> TensorProductDescriptor:
    return replace(d, irreps_in1=d.irreps_in2, irreps_in2=d.irreps_in1)


def _turned(n: Numbered) -> Numbered:
    p = n.path
    coupling = Coupling.of(np.ascontiguousarray(p.coupling.dense().transpose(1, 0, 2)))
    return Numbered(
        replace(p, i_in1=p.i_in2, i_in2=p.i_in1, mode="uvu", coupling=coupling), n.weight
    )


def mix_parts(
    d: TensorProductDescriptor, paths: list[Numbered], before: list[Numbered], real_bytes: int
) -> list[MixPart]:
    """As many paths a part as shared memory holds the values of; ``before``: what has set its outputs."""
    parts: list[list[Mixed]] = []
    is_set = {n.path.i_out for n in before}
    room = 0
    for n in sorted(paths, key=lambda n: n.path.i_out):
        o, pairs = n.path.i_out, pair_count(d, n)
        size = pairs * d.irreps_out[o].ir_dim * real_bytes
        if not parts or size > room:
            parts.append([])
            room = Z_BYTES
        part, room = parts[-1], room - size
        if part and part[-1].i_out == o:
            last = part[-1]
            part[-1] = replace(last, paths=(*last.paths, n), pairs=last.pairs + pairs)
        else:
            part.append(Mixed(o, (n,), pairs, o in is_set))
        is_set.add(o)
    return [MixPart.of(d, part, real_bytes) for part in parts]
