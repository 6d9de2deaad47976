"""A matrix for each class of rows: ``out[r] = scale * x[r] @ weight[:, class(r), :]``, rows sorted by class.

Linear in x and in weight, so the derivatives are itself with the weight transposed, and the outer
product below; the two are each other's derivatives. The weight [in, classes, out] is read where
e3nn's FullyConnectedTensorProduct keeps it, and its gradient is written once into one tensor
(autograd over slices would fill a whole weight with zeros for every class).
"""

from __future__ import annotations

from typing import Any

import torch

from e3nn_accel.compat import gradients_wanted

Groups = tuple[tuple[int, int, int], ...]
"""(class, first row, last row + 1) of each class that occurs."""


def indexed_linear(
    x: torch.Tensor, weight: torch.Tensor, groups: Groups, scale: float
) -> torch.Tensor:
    """Multiply each group of rows with the matrix of its class.

    Args:
        x: [rows, in], sorted by class.
        weight: [in, classes, out], any strides.
        groups: Which rows belong to which class.
        scale: A constant factor.

    Returns:
        [rows, out]
    """
    out: torch.Tensor = _IndexedLinear.apply(x, weight, groups, scale)  # type: ignore[no-untyped-call]
    return out


class _IndexedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, groups: Groups, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.scale = groups, scale
        out = x.new_empty((x.shape[0], weight.shape[2]))
        for kind, first, last in groups:
            rows = out[first:last]
            torch.addmm(rows, x[first:last], weight[:, kind, :], beta=0, alpha=scale, out=rows)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted = gradients_wanted(ctx, 2)
        grad_x = (
            indexed_linear(grads[0], weight.transpose(0, 2), ctx.groups, ctx.scale)
            if wanted[0]
            else None
        )
        grad_weight = None
        if wanted[1]:
            grad_weight = _IndexedOuter.apply(x, grads[0], ctx.groups, weight.shape[1], ctx.scale)  # type: ignore[no-untyped-call]
        return grad_x, grad_weight, None, None


class _IndexedOuter(torch.autograd.Function):
    """out[:, class, :] = scale * sum over the rows of the class of x[r] (outer) g[r]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, g: torch.Tensor, groups: Groups, classes: int, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, g)
        ctx.groups, ctx.scale = groups, scale
        out = x.new_zeros((x.shape[1], classes, g.shape[1]))
        for kind, first, last in groups:
            out[:, kind, :] = torch.addmm(
                out[:, kind, :], x[first:last].T, g[first:last], beta=0, alpha=scale
            )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, g = ctx.saved_tensors
        wanted = gradients_wanted(ctx, 2)
        h = grads[0]
        grad_x = indexed_linear(g, h.transpose(0, 2), ctx.groups, ctx.scale) if wanted[0] else None
        grad_g = indexed_linear(x, h, ctx.groups, ctx.scale) if wanted[1] else None
        return grad_x, grad_g, None, None, None
