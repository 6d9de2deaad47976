"""A call of a model that isn't replayed: MACE's forward, in which gathers have gradients of our own.

A training step is one, and so is the first call of each size.
"""

from __future__ import annotations

from typing import Any

import torch

from e3nn_accel import compat
from e3nn_accel.gathers import while_graphs_are_prepared
from e3nn_accel.graphs import GATHERS
from e3nn_accel.graphs.eligibility import data_of
from e3nn_accel.guard import program_transform
from e3nn_accel.interception import stock_call
from e3nn_accel.runner import Runner

ENOUGH_EDGES = 8192
"""Of a batch. With fewer the device waits for the host anyway, which takes up to a millisecond more a step than for
torch's gradients: on an H100 a training step took 19.0 ms instead of 18.2 with 2928 edges, and 23.4 instead of 32.7
with 45700 (`tests/gpu/time_training_steps.py`)."""
HOW = "gradients by positions and cells are summed by the grouping of edges, without sorting"


def eager_call(
    module: torch.nn.Module, runner: Runner, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``module(...)``, counted by whose gradients its gathers have."""
    if not torch.is_grad_enabled():
        return stock_call(module, args, kwargs)
    if _edges(args, kwargs) < ENOUGH_EDGES:
        return stock_call(module, args, kwargs)
    reason = _left_to_torch(runner, kwargs)
    if reason:
        runner.count(GATHERS, "torch", reason)
        return stock_call(module, args, kwargs)
    runner.notes[GATHERS] = HOW
    runner.count(GATHERS, "grouped", "")
    with while_graphs_are_prepared():
        return stock_call(module, args, kwargs)


def _left_to_torch(runner: Runner, kwargs: dict[str, Any]) -> str:
    """Why torch's own gradients are wanted, or an empty string."""
    reason = runner.left or program_transform()
    if not reason and compat.dispatch_mode_active():
        reason = "a torch dispatch mode is on"
    if not reason and kwargs.get("compute_hessian"):
        reason = "compute_hessian=True: gradients are found by vmap"
    return reason


def _edges(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    data = data_of(args, kwargs)
    edge_index = data.get("edge_index") if isinstance(data, dict) else None
    return edge_index.shape[-1] if isinstance(edge_index, torch.Tensor) else 0
