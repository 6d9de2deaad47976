"""Rows taken by an index in MACE's forward: recognised, and given gradients that are fast to find.

torch sorts the index anew for the gradient of each ``rows[index]``, two dozen kernels, and sums a row's uses
by one warp that goes through all of them: 8 ms for the strain of 46 thousand edges of one structure on an
H100, where all else took 3.5. What MACE takes by an index has more structure than that, which gives the
same sums, as deterministic, without a sort of its own (`ops.gathers`):

- positions by the senders or receivers of edges: the grouping of edges that convolutions use;
- a structure's strain for each atom, ``strain[batch]``: few rows, many times each;
- a structure's cell for each edge, ``cell[batch[sender]]``: by the edge's sender, then by the structure;
- an atom's energy by its head, ``energies[arange, heads]``: one number of each row.

Where a model has one head, each atom takes what there is, and no kernel is needed, neither for that nor for the
scale and shift of its energy, ``scale[heads]``. (Another head's number is an error that torch finds on the device,
and stops the program for; here nobody looks. The calls before a capture do.) Nor is one needed for a narrow part
that is the whole, as e3nn's activation takes it, whose gradient torch copies into zeros.

Strains are applied without cuBLAS, too (`ops.small_products`).

Whoever makes MACE's forward eagerly pays for `QuickGathers` at each torch function that is called within it,
2 microseconds, a thousand times in a forward. So there it is on while MACE prepares the graph, and no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from e3nn_accel.groupings import neighbours_of
from e3nn_accel.ops.gathers import Sums, grouped, in_two_steps, of_few_rows, one_of_each, taken
from e3nn_accel.ops.small_products import is_vectors_by_matrices, vectors_by_matrices

FEW_ROWS = 64
"""To choose from, at most; of each at least one use."""
COPIES = 1 << 24
"""Numbers in the copies of a gradient that `of_few_rows` makes, at most."""

_wanted: ContextVar[bool] = ContextVar("e3nn_accel_gathers", default=False)


@contextmanager
def while_graphs_are_prepared() -> Iterator[None]:
    """Within it, what `in_preparation` made of MACE's function is in `QuickGathers`."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def in_preparation(stock: Callable[..., Any]) -> Callable[..., Any]:
    """MACE's function that prepares the graph, whose gathers are quick where a model's call wants them.

    TorchScript and torch.compile see MACE's own.
    """

    def prepare_graph(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _wanted.get():
            return stock(*args, **kwargs)
        with QuickGathers():
            return stock(*args, **kwargs)

    prepare_graph.__prepare_scriptable__ = lambda: stock  # type: ignore[attr-defined]
    return prepare_graph


class QuickGathers(TorchFunctionMode):
    """Within it, ``rows[index]`` has a gradient that is fast to find wherever the index's structure is known."""

    def __init__(self) -> None:
        super().__init__()
        # by number of the tensor, which is kept: another could get its number
        self._ends: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._of_ends: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
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
        if func is torch.Tensor.__setitem__:
            rows, index, value = args
            return torch.Tensor.__setitem__(rows, index, _on_its_device(rows, index, value))
        if is_vectors_by_matrices(func, args, kwargs):
            return vectors_by_matrices(*args[1:])
        if func is torch.Tensor.narrow and _is_whole(*args, **(kwargs or {})):
            return args[0].view_as(args[0])
        out = func(*args, **(kwargs or {}))
        if func is torch.arange and len(args) == 1:
            self._counting[id(out)] = out
        return out

    def _taken(self, rows: torch.Tensor, index: Any) -> Any:
        if type(index) is tuple and self._one_of_each(rows, index):
            if rows.shape[1] == 1 and _takes_the_only_one(index[1]):
                return rows.squeeze(1)
        elif _one_number(rows, index) and _takes_the_only_one(index):
            return rows.expand(index.shape)
        if _differentiated(rows):
            sums = self._sums(rows, index)
            if sums is not None:
                return taken(rows, index if type(index) is tuple else (index,), sums)
        out = rows[index]
        if type(index) is int and index in (0, 1) and _like_edge_index(rows):
            self._ends[id(out)] = out, rows, index
        elif id(index) in self._ends and _an_index(rows):
            self._of_ends[id(out)] = out, index, rows
        return out

    def _sums(self, rows: torch.Tensor, index: Any) -> Sums | None:
        """How to find the gradient of ``rows[index]``, or None where torch's own way is as good."""
        if type(index) is tuple:
            return one_of_each(rows.shape[1], index[1]) if self._one_of_each(rows, index) else None
        if not _an_index(index) or index.device != rows.device:
            return None
        if id(index) in self._of_ends and rows.shape[0] > 1:
            _, end, of_node = self._of_ends[id(index)]
            if _few(rows, of_node):
                by_end = self._by_end(end, of_node.shape[0])
                return in_two_steps(by_end, of_few_rows(rows.shape[0], of_node))
        if id(index) in self._ends:
            return self._by_end(index, rows.shape[0])
        return of_few_rows(rows.shape[0], index) if _few(rows, index) else None

    def _by_end(self, index: torch.Tensor, nodes: int) -> Sums:
        _, edge_index, end = self._ends[id(index)]
        edges = neighbours_of(edge_index, nodes)
        if end:
            return grouped(edges.by_receiver, edges.first_of_receiver)
        return grouped(edges.by_sender, edges.first_of_sender)

    def _one_of_each(self, rows: torch.Tensor, index: Any) -> bool:
        return (
            len(index) == 2
            and rows.dim() == 2
            and rows.shape[1] > 0
            and id(index[0]) in self._counting
            and _an_index(index[1])
            and index[1].device == rows.device
            and index[0].shape == index[1].shape == rows.shape[:1]
        )


def _on_its_device(rows: torch.Tensor, index: Any, value: Any) -> Any:
    """What is written to ``rows[index]``: torch makes a number a tensor of the host, and waits until it is copied.

    So MACE masks the readouts of other heads, and no capture takes that. By a mask alone torch fills, without waiting.
    """
    numbers = [of for of in (index if type(index) is tuple else (index,)) if _is_of_numbers(of)]
    if not numbers or type(value) not in (bool, int, float):
        return value
    return torch.full((), value, dtype=rows.dtype, device=rows.device)


def _is_of_numbers(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype not in (torch.bool, torch.uint8)


def _is_whole(rows: torch.Tensor, dim: Any = None, start: Any = None, length: Any = None) -> bool:
    dims = rows.dim()
    return type(dim) is int and start == 0 and -dims <= dim < dims and length == rows.shape[dim]


def _differentiated(rows: torch.Tensor) -> bool:
    return (
        rows.requires_grad
        and rows.dim() > 0
        and rows.dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
    )


def _an_index(index: Any) -> bool:
    return type(index) is torch.Tensor and index.dtype == torch.int64 and index.dim() == 1


def _one_number(rows: torch.Tensor, index: Any) -> bool:
    return rows.shape == (1,) and _an_index(index) and index.device == rows.device


def _takes_the_only_one(index: torch.Tensor) -> bool:
    """On a GPU taken for granted, where to look is to wait; elsewhere another is torch's error."""
    return index.is_cuda or bool(((index == 0) | (index == -1)).all())


def _few(rows: torch.Tensor, index: torch.Tensor) -> bool:
    count, uses = rows.shape[0], index.shape[0]
    return 0 < count <= min(FEW_ROWS, uses) and uses * rows.numel() <= COPIES


def _like_edge_index(rows: torch.Tensor) -> bool:
    return rows.dtype == torch.int64 and rows.dim() == 2 and rows.shape[0] == 2
