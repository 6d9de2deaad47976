"""The tensor product row by row with derivatives of any order; what computes them is a parameter.

The product F(x, y, w) is linear in each operand, and so are its transposes Bx, By, Bw in g, the
gradient of its output, and in the two other operands. With (hx, hy, hw) the gradients of (dx, dy, dw)

    dg' = F(hx, y, w) + F(x, hy, w) + F(x, y, hw)
    dx' = Bx(g, hy, w) + Bx(g, y, hw),  and likewise dy', dw'

so that values and first derivatives are all that kernels need to know: the second are made of these,
where there is no kernel that has them in one pass, and the third of the second. Terms of tangents
that are absent and results that nobody asked for are left out. Paths without weights are no function
of w: where hw stands in its place they are left out, too, which is what the flag ``plain`` says:
whether they take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from e3nn_accel.compat import gradients_wanted

Optional3 = tuple[torch.Tensor | None, ...]
Wanted = tuple[bool, bool, bool]


class ProductKernels(Protocol):
    """What a backend offers for one product; every tensor contiguous, on one device.

    Attributes:
        fused_double: Whether there is `double`, the second derivatives in one pass.

    Shapes: x [rows, dim1], y [rows, dim2], w [rows, weights], or [weights] where all rows share
    them; the result is whatever `forward` gives, and g has its shape.
    """

    @property
    def fused_double(self) -> bool:
        """As above."""
        ...

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, plain: bool
    ) -> torch.Tensor:
        """F(x, y, w)."""
        ...

    def backward(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        plain: bool,
        wanted: Wanted,
    ) -> Optional3:
        """(dx, dy, dw), None where not wanted."""
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
        plain: bool,
    ) -> Optional3:
        """(dg', dx', dy', dw')."""
        ...


def tensor_product(
    x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, kernels: ProductKernels, plain: bool = True
) -> torch.Tensor:
    """F(x, y, w), differentiable to any order."""
    if not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or w.requires_grad)):
        x, y, w = _contiguous(x, y, w)
        return kernels.forward(x, y, w, plain)
    out: torch.Tensor = _Forward.apply(x, y, w, kernels, plain)  # type: ignore[no-untyped-call]
    return out


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, kernels: Any, plain: bool
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, w)  # these and no copies: second derivatives go back to them
        ctx.kernels, ctx.plain = kernels, plain
        out: torch.Tensor = kernels.forward(*_contiguous(x, y, w), plain)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return (None,) * 5
        wanted: Any = gradients_wanted(ctx, 3)
        found = _transposed(grads[0], ctx.saved_tensors, ctx.kernels, ctx.plain, wanted)
        return (*found, None, None)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        kernels: Any,
        plain: bool,
        wanted: Wanted,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, y, w)
        ctx.kernels, ctx.plain = kernels, plain
        return kernels.backward(*_contiguous(g, x, y, w), plain, wanted)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        wanted = gradients_wanted(ctx, 4)
        g, *operands = ctx.saved_tensors
        if (
            ctx.kernels.fused_double
            and sum(h is not None for h in tangents) > 1
            and not torch.is_grad_enabled()  # else a derivative of this will be asked for
        ):
            hs = [
                torch.zeros_like(of) if h is None else h
                for h, of in zip(tangents, operands, strict=True)
            ]
            found_at_once = ctx.kernels.double(*_contiguous(g, *operands, *hs), ctx.plain)
            return (*found_at_once, None, None, None)
        found: list[torch.Tensor | None] = [None] * 4
        for n, h in enumerate(tangents):
            if h is None:
                continue
            moved = [h if m == n else operand for m, operand in enumerate(operands)]
            plain = ctx.plain and n != 2
            if wanted[0]:
                found[0] = _sum(
                    found[0], tensor_product(moved[0], moved[1], moved[2], ctx.kernels, plain)
                )
            others = tuple(wanted[m + 1] and m != n for m in range(3))
            parts = _transposed(g, moved, ctx.kernels, plain, others)  # type: ignore[arg-type]
            found[1:] = [_sum(a, b) for a, b in zip(found[1:], parts, strict=True)]
        return (*found, None, None, None)


def _transposed(
    g: torch.Tensor,
    operands: Sequence[torch.Tensor],
    kernels: ProductKernels,
    plain: bool,
    wanted: Wanted,
) -> Optional3:
    """(Bx, By, Bw) at g and the operands, differentiable."""
    if not any(wanted):
        return None, None, None
    x, y, w = operands
    if not torch.is_grad_enabled():
        g, x, y, w = _contiguous(g, x, y, w)
        return kernels.backward(g, x, y, w, plain, wanted)
    found: Optional3 = _Backward.apply(g, x, y, w, kernels, plain, wanted)  # type: ignore[no-untyped-call]
    return found


def _contiguous(*tensors: torch.Tensor) -> Any:
    return tuple(t.contiguous() for t in tensors)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b
