"""Every change of layout, in one place, both ways, differentiable.

e3nn keeps features ``mul_ir``: the 2l+1 components of one channel lie together. Plans that work with
channels side by side want ``ir_mul``. Weights stay where e3nn put them: these functions give views
into the original storage, or convert at each use; nothing is cached, since weights may change in
place without a trace (an exponential moving average writes through ``.data``).
"""

from __future__ import annotations

from math import prod

import torch

from e3nn_accel.irreps import Irreps, MulIr


def split_blocks(x: torch.Tensor, irreps: Irreps) -> list[torch.Tensor]:
    """Views [rows, mul, 2l+1] of the blocks of mul_ir rows [rows, dim]."""
    rows = x.shape[0]
    parts = x.split([block.dim for block in irreps], dim=-1)
    return [
        part.reshape(rows, block.mul, block.ir_dim)
        for part, block in zip(parts, irreps, strict=True)
    ]


def join_blocks(blocks: list[torch.Tensor], rows: int, like: torch.Tensor) -> torch.Tensor:
    """mul_ir rows [rows, dim] from blocks [rows, mul, 2l+1]; inverse of `split_blocks`."""
    flat = [
        block.reshape(rows, block.shape[1:].numel()) for block in blocks if block.shape[1:].numel()
    ]
    if not flat:
        return like.new_zeros((rows, 0))
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)


def to_ir_mul(block: torch.Tensor) -> torch.Tensor:
    """[rows, mul, 2l+1] to [rows, 2l+1, mul]; a view. Its own inverse."""
    return block.transpose(-1, -2)


def rows_ir_mul(x: torch.Tensor, irreps: Irreps) -> torch.Tensor:
    """mul_ir rows [rows, dim] to ir_mul rows of the same size."""
    if all(block.l == 0 for block in irreps):
        return x
    return join_blocks([to_ir_mul(block) for block in split_blocks(x, irreps)], x.shape[0], x)


def rows_mul_ir(x: torch.Tensor, irreps: Irreps) -> torch.Tensor:
    """ir_mul rows [rows, dim] to mul_ir rows; inverse of `rows_ir_mul`."""
    flipped = tuple(_flipped(block) for block in irreps)
    if all(block.l == 0 for block in irreps):
        return x
    parts = x.split([block.dim for block in irreps], dim=-1)
    rows = x.shape[0]
    blocks = [
        part.reshape(rows, *shape).transpose(1, 2)
        for part, shape in zip(parts, flipped, strict=True)
    ]
    return join_blocks(blocks, rows, x)


def _flipped(block: MulIr) -> tuple[int, int]:
    return block.ir_dim, block.mul


def split_weights(weight: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Views of flat weights [.., numel] for each path, [..] + shape."""
    if not shapes:
        return []
    parts = weight.split([prod(shape) for shape in shapes], dim=-1) if len(shapes) > 1 else [weight]
    return [
        part.reshape(*weight.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)
    ]


def join_weights(parts: list[torch.Tensor], shapes: list[tuple[int, ...]]) -> torch.Tensor:
    """Flat weights from one tensor for each path; inverse of `split_weights`."""
    flat = [
        part.reshape(*part.shape[: part.dim() - len(shape)], -1)
        for part, shape in zip(parts, shapes, strict=True)
    ]
    return torch.cat(flat, dim=-1)


def reduce_weights(weight: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Original contraction weights [species, paths, channels] in the reduced basis.

    Args:
        weight: Any of MACE's coupling bases.
        projection: [paths, reduced]: each original path as a combination of the reduced ones.

    Returns:
        [species, reduced, channels]; gradients reach the original parameter.
    """
    return projection.mT @ weight


def expand_weights(reduced: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Weights in the original basis that compute the same function as reduced ones.

    The original basis is redundant; of all solutions this is the one of least norm (pseudo-inverse).
    `reduce_weights` of the result gives ``reduced`` back.
    """
    expanded: torch.Tensor = torch.linalg.pinv(projection).mT @ reduced
    return expanded


def flat_rows(x: torch.Tensor, leading: torch.Size, dim: int) -> torch.Tensor:
    """Broadcast to common leading dimensions, then one dimension of rows, as e3nn does."""
    if x.shape[:-1] != leading:
        x = x.broadcast_to(*leading, dim)
    return x if x.dim() == 2 else x.reshape(leading.numel(), dim)


def unflat(rows: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """Rows [rows, dim] in the leading dimensions that `flat_rows` took away."""
    # a view of the same shape would be one more step forward, and backward
    return rows if len(leading) == 1 else rows.reshape(*leading, rows.shape[1])


def flat(weight: torch.Tensor) -> torch.Tensor:
    """Weights in one dimension."""
    return weight if weight.dim() == 1 else weight.reshape(-1)
