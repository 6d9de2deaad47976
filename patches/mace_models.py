"""MACE's models: a whole call of one may be captured once and replayed (`e3nn_accel.graphs`).

Where it isn't, the function that prepares the graph takes rows by quick gathers (`e3nn_accel.gathers`). In captures
edges' vectors and lengths are found by kernels (`e3nn_accel.edge_geometry`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from e3nn_accel import compat

if TYPE_CHECKING:
    from e3nn_accel.graphs.calls import ModelCalls

MODULE = "mace.modules.models"
CLASSES = ("MACE", "ScaleShiftMACE")
"""Their subclasses with a forward of their own (MACELES, PolarMACE, ..) run eagerly."""


PREPARES = "prepare_graph"
"""A function that the modules below have by this name."""
PREPARING = (MODULE, "mace.modules.extensions")
EDGES = "mace.modules.utils:get_edge_vectors_and_lengths"
"""What that function asks for vectors and lengths of edges."""


def call_for(cls: type[torch.nn.Module], calls: ModelCalls) -> Callable[..., Any]:
    """The ``__call__`` to put on a model's class."""
    stock_forward = compat.original_forward(cls)

    def __call__(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # first: torch.compile traces this
            return torch.nn.Module.__call__(module, *args, **kwargs)
        return calls.call(module, stock_forward, args, kwargs)

    return __call__
