"""A function of each row of a tensor, with constants, differentiable to any order; what computes it is a parameter.

out = F(x) where row n of out depends on row n of x alone. With g the gradient of out, dx = J(x)* g; with h
the gradient of dx, those by g and x are J(x) h and the derivative of J(x)* g in the direction h. Kernels
compute these; derivatives of the second are torch's own, of the same function in torch operations.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from e3nn_accel.compat import gradients_wanted

Pair = tuple[torch.Tensor | None, torch.Tensor | None]


class RowKernels(Protocol):
    """What a backend offers for one function; x, g and h are contiguous, of the shapes of x, out and x."""

    def forward(self, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """F(x)."""
        ...

    def backward(self, g: torch.Tensor, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """J(x)* g."""
        ...

    def second(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        h: torch.Tensor,
        wanted: tuple[bool, bool],
        *constants: torch.Tensor,
    ) -> Pair:
        """(J(x) h, gradient of <h, J(x)* g> by x), None where not wanted."""
        ...

    def composed(self, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """F(x) in torch operations."""
        ...


def row_function(kernels: RowKernels, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
    """F(x), differentiable by x; constants get no gradient."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return kernels.forward(x.contiguous(), *constants)
    out: torch.Tensor = _Forward.apply(x, kernels, *constants)  # type: ignore[no-untyped-call]
    return out


def row_gradient(
    kernels: RowKernels, g: torch.Tensor, x: torch.Tensor, *constants: torch.Tensor
) -> torch.Tensor:
    """J(x)* g, differentiable by g and x."""
    if not (torch.is_grad_enabled() and (g.requires_grad or x.requires_grad)):
        return kernels.backward(g.contiguous(), x.contiguous(), *constants)
    found: torch.Tensor = _Backward.apply(g, x, kernels, *constants)  # type: ignore[no-untyped-call]
    return found


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, kernels: RowKernels, *constants: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, *constants)  # x and no copy: second derivatives go back to it
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        return kernels.forward(x.contiguous(), *constants)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        x, *constants = ctx.saved_tensors
        none = (None,) * (1 + len(constants))
        if g is None or not gradients_wanted(ctx, 1)[0]:
            return None, *none
        return row_gradient(ctx.kernels, g, x, *constants), *none


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: torch.Tensor, x: torch.Tensor, kernels: RowKernels, *constants: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(g, x, *constants)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        return kernels.backward(g.contiguous(), x.contiguous(), *constants)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        (h,) = tangents
        g, x, *constants = ctx.saved_tensors
        none = (None,) * (1 + len(constants))
        wanted = gradients_wanted(ctx, 2)
        if h is None or not any(wanted):
            return None, None, *none
        if torch.is_grad_enabled():  # a derivative of this will be asked for
            found = _composed(ctx.kernels, g, x, h, constants)
            return *(t if want else None for t, want in zip(found, wanted, strict=True)), *none
        second = ctx.kernels.second(
            g.contiguous(), x.contiguous(), h.contiguous(), wanted, *constants
        )
        return *second, *none


def _composed(
    kernels: RowKernels,
    g: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    constants: list[torch.Tensor],
) -> tuple[torch.Tensor | None, ...]:
    """The second derivatives in torch operations: differentiable."""
    # Views, so that what g and x themselves may be computed of isn't gone through.
    g, x = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, x))
    (first,) = torch.autograd.grad(kernels.composed(x, *constants), x, g, create_graph=True)
    return torch.autograd.grad(first, (g, x), h, create_graph=True, allow_unused=True)
