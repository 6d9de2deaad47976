"""Rows taken by an index, ``rows[index]``, with gradients that need no sort: differentiable to any order.

The gradient sums what belongs to a row, and is linear; its gradient takes rows by the same index again:

    out = rows[index]        d rows = sums(d out)        d of that: h[index], and so on

What sums is a parameter: it knows the structure of the index. All are as deterministic as torch's own,
and keep a row's infinities to that row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from e3nn_accel.compat import functorch_transform
from e3nn_accel.groupings import adders

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Sums:
    """How the gradient of ``rows[index]`` is found.

    Attributes:
        add: Of (gradient of what was taken, *of) that of the rows.
        of: Tensors that ``add`` needs.
    """

    add: Callable[..., torch.Tensor]
    of: Tensors


def taken(rows: torch.Tensor, index: Tensors, sums: Sums) -> torch.Tensor:
    """``rows[index]``, and its errors; differentiable by rows."""
    how = _How(rows.shape, sums.add, len(index))
    out: torch.Tensor = _Taken.apply(rows, how, *index, *sums.of)  # type: ignore[no-untyped-call]
    return out


def of_few_rows(count: int, index: torch.Tensor) -> Sums:
    """Of few rows, each many times: all sums at once, at the cost of a copy of the gradient for each row."""
    if count == 1:
        return Sums(lambda g: g.sum(0, keepdim=True), ())

    def add(g: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        numbers = torch.arange(count, device=index.device)
        # as indexing counts, from the end where it is negative
        uses = index.remainder(count).unsqueeze(1) == numbers
        uses = uses.view(*uses.shape, *[1] * (g.dim() - 1))
        return torch.where(uses, g.unsqueeze(1), g.new_zeros(())).sum(0)

    return Sums(add, (index,))


def grouped(order: torch.Tensor, first: torch.Tensor) -> Sums:
    """By the uses of each row: ``order[first[n]:first[n + 1]]`` are those of row n."""
    return Sums(_add_groups, (order, first))


def in_two_steps(inner: Sums, outer: Sums) -> Sums:
    """Of ``rows[outer[inner]]``: first what ``inner`` sums up, then of these what ``outer`` does."""
    first, then, count = inner.add, outer.add, len(inner.of)

    def add(g: torch.Tensor, *of: torch.Tensor) -> torch.Tensor:
        return then(first(g, *of[:count]), *of[count:])

    return Sums(add, (*inner.of, *outer.of))


def one_of_each(columns: int, column: torch.Tensor) -> Sums:
    """Of ``rows[arange, column]``: one number of each row, and nothing to sum."""

    def add(g: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        of = column.remainder(columns).unsqueeze(1)
        return g.new_zeros((len(g), columns)).scatter(1, of, g.unsqueeze(1))

    return Sums(add, (column,))


def _add_groups(g: torch.Tensor, order: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    adder = adders.get(g.device.type)
    if adder is not None and adder.takes(g):
        return adder.sum(g, order, first)
    return torch.segment_reduce(g.index_select(0, order), "sum", offsets=first, unsafe=True)


class _How(NamedTuple):
    """The shape of the rows, what sums, and how many of the tensors that are saved are the index."""

    shape: torch.Size
    add: Callable[..., torch.Tensor]
    indices: int


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, how: _How, *of: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*of)
        ctx.how = how
        return rows[of[: how.indices]]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), of = grads, ctx.saved_tensors
        return None if g is None else _summed(g, ctx.how, of), None, *[None] * len(of)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: torch.Tensor, how: _How, *of: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*of)
        ctx.how = how
        return how.add(g, *of[how.indices :])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (h,), of = grads, ctx.saved_tensors
        return None if h is None else _taken_again(h, ctx.how, of), None, *[None] * len(of)


def _summed(g: torch.Tensor, how: _How, of: Tensors) -> torch.Tensor:
    if functorch_transform() is not None:  # is_grads_batched: torch's own has rules for it
        return g.new_zeros(how.shape).index_put(of[: how.indices], g, accumulate=True)
    if torch.is_grad_enabled() and g.requires_grad:
        return _Summed.apply(g, how, *of)  # type: ignore[no-any-return, no-untyped-call]
    return how.add(g, *of[how.indices :])


def _taken_again(h: torch.Tensor, how: _How, of: Tensors) -> torch.Tensor:
    if torch.is_grad_enabled() and h.requires_grad and functorch_transform() is None:
        return _Taken.apply(h, how, *of)  # type: ignore[no-any-return, no-untyped-call]
    return h[of[: how.indices]]
