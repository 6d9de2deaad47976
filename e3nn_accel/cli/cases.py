"""What `bench` times: whole calls, training steps, and operations."""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from e3nn_accel import switch
from e3nn_accel.cli import CommandError
from e3nn_accel.cli.operations import OURS, STOCK, operations_of, time_operation
from e3nn_accel.cli.timing import Measurement, Prepare, measure
from e3nn_accel.health import registry
from e3nn_accel.interception import suspend
from e3nn_accel.quantities import compute, device_of, dtype_of, training_step
from e3nn_accel.structures import batch_of, cast, default_dtype


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        kind: "call", "training step" or "operation".
        name: The structure, or the operation's modules.
        mode: What was computed.
        dtype: Of the model.
        detail: Sizes.
        result: The times.
    """

    kind: str
    name: str
    mode: str
    dtype: str
    detail: str
    result: Measurement


class Bench:
    """A copy of the model in one dtype, accelerated, beside what ``against`` names."""

    def __init__(
        self, model: Any, dtype: torch.dtype, args: argparse.Namespace, step: Callable[[str], None]
    ) -> None:
        self.args, self.step, self.dtype = args, step, dtype
        self.device = torch.device(args.device)
        own = copy.deepcopy(model).to(self.device, dtype).requires_grad_(False).eval()
        self.model = switch.accelerate(own)
        self.others: dict[str, Any] = {}
        for name in args.against:
            if name != STOCK:
                _check_backend(name)
                self.others[name] = switch.accelerate(copy.deepcopy(self.model), backend=name)

    def cases(self, structures: list[Any]) -> Iterator[Case]:
        """Whole calls of every structure, then the operations of the first."""
        dtype = str(self.dtype).removeprefix("torch.")
        graphs = [
            cast(batch_of(self.model, atoms, self.dtype), self.dtype, self.device)
            for atoms in structures
        ]
        for atoms, graph in zip(structures, graphs, strict=True):
            name = atoms.get_chemical_formula()
            detail = f"{len(atoms)} atoms, {graph['edge_index'].shape[1]} edges"
            self.step(f"{name}, {detail}, {dtype}")
            result = self._measure(functools.partial(_force_call, graph=graph))
            yield Case("call", name, "energy+forces", dtype, detail, result)
            if self.args.train:
                sizes = compute(self.model, graph, stress=False)
                result = self._measure(functools.partial(_training_step, graph=graph, sizes=sizes))
                yield Case("training step", name, "parameter gradients", dtype, detail, result)
        if not self.args.ops:
            return
        # where calls of the model are replayed, its modules aren't called
        eager = switch.accelerate(copy.deepcopy(self.model), graph="0")
        found = operations_of(eager, _force_call(eager, graphs[0]))
        for operation in found:
            name = f"{operation.operation}: {', '.join(operation.paths)}"
            self.step(name)
            modes = time_operation(operation, self.args.rounds, self.args.train)
            for mode, result in modes.items():
                yield Case("operation", name, mode, dtype, operation.shapes, result)

    def _measure(self, prepare: Callable[[Any], Callable[[], object]]) -> Measurement:

        ways: dict[str, Prepare] = {}
        for name in self.args.against:
            if name == STOCK:
                ways[name] = lambda: _suspended(prepare(self.model))
            else:
                ways[name] = functools.partial(prepare, self.others[name])
        ways[OURS] = functools.partial(prepare, self.model)
        return measure(ways, OURS, self.args.rounds, self.device)


def _force_call(model: Any, graph: dict[str, Any]) -> Callable[[], object]:

    data = cast(graph, dtype_of(model), device_of(model))

    def call() -> object:
        with default_dtype(dtype_of(model)):
            return model(data, compute_force=True)

    return call


def _training_step(model: Any, graph: Any, sizes: Any) -> Callable[[], object]:

    return lambda: training_step(model, graph, sizes)


def _suspended(call: Callable[[], object]) -> Callable[[], object]:

    def stock() -> object:
        with suspend():
            return call()

    return stock


def _check_backend(name: str) -> None:

    answers = {backend.name: availability for backend, availability in registry().backends()}
    if name not in answers:
        raise CommandError(f"--against {name}: there are {', '.join((STOCK, *answers))}")
    if not answers[name].ok:
        raise CommandError(f"--against {name}: {answers[name].reason}", code=1)
