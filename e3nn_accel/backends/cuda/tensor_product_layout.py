"""What the kernels of a tensor product write, and how shared weights make rows of the output of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e3nn_accel.backends.cuda.tensor_product_plan import (
    Block,
    Numbered,
    Segment,
    channel_of,
    offset_of,
    pair_count,
    pairs_of,
)
from e3nn_accel.backends.cuda.tensor_product_tables import PairTables
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.irreps import dim_of


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

    def element(self, paths: list[Numbered], blocks: tuple[Block, ...]) -> PairTables:
        """Pairs that the kernels write as they are: paths without mixing, and those mixed later."""
        d, tables = self.d, PairTables()
        for n in paths:
            p, start = n.path, offset_of(d.irreps_out, n.path.i_out)
            mul1, mul2, d3 = (
                d.irreps_in1[p.i_in1].mul,
                d.irreps_in2[p.i_in2].mul,
                d.irreps_out[p.i_out].ir_dim,
            )
            pairs = enumerate(pairs_of(p.mode, mul1, mul2))
            tables.add(
                d, n, [(start + channel_of(p.mode, u, v, q) * d3, 1, 0) for q, (u, v) in pairs]
            )
        for block in blocks:
            first = 0
            for n in block.paths:
                count = pair_count(d, n)
                unweighted = Numbered(n.path, -1)
                tables.add(
                    d, unweighted, [(first + q, block.pairs, block.segment) for q in range(count)]
                )
                first += count
        return tables

    def mixed(self, flat: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
        """Output rows [rows, dim_out] from the kernels' matrices and flat weights [weights]."""
        d = self.d
        matrices = flat.split([rows * s.size for s in self.segments])
        sums: list[torch.Tensor | None] = [None] * len(d.irreps_out)
        if self.plain:
            whole = (
                matrices[0]
                .view(rows, dim_of(d.irreps_out))
                .split([block.dim for block in d.irreps_out], dim=1)
            )
            sums = [whole[o] if o in self.plain else None for o in range(len(whole))]
        for block in self.blocks:
            out = d.irreps_out[block.i_out]
            z = matrices[block.segment].view(rows * out.ir_dim, block.pairs)
            w = [
                weight[n.weight : n.weight + pair_count(d, n) * out.mul].view(-1, out.mul)
                for n in block.paths
            ]
            product = (z @ (w[0] if len(w) == 1 else torch.cat(w))).view(rows, out.ir_dim, out.mul)
            turned = product.transpose(1, 2).reshape(rows, out.dim)
            before = sums[block.i_out]
            sums[block.i_out] = turned if before is None else before + turned
        found = [
            flat.new_zeros((rows, block.dim)) if s is None else s
            for block, s in zip(d.irreps_out, sums, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)
