"""The fused convolution with its first and second derivatives; what computes them is a parameter.

The convolution F(x, y, w) is linear in each operand, so with g the gradient of its output and
(hx, hy, hw) those of its gradients, everything is made of F and its transposes Bx, By, Bw:

    dx = Bx(g, y, w)    dy = By(g, x, w)    dw = Bw(g, x, y)
    dg' = F(hx, y, w) + F(x, hy, w) + F(x, y, hw)
    dx' = Bx(g, hy, w) + Bx(g, y, hw),  and likewise dy', dw'

Kernels compute each line in one pass over the edges. Derivatives of third and higher order are
composed of the first two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from e3nn_accel.compat import gradients_wanted
from e3nn_accel.groupings import Neighbours
from e3nn_accel.overwriting import may_overwrite

Optional4 = tuple[torch.Tensor | None, ...]


class ConvolutionKernels(Protocol):
    """What a backend offers for one convolution; every tensor contiguous, on one device.

    Shapes: x [nodes, dim1], y [edges, dim2], w [edges, weights], g and the result [nodes, dim_out].
    """

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, graph: Neighbours
    ) -> torch.Tensor:
        """F(x, y, w)."""
        ...

    def backward(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        graph: Neighbours,
        wanted: tuple[bool, bool, bool],
        over_w: bool = False,
    ) -> Optional4:
        """(dx, dy, dw), None where not wanted; dw may be written over w where that is allowed."""
        ...

    def double(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        hx: torch.Tensor,
        hy: torch.Tensor,
        hw: torch.Tensor,
        graph: Neighbours,
    ) -> Optional4:
        """(dg', dx', dy', dw')."""
        ...


def convolution(
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor,
    graph: Neighbours,
    kernels: ConvolutionKernels,
) -> torch.Tensor:
    """F(x, y, w), differentiable to any order."""
    if not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or w.requires_grad)):
        x, y, w = _contiguous(x, y, w)
        return kernels.forward(x, y, w, graph)
    out: torch.Tensor = _Forward.apply(x, y, w, graph, kernels)  # type: ignore[no-untyped-call]
    return out


def convolution_gradients(
    g: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor,
    graph: Neighbours,
    kernels: ConvolutionKernels,
    wanted: tuple[bool, bool, bool],
) -> Optional4:
    """(dx, dy, dw) without computing F first, None where not wanted; differentiable to any order."""
    if not torch.is_grad_enabled():
        g, x, y, w = _contiguous(g, x, y, w)
        return kernels.backward(g, x, y, w, graph, wanted)
    found: Optional4 = _Backward.apply(g, x, y, w, graph, kernels, wanted)  # type: ignore[no-untyped-call]
    return found


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, graph: Any, kernels: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(x, y, w)  # these and no copies: second derivatives go back to them
        ctx.graph, ctx.kernels, ctx.once = graph, kernels, may_overwrite()
        out: torch.Tensor = kernels.forward(*_contiguous(x, y, w), graph)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, y, w = ctx.saved_tensors
        wanted: Any = gradients_wanted(ctx, 3)
        if ctx.once and wanted[2] and not torch.is_grad_enabled():
            return *_over_weights(grads[0], x, y, w, ctx, wanted), None, None
        found = convolution_gradients(grads[0], x, y, w, ctx.graph, ctx.kernels, wanted)
        return (*found, None, None)


def _over_weights(
    g: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, ctx: Any, wanted: Any
) -> Optional4:
    """(dx, dy, dw) where w is read for the last time; a leaf of autograd's graph belongs to others."""
    operands = _contiguous(g, x, y, w)
    dx, dy, dw = ctx.kernels.backward(*operands, ctx.graph, wanted, w.grad_fn is not None)
    if dw is not None and dw.data_ptr() == w.data_ptr():
        torch.autograd.graph.increment_version(w)
        dw = dw.detach()
    return dx, dy, dw


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        graph: Any,
        kernels: Any,
        wanted: tuple[bool, bool, bool],
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, y, w)
        ctx.graph, ctx.kernels = graph, kernels
        return kernels.backward(*_contiguous(g, x, y, w), graph, wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        operands = ctx.saved_tensors
        if all(h is None for h in grads):
            return (None,) * 7
        tangents = [
            torch.zeros_like(of) if h is None else h
            for h, of in zip(grads, operands[1:], strict=True)
        ]
        if torch.is_grad_enabled():  # a derivative of this one will be asked for: compose it
            found = _composed(operands, tangents, ctx.graph, ctx.kernels)
        else:
            found = ctx.kernels.double(*_contiguous(*operands, *tangents), ctx.graph)
        return (*found, None, None, None)


def _contiguous(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)


def _composed(
    operands: Sequence[torch.Tensor],
    tangents: Sequence[torch.Tensor],
    graph: Neighbours,
    kernels: ConvolutionKernels,
) -> Optional4:
    """The second derivatives out of differentiable pieces; operands g, x, y, w, tangents of x, y, w."""
    g, x, y, w = operands
    hx, hy, hw = tangents
    dg = (
        convolution(hx, y, w, graph, kernels)
        + convolution(x, hy, w, graph, kernels)
        + convolution(x, y, hw, graph, kernels)
    )

    def transposed(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Any:
        return _Backward.apply(g, a, b, c, graph, kernels, (True, True, True))  # type: ignore[no-untyped-call]

    _, dy1, dw1 = transposed(hx, y, w)
    dx1, _, dw2 = transposed(x, hy, w)
    dx2, dy2, _ = transposed(x, y, hw)
    return dg, dx1 + dx2, dy1 + dy2, dw1 + dw2
