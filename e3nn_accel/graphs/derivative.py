"""Gradients of a captured forward, by walking through autograd's graph of it once more, captured, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from e3nn_accel.compat import double_of, zero_all
from e3nn_accel.graphs.copying import copy_all
from e3nn_accel.graphs.outputs import Live, NotCapturable, Produced
from e3nn_accel.graphs.padding import Axis, Size


class Derivative:
    """Gradients of the results of one captured forward, by parameters and by inputs that forward marks.

    Args:
        doubles: What stands for the model's parameters while it is captured (`in_place_of_parameters`).

    Attributes:
        parameters: Of the model, those that require gradients.
        given: Gradients of the results, zero unless loaded, padded; of those in ``places``.
        places: Which results have gradients.
        leaves: Names of inputs, and of the displacement, by which it is differentiated besides.
        reached: By result of ``places``, for which of leaves and parameters it has a gradient.
    """

    def __init__(self, doubles: Mapping[torch.nn.Parameter, torch.nn.Parameter]) -> None:
        self.parameters = tuple(doubles)
        self._doubles = tuple(doubles.values())
        self.given: tuple[torch.Tensor, ...] = ()
        self.places: tuple[int, ...] = ()
        self.leaves: tuple[str, ...] = ()
        self.reached: tuple[tuple[bool, ...], ...] = ()
        self._axes: tuple[Axis, ...] = ()
        self._size: Size | None = None
        self._zero: list[bool] = []

    def prepare(self, produced: Produced) -> None:
        """Make room for gradients of these results, and find out which of them depends on what.

        Raises:
            NotCapturable: A parameter is used that isn't found among those of its module.
        """
        live = _live(produced)
        self.places = tuple(live.results)
        self.leaves = tuple(live.leaves)
        self.given = tuple(torch.zeros_like(live.results[n]) for n in self.places)
        self._axes = tuple(produced.results[n].axis for n in self.places)
        self._zero = [True] * len(self.places)
        wanted = [*live.leaves.values(), *self._doubles]
        pairs = zip(self._doubles, self.parameters, strict=True)
        elsewhere = [p for double, p in pairs if double is not p]
        found = []
        for n, given in zip(self.places, self.given, strict=True):
            gradients = torch.autograd.grad(
                live.results[n], [*wanted, *elsewhere], given, retain_graph=True, allow_unused=True
            )
            there = [gradient is not None for gradient in gradients]
            if any(there[len(wanted) :]):
                raise NotCapturable("forward uses a parameter that isn't one of its module's")
            found.append(there)
        self._leave_out_unreached(found)

    def _leave_out_unreached(self, reached: list[list[bool]]) -> None:
        """Parameters on which nothing depends are no part of the graph: data-parallel training looks."""
        first, kept = len(self.leaves), len(self.leaves) + len(self.parameters)
        used = [n for n in range(kept) if n < first or any(row[n] for row in reached)]
        self.reached = tuple(tuple(row[n] for n in used) for row in reached)
        self.parameters = tuple(self.parameters[n - first] for n in used if n >= first)
        self._doubles = tuple(self._doubles[n - first] for n in used if n >= first)

    def __call__(self, produced: Produced) -> tuple[torch.Tensor | None, ...]:
        """Of leaves, then of parameters; frees autograd's graph."""
        live = _live(produced)
        wanted = [*live.leaves.values(), *self._doubles]
        results = [live.results[n] for n in self.places]
        return torch.autograd.grad(results, wanted, self.given, allow_unused=True)

    def load(self, grads: Sequence[torch.Tensor | None], size: Size) -> None:
        """Copy in gradients of the results of a call of this size; padding has none."""
        if size != self._size:
            zero_all(self.given)
            self._zero, self._size = [True] * len(self.given), size
        targets, sources = [], []
        for n, (given, axis, grad) in enumerate(zip(self.given, self._axes, grads, strict=True)):
            if grad is not None:
                targets.append(given.narrow(axis.dim, 0, axis.length(size)))
                sources.append(grad.detach())
            elif not self._zero[n]:
                given.zero_()
            self._zero[n] = grad is None
        copy_all(targets, sources)

    def reached_by(self, grads: Sequence[torch.Tensor | None]) -> tuple[bool, ...]:
        """Which of leaves and parameters have a gradient where these results have one."""
        given = [r for r, grad in zip(self.reached, grads, strict=True) if grad is not None]
        return tuple(map(any, zip(*given, strict=True)))


@contextmanager
def in_place_of_parameters(
    model: torch.nn.Module,
) -> Iterator[dict[torch.nn.Parameter, torch.nn.Parameter]]:
    """Within it the parameters that require gradients are others, on the same memory.

    Whatever is left of a step before, its loss or results, keeps autograd's node for each parameter; and
    autograd has the stream of that node wait for a gradient, which no other stream than the captured one may.
    These parameters have nodes of their own. TorchScript's stand for themselves.

    Yields:
        By parameter what stands for it.
    """
    doubles: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    tables: list[tuple[dict[str, Any], str, torch.nn.Parameter]] = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            doubles |= {p: p for p in module.parameters(recurse=False) if p.requires_grad}
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                tables.append((module._parameters, name, parameter))
                if parameter not in doubles:
                    doubles[parameter] = double_of(parameter)
    try:
        for table, name, parameter in tables:
            table[name] = doubles[parameter]
        yield doubles
    finally:
        for table, name, parameter in tables:
            table[name] = parameter


def _live(produced: Produced) -> Live:
    assert produced.live is not None
    return produced.live
