"""The inputs of a captured graph: tensors that stay where they are, real rows first, then dummies."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from e3nn_accel.graphs.copying import Copy, copies_to, copy_all
from e3nn_accel.graphs.padding import Axis, Capacity, Size

_contiguous = torch.Tensor.is_contiguous


class StaticInputs:
    """What a captured graph reads.

    Attributes:
        tensors: By name, of the size that was captured.
        bytes: What they take.
        size: Of the batch that they hold; None should copying it have been interrupted.
    """

    def __init__(
        self, dummies: Mapping[str, torch.Tensor], axes: Mapping[str, Axis], capacity: Capacity
    ) -> None:
        self._dummies = dict(dummies)
        self._axes = {name: axes[name] for name in dummies}
        self._axes_of = {
            of: [(name, axis) for name, axis in self._axes.items() if axis.of == of]
            for of in ("nodes", "edges", "graphs")
        }
        self._capacity = capacity
        self.tensors = {name: tensor.clone() for name, tensor in dummies.items()}
        self.bytes = 2 * sum(t.numel() * t.element_size() for t in self.tensors.values())
        self.size: Size | None = Size(0, 0, 0)
        self._dims = [(name, axis.dim) for name, axis in self._axes.items()]
        self._again: Copy | None = None
        """What copies another batch of the same size."""
        self._real = {
            name: _parts(tensor, self._axes[name], 0, self._axes[name].extra)
            for name, tensor in self.tensors.items()
        }

    def load(self, data: Mapping[str, torch.Tensor], size: Size) -> None:
        """Copy a batch in; rows that were real in the last one and aren't any more become dummies.

        Its dtypes and other dimensions are those that were captured.
        """
        before, self.size = self.size, None  # not known, should this be interrupted
        if size == before and self._again is not None:
            sources = self._sources(data)
            if all(map(_contiguous, sources)):
                self._again(sources)
                self.size = size
                return
        with torch.no_grad():
            targets: list[torch.Tensor] = []
            sources = []
            if size != before:
                self._resize(before, size, targets, sources)
                self._again = None
            elif self._again is None:
                self._again = copies_to([part for real in self._real.values() for part in real])
            for real in self._real.values():
                targets += real
            copy_all(targets, [*sources, *self._sources(data)])
            dummy_graphs = self._capacity.graphs - size.graphs - 1
            if dummy_graphs and size != before:
                # those before the last have no nodes: they end where the real ones end
                self.tensors["ptr"].narrow(0, size.graphs + 1, dummy_graphs).fill_(size.nodes)
        self.size = size

    def _sources(self, data: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for name, dim in self._dims:
            if dim == 0:
                found.append(data[name])
            else:
                found += data[name].unbind()
        return found

    def _resize(
        self,
        before: Size | None,
        size: Size,
        targets: list[torch.Tensor],
        sources: list[torch.Tensor],
    ) -> None:
        """Add what isn't real any more, and the dummies for it: at most steps of molecular dynamics a few edges."""
        for of, axes in self._axes_of.items():
            was, now = getattr(before or self._capacity, of), getattr(size, of)
            if now == was and before is not None:
                continue
            for name, axis in axes:
                length, freed = now * axis.each + axis.extra, (was - now) * axis.each
                self._real[name] = _parts(self.tensors[name], axis, 0, length)
                if freed > 0:
                    targets += _parts(self.tensors[name], axis, length, freed)
                    sources += _parts(self._dummies[name], axis, length, freed)


def _parts(tensor: torch.Tensor, axis: Axis, start: int, length: int) -> list[torch.Tensor]:
    """So many rows; of columns each row by itself, which lies in one piece and is copied with others."""
    part = tensor.narrow(axis.dim, start, length)
    return [part] if axis.dim == 0 else list(part.unbind())
