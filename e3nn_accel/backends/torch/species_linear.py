"""The species-indexed linear: a fully connected product with one-hot scalars picks a matrix for each row.

MACE multiplies node features with ``node_attrs``, which is one-hot over (up to 89) species. Stock
e3nn multiplies with all species; here rows are sorted by species and each group meets its own
matrix. One-hotness is looked at for every call, never assumed: rows with a single non-zero of any
value are exact, anything else (and a wanted gradient of the scalars) takes the general product.

With few atoms the time goes into the number of torch calls, not into what they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from e3nn_accel.backends.torch import tensor_product
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.irreps import MulIr, dim_of
from e3nn_accel.layout import split_weights
from e3nn_accel.ops.indexed_linear import indexed_linear
from e3nn_accel.plan import PlanContext
from e3nn_accel.species import Groups, Species, species_of

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Feed:
    """One path.

    Attributes:
        number: Among the paths that have weights.
        i_in: The input block it reads.
        offset: Where its matrices begin in the weights.
        shape: Of its matrices together, [in, species, out].
        scale: A constant factor.
    """

    number: int
    i_in: int
    offset: int
    shape: tuple[int, int, int]
    scale: float


@dataclass(frozen=True)
class _Layout:
    """Where everything lies.

    Attributes:
        blocks: (index, first column, block) of the input blocks that a path reads.
        outputs: Every block of the result with its paths.
        shapes: Of the weights of every path.
    """

    blocks: tuple[tuple[int, int, MulIr], ...]
    outputs: tuple[tuple[MulIr, tuple[_Feed, ...]], ...]
    shapes: list[tuple[int, ...]]


def applies(d: TensorProductDescriptor) -> bool:
    """Whether all paths are uvw with shared weights over the same two or more scalars."""
    return (
        d.shared_weights
        and len(d.paths) > 0
        and len(d.irreps_in2) == 1
        and d.irreps_in2[0].l == 0
        and d.irreps_in2[0].mul > 1
        and all(p.mode == "uvw" and p.has_weight for p in d.paths)
    )


def plan(d: TensorProductDescriptor, context: PlanContext) -> tuple[str, Run]:
    """A function (x, y, weight) -> out that is fast where y is one-hot and exact everywhere."""
    _, general = tensor_product.plan(d, context)
    layout = _layout(d, context)
    dim1, dim_out = dim_of(d.irreps_in1), dim_of(d.irreps_out)
    weights = sum(prod(shape) for shape in layout.shapes) if layout else 0
    nothing = torch.zeros(1, dtype=context.dtype, device=context.device)

    def run(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        recording = torch.is_grad_enabled()
        leading = x.shape[:-1]
        if weight.numel() != weights:  # strides would reach beyond it
            return general(x, y, weight)
        if layout is None or leading != y.shape[:-1] or (y.requires_grad and recording):
            return general(x, y, weight)
        species = species_of(y)
        if species is None or species.rows == 0:
            return general(x, y, weight)
        flat = x if len(leading) == 1 else x.reshape(species.rows, dim1)
        columns = {i: _columns(flat, first, b, species) for i, first, b in layout.blocks}
        weight = weight.contiguous()
        matrices = (
            split_weights(weight, layout.shapes) if recording and weight.requires_grad else None
        )
        out = []
        for block, feeds in layout.outputs:
            k = block.ir_dim
            if not feeds:
                out.append(x.new_zeros((species.rows, block.dim)))
                continue
            groups = species.groups(k)
            product = (
                _of_groups(columns, weight, feeds, groups, nothing)
                if matrices is None
                else _with_weights(columns, matrices, feeds, groups)
            )
            if k > 1:
                product = product.view(species.rows, k, block.mul).transpose(1, 2)
                product = product.reshape(species.rows, block.dim)
            out.append(product)
        result = out[0] if len(out) == 1 else torch.cat(out, 1)
        if species.inverse is not None:
            result = result.index_select(0, species.inverse)
        return result if len(leading) == 1 else result.view(*leading, dim_out)

    return f"indexed linear over {d.irreps_in2[0].mul} species", run


def _layout(d: TensorProductDescriptor, context: PlanContext) -> _Layout | None:
    """None where there is nothing to multiply, or a coupling that isn't a multiple of the identity."""
    feeds: list[list[_Feed]] = [[] for _ in d.irreps_out]
    shapes: list[tuple[int, ...]] = []
    offset = 0
    for path in d.paths:
        if 0 in path.path_shape:
            continue
        c = tensor_product.Constants.of(path, context)
        if c.kind == "general":
            return None
        u, v, w = path.path_shape
        feeds[path.i_out].append(_Feed(len(shapes), path.i_in1, offset, (u, v, w), c.scale))
        shapes.append(path.path_shape)
        offset += u * v * w
    if not shapes:
        return None
    used = {feed.i_in for of_one in feeds for feed in of_one}
    blocks, first = [], 0
    for i, block in enumerate(d.irreps_in1):
        if i in used:
            blocks.append((i, first, block))
        first += block.dim
    outputs = tuple(
        (block, tuple(f)) for block, f in zip(d.irreps_out, feeds, strict=True) if block.mul > 0
    )
    return _Layout(tuple(blocks), outputs, shapes)


def _columns(x: torch.Tensor, first: int, block: MulIr, species: Species) -> torch.Tensor:
    """A block of x as [rows * k, mul], rows sorted by species and scaled by their non-zero."""
    rows, k = species.rows, block.ir_dim
    if block.dim != x.shape[1]:
        x = x.narrow(1, first, block.dim)
    if species.order is not None:
        x = x.index_select(0, species.order)
    if species.values is not None:
        x = x * species.values.unsqueeze(-1)
    if k > 1:
        x = x.reshape(rows, block.mul, k).transpose(1, 2).reshape(rows * k, block.mul)
    return x


def _of_groups(
    columns: dict[int, torch.Tensor],
    weight: torch.Tensor,
    feeds: tuple[_Feed, ...],
    groups: Groups,
    nothing: torch.Tensor,
) -> torch.Tensor:
    """The sum over paths, rows sorted, in torch's own operations: the fewest there can be.

    Gives no gradient of the weights, which would be a tensor of their whole size for every group.
    """
    start = weight.storage_offset()
    sizes = [last - first for _, first, last in groups]
    parts = {f.i_in: columns[f.i_in].split(sizes) for f in feeds} if len(sizes) > 1 else None
    products = []
    for n, (kind, _, _) in enumerate(groups):
        out = nothing
        for feed in feeds:
            u, v, w = feed.shape
            matrix = weight.as_strided((u, w), (v * w, 1), start + feed.offset + kind * w)
            rows = columns[feed.i_in] if parts is None else parts[feed.i_in][n]
            beta = 0 if out is nothing else 1
            out = torch.addmm(out, rows, matrix, beta=beta, alpha=feed.scale)
        products.append(out)
    return products[0] if parts is None else torch.cat(products)


def _with_weights(
    columns: dict[int, torch.Tensor],
    matrices: list[torch.Tensor],
    feeds: tuple[_Feed, ...],
    groups: Groups,
) -> torch.Tensor:
    """The same with gradients of the weights."""
    first, *others = (
        indexed_linear(columns[feed.i_in], matrices[feed.number], groups, feed.scale)
        for feed in feeds
    )
    return sum(others, first)
