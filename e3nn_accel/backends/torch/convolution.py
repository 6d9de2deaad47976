"""Gather, uvu product and sum at the receiver, as one matrix product for each path and block of edges.

For a path p, out[n,u,k] = sum over the edges e of n, sum_i (w_p[e,u] x[sender,u,i]) M_p[e,i,k] with
M_p[e,i,k] = sum_j C[i,j,k] y[e,j]: a matrix product over (edge, i). Edges are laid out in blocks of
their receiver (`blocks.Blocks`), so the sum over edges happens inside the product and the
messages [edges, irreps_out.dim], several times the size of everything else, are never made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from e3nn_accel.backends.torch.blocks import blocks_of
from e3nn_accel.descriptor import (
    ConvolutionDescriptor,
    ProductPath,
    TensorProductDescriptor,
)
from e3nn_accel.irreps import Irreps, dim_of
from e3nn_accel.layout import rows_ir_mul, split_weights, to_ir_mul
from e3nn_accel.ops.permute_rows import rows_to_slots
from e3nn_accel.plan import PlanContext

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def refusal(d: ConvolutionDescriptor) -> str:
    """Why this product can't be fused, or an empty string."""
    modes = {p.mode for p in d.product.paths} - {"uvu"}
    return (
        f"fused convolution is for uvu instructions, this product has {', '.join(sorted(modes))}"
        if modes
        else ""
    )


@dataclass(frozen=True)
class _Term:
    """One path and one channel v of the second input: its constants, and where its operands lie."""

    path: ProductPath
    weight: int | None
    v: int
    constants: torch.Tensor
    dims: tuple[int, int, int]


def _terms(d: TensorProductDescriptor, context: PlanContext) -> list[_Term]:
    terms, weights = [], 0
    for path in d.paths:
        if 0 in path.path_shape:
            continue
        c = path.coupling.dense() * path.path_weight
        first = torch.as_tensor(
            c.transpose(1, 0, 2).reshape(c.shape[1], -1), dtype=context.dtype, device=context.device
        )
        weight = weights if path.has_weight else None
        weights += path.has_weight
        for v in range(d.irreps_in2[path.i_in2].mul):
            terms.append(_Term(path, weight, v, first, (c.shape[0], c.shape[1], c.shape[2])))
    return terms


def plan(descriptor: ConvolutionDescriptor, context: PlanContext) -> tuple[str, Run]:
    """A function (node_feats, edge_attrs, weight, edge_index) -> [nodes, irreps_out.dim]."""
    d = descriptor.product
    terms = _terms(d, context)
    shapes: list[tuple[int, ...]] = [
        p.path_shape for p in d.paths if p.has_weight and 0 not in p.path_shape
    ]
    numel = sum(prod(shape) for shape in shapes)
    sizes1 = [block.dim for block in d.irreps_in1]
    sizes2 = [block.dim for block in d.irreps_in2]
    dim_out = dim_of(d.irreps_out)

    def run(
        x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, edge_index: torch.Tensor
    ) -> torch.Tensor:
        nodes = x.shape[0]
        blocks = blocks_of(edge_index, nodes)
        count, width = len(blocks.receiver), blocks.width
        slots = count * width
        xs = rows_ir_mul(x, d.irreps_in1).index_select(0, blocks.sender).split(sizes1, dim=-1)
        ys = rows_to_slots(y, blocks.source, blocks.slot).split(sizes2, dim=-1)
        if not d.shared_weights and numel:
            weight = rows_to_slots(weight, blocks.source, blocks.slot)
        ws = split_weights(weight, shapes)
        sums: list[torch.Tensor | None] = [None] * len(d.irreps_out)
        for term in terms:
            u, (i, j, k) = d.irreps_in1[term.path.i_in1].mul, term.dims
            y_v = (
                ys[term.path.i_in2].view(slots, -1, j)[:, term.v] if slots else y.new_zeros((0, j))
            )
            m = (y_v @ term.constants).view(count, width * i, k)
            messages = xs[term.path.i_in1].reshape(slots, i, u)
            if term.weight is not None:
                messages = messages * ws[term.weight][..., term.v].unsqueeze(-2)
            out = m.transpose(1, 2) @ messages.reshape(count, width * i, u)
            before = sums[term.path.i_out]
            sums[term.path.i_out] = out if before is None else before + out
        return _scatter(sums, d.irreps_out, blocks.receiver, nodes, dim_out, x)

    return f"{len(terms)} paths fused with gather and sum, edges in blocks of their receiver", run


def _scatter(
    sums: list[torch.Tensor | None],
    irreps: Irreps,
    receiver: torch.Tensor,
    nodes: int,
    dim: int,
    like: torch.Tensor,
) -> torch.Tensor:
    """Add the blocks [blocks, k, u] of each output to their receivers; [nodes, dim] mul_ir."""
    if dim == 0:
        return like.new_zeros((nodes, 0))
    pieces = []
    for block, out in zip(irreps, sums, strict=True):
        if block.mul == 0:
            continue
        piece = (
            like.new_zeros((len(receiver), block.dim))
            if out is None
            else to_ir_mul(out).reshape(-1, block.dim)
        )
        pieces.append(piece)
    rows = torch.cat(pieces, dim=-1) if len(pieces) != 1 else pieces[0]
    return like.new_zeros((nodes, dim)).index_add(0, receiver, rows)
