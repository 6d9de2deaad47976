"""Tensor products edge by edge, in every mode: a plan from kernels for its parts.

Weights that all rows share and that mix channels are left to a matrix product: the kernels make the
pairs' values z [rows * (2l+1), pairs] of every output block, torch multiplies them with W [pairs, mul].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e3nn_accel.backends.cuda.tensor_product_channels import channel_parts
from e3nn_accel.backends.cuda.tensor_product_launch import ProductLaunch
from e3nn_accel.backends.cuda.tensor_product_parts import ElementPart, Mixed, mix_parts, pair_count
from e3nn_accel.backends.cuda.tensor_product_plan import (
    PAIR_LIMIT,
    SHARED_BYTES,
    Block,
    Numbered,
    PairTables,
    Part,
    Segment,
    channel_of,
    numbered,
    offset_of,
    pairs_of,
)
from e3nn_accel.backends.torch import species_linear
from e3nn_accel.descriptor import TensorProductDescriptor, dim_of
from e3nn_accel.layout import flat_rows
from e3nn_accel.ops.tensor_product import tensor_product
from e3nn_accel.plan import Plan, PlanContext, Refusal

BYTES = {torch.float32: 4, torch.float64: 8}


def plan(d: TensorProductDescriptor, context: PlanContext) -> Plan | Refusal:
    """Kernels for one product, compiled at their first use; or why there are none."""
    if species_linear.applies(d):
        return Refusal("cuda", "species-indexed linear, which the torch backend sorts by species")
    paths = numbered(d)
    if not paths:
        return Refusal("cuda", "no path contributes anything")
    pairs = sum(pair_count(d, n) for n in paths if n.path.mode != "uvu")
    if pairs > PAIR_LIMIT:
        return Refusal("cuda", f"{pairs} pairs of channels, the kernels' tables hold {PAIR_LIMIT}")
    layout = Layout.of(d, paths)
    parts = parts_of(d, layout, paths, BYTES[context.dtype])
    pairs = sum(len(part.tables.pairs) for part in parts if isinstance(part, ElementPart))
    if pairs > PAIR_LIMIT:
        return Refusal("cuda", f"{pairs} pairs of channels, the kernels' tables hold {PAIR_LIMIT}")
    needed = max(part.shared_bytes for part in parts)
    if needed > SHARED_BYTES:
        return Refusal("cuda", f"a row needs {needed} bytes of shared memory, there are {SHARED_BYTES}")
    launch = ProductLaunch(d, tuple(parts), layout.segments, context)

    def run(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        others = () if d.shared_weights else (weight.shape[:-1],)
        leading = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1], *others)
        x, y = flat_rows(x, leading, dim_of(d.irreps_in1)), flat_rows(y, leading, dim_of(d.irreps_in2))
        w = weight.reshape(-1) if d.shared_weights else flat_rows(weight, leading, weight.shape[-1])
        # weights that matrices alone use are no operand of the kernels
        out = tensor_product(x, y, w if launch.weighted else w.detach(), launch)
        if layout.blocks:
            out = layout.mixed(out, w, x.shape[0])
        return out.reshape(*leading, dim_of(d.irreps_out))

    return Plan("cuda", d, _strategy(parts, layout), run, tuple(launch.programs()))


def _strategy(parts: list[Part], layout: Layout) -> str:
    names = {"ChannelPart": "a thread a channel", "ElementPart": "pairs of channels", "MixPart": "weights of rows"}
    kinds = list(dict.fromkeys(names[type(part).__name__] for part in parts))
    count = f", {len(parts)} kernels" if len(parts) > 1 else ""
    return "row kernel, " + ", ".join(kinds) + count + (", matrix products" if layout.blocks else "")


@dataclass(frozen=True)
class Layout:
    """What the kernels write: rows of the output, or several matrices where shared weights mix.

    Attributes:
        segments: The first has rows of the output, if any path goes there as it is.
        blocks: What is multiplied with weights afterwards.
    """

    d: TensorProductDescriptor
    segments: tuple[Segment, ...]
    blocks: tuple[Block, ...]
    plain: frozenset[int]

    @classmethod
    def of(cls, d: TensorProductDescriptor, paths: list[Numbered]) -> Layout:
        """From the paths that compute anything."""
        mixed = [n for n in paths if n.mixes and d.shared_weights]
        plain = frozenset(n.path.i_out for n in paths if n not in mixed)
        segments, blocks = [], []
        base = 0
        if plain:
            segments.append(Segment(0, base := dim_of(d.irreps_out)))
        for i_out in dict.fromkeys(n.path.i_out for n in mixed):
            here = tuple(n for n in mixed if n.path.i_out == i_out)
            pairs = sum(pair_count(d, n) for n in here)
            size = pairs * d.irreps_out[i_out].ir_dim
            blocks.append(Block(i_out, len(segments), here, pairs))
            segments.append(Segment(base, size))
            base += size
        return cls(d, tuple(segments), tuple(blocks), plain)

    def element(self, paths: list[Numbered]) -> PairTables:
        """Pairs that the kernels write as they are: paths without mixing, and those mixed later."""
        d, tables = self.d, PairTables()
        for n in paths:
            p, start = n.path, offset_of(d.irreps_out, n.path.i_out)
            mul1, mul2, d3 = d.irreps_in1[p.i_in1].mul, d.irreps_in2[p.i_in2].mul, d.irreps_out[p.i_out].ir_dim
            pairs = enumerate(pairs_of(p.mode, mul1, mul2))
            tables.add(d, n, [(start + channel_of(p.mode, u, v, q) * d3, 1, 0) for q, (u, v) in pairs])
        for block in self.blocks:
            first = 0
            for n in block.paths:
                count = pair_count(d, n)
                unweighted = Numbered(n.path, -1)
                tables.add(d, unweighted, [(first + q, block.pairs, block.segment) for q in range(count)])
                first += count
        return tables

    def mixed(self, flat: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
        """Output rows [rows, dim_out] from the kernels' matrices and flat weights [weights]."""
        d = self.d
        matrices = flat.split([rows * s.size for s in self.segments])
        sums: list[torch.Tensor | None] = [None] * len(d.irreps_out)
        if self.plain:
            whole = matrices[0].view(rows, -1).split([block.dim for block in d.irreps_out], dim=1)
            sums = [whole[o] if o in self.plain else None for o in range(len(whole))]
        for block in self.blocks:
            out = d.irreps_out[block.i_out]
            z = matrices[block.segment].view(rows * out.ir_dim, block.pairs)
            w = [weight[n.weight : n.weight + pair_count(d, n) * out.mul].view(-1, out.mul) for n in block.paths]
            product = (z @ (w[0] if len(w) == 1 else torch.cat(w))).view(rows, out.ir_dim, out.mul)
            turned = product.transpose(1, 2).reshape(rows, out.dim)
            before = sums[block.i_out]
            sums[block.i_out] = turned if before is None else before + turned
        found = [
            flat.new_zeros((rows, block.dim)) if s is None else s
            for block, s in zip(d.irreps_out, sums, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


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
    if single or layout.blocks:
        parts.append(ElementPart(d, layout.element(single), layout.segments, real_bytes))
    blocks = []
    for i_out in dict.fromkeys(n.path.i_out for n in left if n.mixes):
        here = tuple(n for n in left if n.mixes and n.path.i_out == i_out)
        shared_with = any(n.path.i_out == i_out for n in single)
        blocks.append(Mixed(i_out, here, sum(pair_count(d, n) for n in here), shared_with))
    return [*parts, *mix_parts(d, blocks, real_bytes)]
