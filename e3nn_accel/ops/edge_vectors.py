"""Vectors and lengths of edges by the positions of their ends, differentiable to any order.

What computes them is a parameter.

    v = x[receiver] - x[sender] + shift,  l = |v|        F
    g = dv + dl v / l,  dx = sums of g over the ends     X

With (hx, hs) the gradients of (dx, dshift), h = hx[receiver] - hx[sender] + hs is F's v again, and what is left is
arithmetic of edges, which torch differentiates further:

    d dv = h,  d dl = h.v / l,  d v = dl / l h,  d l = -dl / l^2 h.v

Where an edge has no length, terms with 1 / l are zero, as torch has them of a norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from e3nn_accel.groupings import Neighbours

Pair = tuple[torch.Tensor, torch.Tensor | None]
Some = torch.Tensor | None


class EdgeVectorKernels(Protocol):
    """F and X; every tensor on one device."""

    def vectors(
        self, positions: torch.Tensor, edge_index: torch.Tensor, shifts: Some
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[edges, 3] and [edges, 1] of positions [nodes, 3] and shifts [edges, 3].

        ``edge_index`` [2, edges] has senders and receivers.
        """
        ...

    def gradients(
        self,
        dv: Some,
        dl: Some,
        vectors: torch.Tensor,
        lengths: torch.Tensor,
        edges: Neighbours,
        of_shifts: bool,
    ) -> Pair:
        """[nodes, 3], and [edges, 3] where it is wanted; not both of dv and dl are None."""
        ...


class Edges(NamedTuple):
    """Of one call.

    Attributes:
        edge_index: [2, edges], senders and receivers.
        neighbours: In the order of either, when it is asked for.
        kernels: What computes.
    """

    edge_index: torch.Tensor
    neighbours: Callable[[], Neighbours]
    kernels: EdgeVectorKernels


def edge_vectors(
    positions: torch.Tensor, shifts: Some, edges: Edges
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of edges, [edges, 3] and [edges, 1]; shifts None are zero."""
    found: tuple[torch.Tensor, torch.Tensor] = _Vectors.apply(positions, shifts, edges)  # type: ignore[no-untyped-call]
    return found


class _Vectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positions: torch.Tensor, shifts: Some, edges: Edges) -> Any:
        ctx.set_materialize_grads(False)
        vectors, lengths = edges.kernels.vectors(positions, edges.edge_index, shifts)
        # these, not the positions: derivatives of the gradient go back through them
        ctx.save_for_backward(vectors, lengths)
        ctx.edges = edges
        return vectors, lengths

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dv, dl = grads
        if dv is None and dl is None:
            return None, None, None
        vectors, lengths = ctx.saved_tensors
        of_shifts = bool(ctx.needs_input_grad[1])
        if torch.is_grad_enabled():
            return *_Gradients.apply(dv, dl, vectors, lengths, ctx.edges, of_shifts), None  # type: ignore[no-untyped-call]
        neighbours = ctx.edges.neighbours()
        return *ctx.edges.kernels.gradients(dv, dl, vectors, lengths, neighbours, of_shifts), None


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dv: Some,
        dl: Some,
        vectors: torch.Tensor,
        lengths: torch.Tensor,
        edges: Edges,
        of_shifts: bool,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dl, vectors, lengths)
        ctx.edges, ctx.has_dv = edges, dv is not None
        neighbours = edges.neighbours()
        return edges.kernels.gradients(dv, dl, vectors, lengths, neighbours, of_shifts)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        of_positions, of_shifts = tangents
        if of_positions is None and of_shifts is None:
            return (None,) * 6
        dl, vectors, lengths = ctx.saved_tensors
        h = of_shifts
        if of_positions is not None:
            h, _ = edge_vectors(of_positions, of_shifts, ctx.edges)
        of_dv = h if ctx.has_dv else None
        if dl is None:
            return of_dv, None, None, None, None, None
        inverse = _inverse(lengths)
        along = (h * vectors).sum(1, keepdim=True) * inverse
        per_length = dl * inverse
        return of_dv, along, per_length * h, -per_length * along, None, None


def _inverse(lengths: torch.Tensor) -> torch.Tensor:
    """1 / l, and 0 of 0 whatever is differentiated."""
    none = lengths == 0
    return lengths.masked_fill(none, 1).reciprocal().masked_fill(none, 0)
