"""Where the time of a calculator's step goes: clocks around what a step is made of."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("neighbour list", "batch", "model forward", "model backward", "rest")
"""Of a step, in this order; a graph's replay, both in one, counts as forward."""


class Clock:
    """Seconds of parts of a step; of parts within parts each has its own alone.

    Attributes:
        seconds: By part, until the device had finished.
        host: By part, until the host went on.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.host: dict[str, float] = defaultdict(float)
        self._device = device
        self._within: list[float] = []

    @contextmanager
    def part(self, name: str, waits: bool = False) -> Iterator[None]:
        """The block is a part; if it ``waits``, so is what it left the device to do."""
        self._within.append(0.0)
        started = time.perf_counter()
        try:
            yield
            self.host[name] += time.perf_counter() - started
            if waits and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            took = time.perf_counter() - started
            self.seconds[name] += took - self._within.pop()
            if self._within:
                self._within[-1] += took

    def timing(self, function: Callable[..., Any], name: str, waits: bool) -> Callable[..., Any]:
        """The function as a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name, waits):
                return function(*args, **kwargs)

        return timed


@contextmanager
def watched(clock: Clock, model: type, stock: bool) -> Iterator[None]:
    """Within it the clock sees the parts of MACECalculator's steps with models of a class.

    Of accelerated ones the calculator's own methods are left alone: it looks whether they are MACE's.
    """
    import mace.calculators.mace as calculators
    from mace.data import atomic_data, neighborhood

    from e3nn_accel.neighbours.state import CalculatorState

    places: list[tuple[Any, str, str, bool]] = [
        (atomic_data, "get_neighborhood", "neighbour list", False),
        (neighborhood, "get_neighborhood", "neighbour list", False),
        (model, "__call__", "model forward", True),
        (torch.autograd, "grad", "model backward", True),
    ]
    owner, names = (
        (calculators.MACECalculator, ("_atoms_to_batch", "_clone_batch"))
        if stock
        else (CalculatorState, ("tensors", "batch"))
    )
    places += [(owner, name, "batch", True) for name in names]
    before = [(owner, name, vars(owner).get(name)) for owner, name, _, _ in places]
    for owner, name, part, waits in places:
        setattr(owner, name, clock.timing(getattr(owner, name), part, waits))
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
