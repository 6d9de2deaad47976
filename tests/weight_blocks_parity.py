"""The gradient of o3.Linear's weights by blocks that have a tile of them each, of however few rows, and counted."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from comparison import accelerated
from linear_parity import built

from e3nn_accel.backends.cuda import indexed_linear_launch
from e3nn_accel.backends.cuda.weight_blocks import WeightBlocks


def launches_of_few(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType) -> list[int]:
    """Rows of each call that follows, on a device like Hopper, in blocks of a step or two."""
    found: list[int] = []
    weights = WeightBlocks.weights

    def counted(self: Any, loaded: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(x.shape[0])
        return weights(self, loaded, x, *rest)

    monkeypatch.setattr(WeightBlocks, "weights", counted)
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", -1)
    monkeypatch.setattr(indexed_linear_launch, "architecture_of", lambda device: 90)
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: 20)
    monkeypatch.setattr(kernels, "LEAST", kernels.LEAST._replace(of_one=1))
    return found


def gradient(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """[channels, columns], of scalars."""
    module = built(f"{x.shape[1]}x0e", f"{g.shape[1]}x0e").to(x.dtype)
    with accelerated(backend="cuda", self_check=False):
        (found,) = torch.autograd.grad(module(x.clone().requires_grad_()), module.weight, g)
    return found.view(x.shape[1], g.shape[1])
