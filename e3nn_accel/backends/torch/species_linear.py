"""The species-indexed linear: a fully connected product with one-hot scalars picks a matrix for each row.

MACE multiplies node features with ``node_attrs``, which is one-hot over (up to 89) species. Stock
e3nn multiplies with all species; here rows are sorted by species and each group meets its own
matrix. One-hotness is looked at for every call, never assumed: rows with a single non-zero of any
value are exact, anything else (and a wanted gradient of the scalars) takes the general product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from e3nn_accel.backends.torch import tensor_product
from e3nn_accel.descriptor import TensorProductDescriptor, dim_of
from e3nn_accel.groupings import Species, species_of
from e3nn_accel.layout import split_blocks, split_weights
from e3nn_accel.ops.indexed_linear import indexed_linear
from e3nn_accel.plan import PlanContext

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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
    paths = [p for p in d.paths if 0 not in p.path_shape]
    constants = [tensor_product.Constants.of(p, context) for p in paths]
    shapes: list[tuple[int, ...]] = [p.path_shape for p in paths]
    used = sorted({p.i_in1 for p in paths})
    dim1, dim_out = dim_of(d.irreps_in1), dim_of(d.irreps_out)

    def run(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if (
            x.shape[:-1] != y.shape[:-1]
            or not paths
            or (y.requires_grad and torch.is_grad_enabled())
        ):
            return general(x, y, weight)
        species = species_of(y)
        if species is None or any(c.kind == "general" for c in constants):
            return general(x, y, weight)
        blocks = split_blocks(x.reshape(len(species.order), dim1), d.irreps_in1)
        rows = {i: _sorted_rows(blocks[i], species) for i in used}
        sums: list[torch.Tensor | None] = [None] * len(d.irreps_out)
        for path, c, w in zip(paths, constants, split_weights(weight, shapes), strict=True):
            k = c.dims[2]
            product = indexed_linear(rows[path.i_in1], w, species.groups(k), c.scale)
            before = sums[path.i_out]
            sums[path.i_out] = product if before is None else before + product
        out = [
            x.new_zeros((len(species.order), block.dim))
            if product is None
            else _unsorted(product, species, block.ir_dim)
            for block, product in zip(d.irreps_out, sums, strict=True)
            if block.mul > 0
        ]
        return (out[0] if len(out) == 1 else torch.cat(out, dim=-1)).reshape(*x.shape[:-1], dim_out)

    return f"indexed linear over {d.irreps_in2[0].mul} species", run


def _sorted_rows(block: torch.Tensor, species: Species) -> torch.Tensor:
    """[rows, mul, k] to [rows * k, mul], rows sorted by species and scaled by their non-zero."""
    rows, mul, k = block.shape
    x = block.transpose(1, 2).reshape(rows, k * mul)
    if not species.is_sorted:
        x = x.index_select(0, species.order)
    if species.values is not None:
        x = x * species.values.unsqueeze(-1)
    return x.reshape(rows * k, mul)  # a single channel leaves strides that can't be viewed


def _unsorted(product: torch.Tensor, species: Species, k: int) -> torch.Tensor:
    """[rows * k, mul] sorted to [rows, mul * k] in the caller's order."""
    rows = len(species.order)
    mul = product.shape[1]
    out = product.view(rows, k * mul)
    if not species.is_sorted:
        out = out.index_select(0, species.inverse)
    return out.view(rows, k, mul).transpose(1, 2).reshape(rows, mul * k)
