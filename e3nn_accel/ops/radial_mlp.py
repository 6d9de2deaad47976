"""The hidden layers of a radial MLP, differentiable to any order; what computes them is a parameter.

Second derivatives, which training on forces wants, are kernels' where the gradient by x alone was taken.
Others, and derivatives of these, are torch's own, of the same layers in torch operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from e3nn_accel.compat import gradients_wanted

Weights = Sequence[torch.Tensor]


class HiddenKernels(Protocol):
    """What a backend offers, on contiguous tensors: x [edges, in], weights [in, out] of each layer, g [edges, out]."""

    def forward(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """The last activations, [edges, out]."""
        ...

    def backward(
        self, g: torch.Tensor, x: torch.Tensor, weights: Weights, wanted: tuple[bool, ...]
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of (x, *weights); None where not wanted."""
        ...

    def second(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        h: torch.Tensor,
        weights: Weights,
        wanted: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of <h, gradient by x> by (g, x, *weights), h of x's shape; None where not wanted."""
        ...

    def composed(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """The last activations in torch operations."""
        ...


def hidden_layers(x: torch.Tensor, weights: Weights, kernels: HiddenKernels) -> torch.Tensor:
    """The last activations, [edges, out]."""
    out: torch.Tensor
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        out = _Forward.apply(x, *weights, kernels)  # type: ignore[no-untyped-call]
    else:
        out = kernels.forward(x.contiguous(), [w.contiguous() for w in weights])
    return out


def hidden_gradients(
    g: torch.Tensor,
    x: torch.Tensor,
    weights: Weights,
    kernels: HiddenKernels,
    wanted: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """(dx, *dw) without computing the activations first, None where not wanted; differentiable to any order."""
    if not torch.is_grad_enabled():
        return _gradients(kernels, g, x, weights, wanted)
    found: tuple[torch.Tensor | None, ...] = _Backward.apply(g, x, *weights, kernels, wanted)  # type: ignore[no-untyped-call]
    return found


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        x, *weights, kernels = given
        ctx.save_for_backward(
            x, *weights
        )  # these and no copies: second derivatives go back to them
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        out: torch.Tensor = kernels.forward(x.contiguous(), [w.contiguous() for w in weights])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *weights = ctx.saved_tensors
        wanted = gradients_wanted(ctx, 1 + len(weights))
        (g,) = grads
        if g is None or not any(wanted):
            return (None,) * (len(wanted) + 1)
        return (*hidden_gradients(g, x, weights, ctx.kernels, wanted), None)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        g, x, *weights, kernels, wanted = given
        ctx.save_for_backward(g, x, *weights)
        ctx.kernels, ctx.wanted = kernels, wanted
        ctx.set_materialize_grads(False)
        return _gradients(kernels, g, x, weights, wanted)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        wanted = gradients_wanted(ctx, len(ctx.saved_tensors))
        if all(h is None for h in tangents) or not any(wanted):
            return (None,) * (len(wanted) + 2)
        further = torch.is_grad_enabled()
        h, *of_weights = tangents
        if h is not None and not further and all(t is None for t in of_weights):
            g, x, *weights = (t.contiguous() for t in ctx.saved_tensors)
            return *ctx.kernels.second(g, x, h.contiguous(), weights, wanted), None, None
        with torch.enable_grad():
            second = _composed(ctx, tangents, further)
        kept = (t if want else None for t, want in zip(second, wanted, strict=True))
        return (*kept, None, None)


def _gradients(
    kernels: HiddenKernels,
    g: torch.Tensor,
    x: torch.Tensor,
    weights: Weights,
    wanted: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    contiguous = [w.contiguous() for w in weights]
    return kernels.backward(g.contiguous(), x.contiguous(), contiguous, wanted)


def _composed(ctx: Any, tangents: Any, further: bool) -> Any:
    """The derivatives of <gradients, tangents> by (g, x, *weights); differentiable if ``further``."""
    # Views, so that what the operands themselves may be computed of isn't gone through.
    g, x, *weights = (
        t.view_as(t) if further and t.requires_grad else t.detach().requires_grad_()
        for t in ctx.saved_tensors
    )
    out = ctx.kernels.composed(x, weights)
    given = [(n, h) for n, h in enumerate(tangents) if h is not None]
    sources = [(x, *weights)[n] for n, _ in given]
    first = torch.autograd.grad(out, sources, g, create_graph=True)
    return torch.autograd.grad(
        first,
        (g, x, *weights),
        [h for _, h in given],
        create_graph=further,
        allow_unused=True,
    )
