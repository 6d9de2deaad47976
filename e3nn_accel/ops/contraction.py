"""The symmetric contraction with derivatives of any order; what computes them is a parameter.

out = F(x, w) is a polynomial in the features x and linear in the reduced weights w. With g the
gradient of out, dx = F_x(x, w)* g and dw = F_w(x)* g; with (hx, hw) the gradients of (dx, dw), those by
(g, x, w) are the derivatives of (F, dx, dw) at (x, w) in the direction (hx, hw), g held fixed. So kernels
need to know values, first derivatives, and both in a direction. Derivatives of the second are torch's
own, of the same polynomials in torch operations.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from e3nn_accel.compat import gradients_wanted
from e3nn_accel.groupings import NodesBySpecies

Pair = tuple[torch.Tensor | None, torch.Tensor | None]
Wanted = tuple[bool, bool]


class ContractionKernels(Protocol):
    """What a backend offers for one contraction; every tensor contiguous, on one device.

    Shapes: x [nodes, channels, components]; w [species, paths, channels]; out and g
    [nodes, sum of channels * (2l+1)]. With (hx, hw) results are their derivatives in that direction,
    of which one may be None.
    """

    def forward(
        self, x: torch.Tensor, w: torch.Tensor, nodes: NodesBySpecies, h: Pair | None
    ) -> torch.Tensor:
        """F(x, w), or its derivative."""
        ...

    def backward(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        w: torch.Tensor,
        nodes: NodesBySpecies,
        wanted: Wanted,
        h: Pair | None,
    ) -> Pair:
        """(dx, dw), or their derivatives; None where not wanted."""
        ...

    def composed(self, x: torch.Tensor, w: torch.Tensor, nodes: NodesBySpecies) -> torch.Tensor:
        """F(x, w) in torch operations."""
        ...


def contraction(
    x: torch.Tensor, w: torch.Tensor, nodes: NodesBySpecies, kernels: ContractionKernels
) -> torch.Tensor:
    """F(x, w), differentiable to any order."""
    if not (torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)):
        return kernels.forward(x.contiguous(), w.contiguous(), nodes, None)
    out: torch.Tensor = _Forward.apply(x, w, nodes, kernels)  # type: ignore[no-untyped-call]
    return out


def contraction_gradients(
    g: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    nodes: NodesBySpecies,
    kernels: ContractionKernels,
    wanted: Wanted,
) -> Pair:
    """(dx, dw) without computing F first, None where not wanted; differentiable to any order."""
    if not torch.is_grad_enabled():
        return kernels.backward(g.contiguous(), x.contiguous(), w.contiguous(), nodes, wanted, None)
    found: Pair = _Backward.apply(g, x, w, nodes, kernels, wanted)  # type: ignore[no-untyped-call]
    return found


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, nodes: NodesBySpecies, kernels: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w)  # these and no copies: second derivatives go back to them
        ctx.nodes, ctx.kernels = nodes, kernels
        ctx.set_materialize_grads(False)
        out: torch.Tensor = kernels.forward(x.contiguous(), w.contiguous(), nodes, None)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        wanted = gradients_wanted(ctx, 2)
        if g is None or not any(wanted):
            return (None,) * 4
        x, w = ctx.saved_tensors
        found = contraction_gradients(g, x, w, ctx.nodes, ctx.kernels, (wanted[0], wanted[1]))
        return (*found, None, None)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: torch.Tensor,
        x: torch.Tensor,
        w: torch.Tensor,
        nodes: NodesBySpecies,
        kernels: Any,
        wanted: Wanted,
    ) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.nodes, ctx.kernels = nodes, kernels
        ctx.set_materialize_grads(False)
        return kernels.backward(g.contiguous(), x.contiguous(), w.contiguous(), nodes, wanted, None)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        wanted = gradients_wanted(ctx, 3)
        if all(h is None for h in tangents) or not any(wanted):
            return (None,) * 6
        if torch.is_grad_enabled():  # a derivative of this will be asked for
            return (*_composed(ctx, tangents, wanted), None, None, None)
        g, x, w = (t.contiguous() for t in ctx.saved_tensors)
        hx, hw = (None if h is None else h.contiguous() for h in tangents)
        dg = ctx.kernels.forward(x, w, ctx.nodes, (hx, hw)) if wanted[0] else None
        # dw is no function of w: without hx it doesn't change
        by = wanted[1], wanted[2] and hx is not None
        found = ctx.kernels.backward(g, x, w, ctx.nodes, by, (hx, hw))
        return (dg, *found, None, None, None)


def _composed(ctx: Any, tangents: Any, wanted: Any) -> list[torch.Tensor | None]:
    """The second derivatives in torch operations: differentiable."""
    # Views, so that what g, x and w themselves may be computed of isn't gone through.
    g, x, w = (
        t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors
    )
    out = ctx.kernels.composed(x, w, ctx.nodes)
    first = torch.autograd.grad(out, (x, w), g, create_graph=True)
    given = [(f, h) for f, h in zip(first, tangents, strict=True) if h is not None]
    second = torch.autograd.grad(
        [f for f, _ in given],
        (g, x, w),
        [h for _, h in given],
        create_graph=True,
        allow_unused=True,
        materialize_grads=False,
    )
    return [t if want else None for t, want in zip(second, wanted, strict=True)]
