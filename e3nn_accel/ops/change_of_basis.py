"""Several tensors mapped into one by constant matrices, differentiable to any order; what computes it is a parameter.

w = sum_b T_b W_b; the map is linear, so that it and its transpose are each other's derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch

from e3nn_accel.branches import early
from e3nn_accel.compat import gradients_wanted

Some = Sequence[torch.Tensor | None]


class BasisKernels(Protocol):
    """The map and its transpose, of contiguous tensors; a W_b that is None is zero, or not wanted."""

    blocks: int

    def to_basis(self, weights: Some) -> torch.Tensor:
        """Sum_b T_b W_b."""
        ...

    def from_basis(
        self, w: torch.Tensor, wanted: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        """Transpose(T_b) w of each b that is wanted."""
        ...


def change_of_basis(weights: Some, kernels: BasisKernels) -> torch.Tensor:
    """Sum_b T_b W_b."""
    if torch.is_grad_enabled() and any([w is not None and w.requires_grad for w in weights]):
        which = tuple(n for n, w in enumerate(weights) if w is not None)
        out: torch.Tensor = _To.apply(*[weights[n] for n in which], which, kernels)  # type: ignore[no-untyped-call]
        return out
    return early(partial(_to_basis, weights, kernels), weights)


def _to_basis(weights: Some, kernels: BasisKernels) -> torch.Tensor:
    return kernels.to_basis([None if w is None else w.contiguous() for w in weights])


class _To(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        *given, ctx.which, ctx.kernels = arguments
        ctx.set_materialize_grads(False)
        weights: list[torch.Tensor | None] = [None] * ctx.kernels.blocks
        for n, w in zip(ctx.which, given, strict=True):
            weights[n] = w.contiguous()
        out: torch.Tensor = ctx.kernels.to_basis(weights)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        wanted = [False] * ctx.kernels.blocks
        for n, want in zip(ctx.which, gradients_wanted(ctx, len(ctx.which)), strict=True):
            wanted[n] = want
        if g is None or not any(wanted):
            return (None,) * (len(ctx.which) + 2)
        found: Any = (
            _From.apply(g, wanted, ctx.kernels)  # type: ignore[no-untyped-call]
            if torch.is_grad_enabled() and g.requires_grad
            else ctx.kernels.from_basis(g.contiguous(), wanted)
        )
        return (*[found[n] for n in ctx.which], None, None)


class _From(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, wanted: Sequence[bool], kernels: BasisKernels) -> Any:
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        return kernels.from_basis(w.contiguous(), wanted)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        if all(h is None for h in tangents):
            return None, None, None
        return change_of_basis(tangents, ctx.kernels), None, None
