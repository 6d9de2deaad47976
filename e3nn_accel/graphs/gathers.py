"""Rows taken by an index: their gradients, while a model call is captured.

torch sorts the index anew for the gradient of each ``rows[index]``, two dozen kernels, and sums a row's uses
by one warp that goes through all of them: 8 ms for the strain of 46 thousand edges of one structure on an
H100, where all else took 3.5. What MACE takes by an index has more structure than that, which gives the
same sums, as deterministic, without a sort of its own:

- positions by the senders or receivers of edges: the grouping of edges that convolutions use;
- a structure's strain for each atom and edge, ``strain[batch]``: few rows, many times each. All uses are
  summed at once, at the cost of a copy of the gradient for each row that there is to choose from;
- an atom's energy by its head, ``energies[arange, heads]``: one number of each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from e3nn_accel.graphs.small_products import is_vectors_by_matrices, vectors_by_matrices
from e3nn_accel.groupings import Neighbours, neighbours_of

FEW_ROWS = 16
"""To choose from: as many copies of the gradient are made."""
MANY_USES = 64
"""Of each row on average; below, torch's own gradient is as fast."""


class QuickGathers(TorchFunctionMode):
    """Within it, ``rows[index]`` has a gradient that is fast to find wherever the index's structure is known."""

    def __init__(self) -> None:
        super().__init__()
        # by number of the tensor, which is kept: another could get its number
        self._ends: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._counting: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            return self._taken(*args)
        if is_vectors_by_matrices(func, args, kwargs):
            return vectors_by_matrices(*args[1:])
        out = func(*args, **(kwargs or {}))
        if func is torch.arange and len(args) == 1:
            self._counting[id(out)] = out
        return out

    def _taken(self, rows: torch.Tensor, index: Any) -> Any:
        if _differentiated(rows):
            if _few_for_many(rows, index):
                return _OfFewRows.apply(rows, index)  # type: ignore[no-untyped-call]
            if id(index) in self._ends:
                _, edge_index, end = self._ends[id(index)]
                edges = neighbours_of(edge_index, rows.shape[0])
                return _OfEnds.apply(rows, index, edges, end)  # type: ignore[no-untyped-call]
            if self._one_of_each(rows, index):
                return _OneOfEach.apply(rows, index[1])  # type: ignore[no-untyped-call]
        taken = rows[index]
        if type(index) is int and index in (0, 1) and _like_edge_index(rows):
            self._ends[id(taken)] = taken, rows, index
        return taken

    def _one_of_each(self, rows: torch.Tensor, index: Any) -> bool:
        return (
            type(index) is tuple
            and len(index) == 2
            and rows.dim() == 2
            and id(index[0]) in self._counting
            and _an_index(index[1])
            and index[0].shape == index[1].shape == rows.shape[:1]
        )


def _differentiated(rows: torch.Tensor) -> bool:
    return rows.requires_grad and rows.dim() > 0 and torch.is_grad_enabled()


def _an_index(index: Any) -> bool:
    return type(index) is torch.Tensor and index.dtype == torch.int64 and index.dim() == 1


def _few_for_many(rows: torch.Tensor, index: Any) -> bool:
    return (
        _an_index(index)
        and 0 < rows.shape[0] <= FEW_ROWS
        and index.shape[0] >= MANY_USES * rows.shape[0]
    )


def _like_edge_index(rows: torch.Tensor) -> bool:
    return rows.dtype == torch.int64 and rows.dim() == 2 and rows.shape[0] == 2


class _OfFewRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.count = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (index,) = grads, ctx.saved_tensors
        numbers = torch.arange(ctx.count, device=index.device)
        uses = (index.unsqueeze(1) == numbers).view(*index.shape, ctx.count, *[1] * (g.dim() - 1))
        return torch.where(uses, g.unsqueeze(1), g.new_zeros(())).sum(0), None


class _OfEnds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, index: torch.Tensor, edges: Neighbours, end: int
    ) -> torch.Tensor:
        order = (edges.by_sender, edges.by_receiver)[end]
        first = (edges.first_of_sender, edges.first_of_receiver)[end]
        ctx.save_for_backward(order, first)
        return rows[index]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (order, first) = grads, ctx.saved_tensors
        sums = torch.segment_reduce(g.index_select(0, order), "sum", offsets=first, unsafe=True)
        return sums, None, None, None


class _OneOfEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        columns = rows.shape[1]
        of = torch.where(column < 0, column + columns, column).unsqueeze(1)  # as indexing counts
        ctx.save_for_backward(of)
        ctx.columns = columns
        return rows.gather(1, of).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (of,) = grads, ctx.saved_tensors
        return g.new_zeros((len(g), ctx.columns)).scatter(1, of, g.unsqueeze(1)), None
