"""What e3nn 0.4's older networks import of torch_geometric, torch_cluster and torch_scatter, in plain torch.

These packages are compiled for one torch each. e3nn 0.6 has functions like these of its own.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch


def radius_graph(pos: torch.Tensor, r: float, batch: torch.Tensor) -> torch.Tensor:
    """Pairs of points of one graph that are closer than ``r``, (2, edges)."""
    near = (torch.cdist(pos, pos) < r) & (batch[:, None] == batch)
    return near.fill_diagonal_(False).nonzero().T


def scatter(
    src: torch.Tensor, index: torch.Tensor, dim: int, dim_size: int | None = None
) -> torch.Tensor:
    """Sums of rows by index."""
    assert dim == 0
    rows = int(index.max()) + 1 if dim_size is None else dim_size
    return src.new_zeros(rows, src.shape[1]).index_add(0, index, src)


def provide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make them importable, for one test."""
    contents = {
        "torch_cluster": {"radius_graph": radius_graph},
        "torch_scatter": {"scatter": scatter},
        "torch_geometric": {},
        "torch_geometric.data": {"Data": dict},
    }
    for name, functions in contents.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
