"""A reordering of numbers, differentiable to any order; what moves them is a parameter.

Each number has one place before and one after, so the gradient is the same numbers moved back.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class ReorderingKernels(Protocol):
    """Both ways, of contiguous tensors."""

    def there(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers in their new places."""
        ...

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers in their old places."""
        ...


def reordered(kernels: ReorderingKernels, x: torch.Tensor, back: bool = False) -> torch.Tensor:
    """`there` or, if wanted, `back` of x."""
    if torch.is_grad_enabled() and x.requires_grad:
        out: torch.Tensor = _Reordered.apply(x, kernels, back)  # type: ignore[no-untyped-call]
        return out
    return (kernels.back if back else kernels.there)(x.contiguous())


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kernels: ReorderingKernels, back: bool) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.back = kernels, back
        return (kernels.back if back else kernels.there)(x.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        return None if g is None else reordered(ctx.kernels, g, not ctx.back), None, None
