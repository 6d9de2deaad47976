"""An operation that is linear in rows and in weights, differentiable to any order; what computes it is a parameter.

F(x, w) and its transposes X(g, w) and W(x, g) are each other's derivatives:

    F: dx = X(g, w), dw = W(x, g)      X(g, w): dg = F(h, w), dw = W(h, g)      W(x, g): dx = X(g, h), dg = F(x, h)
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from e3nn_accel.compat import gradients_wanted


class WeightedKernels(Protocol):
    """F, X and W on contiguous tensors: x [rows, in], g [rows, out], w [weights]."""

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """F, [rows, out]."""
        ...

    def to_input(self, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """X, [rows, in]."""
        ...

    def to_weight(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """W, [weights]."""
        ...


KINDS = ("forward", "to_input", "to_weight")
_DERIVATIVES = {
    # of each operand: what computes it, and of which of (first operand, second operand, gradient)
    "forward": (("to_input", 2, 1), ("to_weight", 0, 2)),
    "to_input": (("forward", 2, 1), ("to_weight", 2, 0)),
    "to_weight": (("to_input", 1, 2), ("forward", 0, 2)),
}


def weighted(x: torch.Tensor, w: torch.Tensor, kernels: WeightedKernels) -> torch.Tensor:
    """F(x, w)."""
    return _apply("forward", x, w, kernels)


def weighted_gradients(
    g: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    kernels: WeightedKernels,
    wanted: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx, dw) without computing F first, None where not wanted; differentiable to any order."""
    dx = _apply("to_input", g, w, kernels) if wanted[0] else None
    dw = _apply("to_weight", x, g, kernels) if wanted[1] else None
    return dx, dw


def _apply(kind: str, a: torch.Tensor, b: torch.Tensor, kernels: WeightedKernels) -> torch.Tensor:
    out: torch.Tensor
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        out = _Weighted.apply(a, b, kind, kernels)  # type: ignore[no-untyped-call]
    else:
        out = getattr(kernels, kind)(a.contiguous(), b.contiguous())
    return out


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, kind: str, kernels: WeightedKernels
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b)  # these and no copies: second derivatives go back to them
        ctx.kind, ctx.kernels = kind, kernels
        out: torch.Tensor = getattr(kernels, kind)(a.contiguous(), b.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return (None,) * 4
        operands = (*ctx.saved_tensors, grads[0])
        found = [
            _apply(kind, operands[first], operands[second], ctx.kernels) if wanted else None
            for wanted, (kind, first, second) in zip(
                gradients_wanted(ctx, 2), _DERIVATIVES[ctx.kind], strict=True
            )
        ]
        return *found, None, None
