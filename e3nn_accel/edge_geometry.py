"""Vectors and lengths of edges as MACE makes them, by kernels while a call is captured.

MACE's models ask ``get_edge_vectors_and_lengths`` for them. Its lengths are computed of its vectors, by which a
caller may differentiate (edge forces, models of others); those of the kernels aren't, so that both gradients come
back together. What is captured differentiates by positions and strains alone (`graphs.eligibility`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from e3nn_accel.branches import is_ready
from e3nn_accel.groupings import neighbours_begun
from e3nn_accel.ops.edge_vectors import Edges, EdgeVectorKernels, edge_vectors

kernels: dict[str, EdgeVectorKernels] = {}
"""By type of device, where something is faster than torch's operations; a backend puts it here."""

_wanted: ContextVar[bool] = ContextVar("e3nn_accel_edge_geometry", default=False)


@contextmanager
def while_captured() -> Iterator[None]:
    """Within it, what `by_kernels` made of MACE's function takes kernels."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def by_kernels(stock: Callable[..., Any]) -> Callable[..., Any]:
    """MACE's function, in captures by kernels; TorchScript and torch.compile see MACE's own."""

    def get_edge_vectors_and_lengths(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _wanted.get() or not _takes(*args, **kwargs):
            return stock(*args, **kwargs)
        return _computed(*args, **kwargs)

    get_edge_vectors_and_lengths.__prepare_scriptable__ = lambda: stock  # type: ignore[attr-defined]
    return get_edge_vectors_and_lengths


def _takes(positions: Any = None, edge_index: Any = None, shifts: Any = None, **other: Any) -> bool:
    """Whether a call is as MACE's models make it, and there are kernels for it."""
    tensors = positions, edge_index, shifts
    if other or not all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors):
        return False
    edges = edge_index.shape[-1:]
    return (
        positions.device.type in kernels
        and positions.device == edge_index.device == shifts.device
        and positions.dtype == shifts.dtype
        and positions.dtype in (torch.float32, torch.float64)
        and edge_index.dtype == torch.int64
        and (positions.dim(), positions.shape[-1:]) == (2, (3,))
        and edge_index.shape == (2, *edges)
        and shifts.shape == (*edges, 3)
    )


def _computed(
    positions: torch.Tensor, edge_index: torch.Tensor, shifts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    neighbours = neighbours_begun(edge_index, positions.shape[0])
    of = Edges(edge_index, neighbours.get, kernels[positions.device.type])
    vectors, lengths = edge_vectors(positions, shifts, of)
    return vectors, is_ready(lengths)
