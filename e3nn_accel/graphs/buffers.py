"""The inputs of a captured graph: tensors that stay where they are, real rows first, then dummies."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from e3nn_accel.compat import copy_all
from e3nn_accel.graphs.padding import Axis, Capacity, Size


class StaticInputs:
    """What a captured graph reads.

    Attributes:
        tensors: By name, of the size that was captured.
        bytes: What they take.
    """

    def __init__(
        self, dummies: Mapping[str, torch.Tensor], axes: Mapping[str, Axis], capacity: Capacity
    ) -> None:
        self._dummies = dict(dummies)
        self._axes = {name: axes[name] for name in dummies}
        self._capacity = capacity
        self.tensors = {name: tensor.clone() for name, tensor in dummies.items()}
        self.bytes = 2 * sum(t.numel() * t.element_size() for t in self.tensors.values())
        self._size: Size | None = None
        self._lengths = dict.fromkeys(self.tensors, 0)
        self._real: list[torch.Tensor] = []

    def load(self, data: Mapping[str, torch.Tensor], size: Size) -> None:
        """Copy a batch in; rows that were real in the last one and aren't any more become dummies."""
        with torch.no_grad():
            if size != self._size:
                self._resize(size)
            copy_all(self._real, [data[name] for name in self.tensors])

    def _resize(self, size: Size) -> None:
        self._real = []
        for name, tensor in self.tensors.items():
            axis, before = self._axes[name], self._lengths[name]
            now = self._lengths[name] = axis.length(size)
            if now < before:
                freed = tensor.narrow(axis.dim, now, before - now)
                freed.copy_(self._dummies[name].narrow(axis.dim, now, before - now))
            self._real.append(tensor.narrow(axis.dim, 0, now))
        # dummy graphs before the last have no nodes: they end where the real ones end
        self.tensors["ptr"][size.graphs + 1 : -1] = size.nodes
        self._size = size
