"""Where a step of MACECalculator goes, stock and accelerated: `e3nn-accel bench --profile`."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from e3nn_accel import switch
from e3nn_accel.cli.module_times import OTHER, Profile, profile
from e3nn_accel.cli.step_parts import PARTS, Clock, watched
from e3nn_accel.cli.tables import Table
from e3nn_accel.cli.timing import Spread, milliseconds
from e3nn_accel.interception import suspend
from e3nn_accel.quantities import dtype_of

STOCK = "e3nn"
WARM_UP, PROFILED = 6, 3
MOST_ROWS = 16
SPEED, PERIOD = 0.004, 60
"""Atoms swing by so many units of length at a step, and back within so many steps: as at room temperature."""


@dataclass(frozen=True)
class Step:
    """One way to do a step of one structure.

    Attributes:
        structure: Its formula.
        atoms: How many.
        way: "e3nn", "eager" or "graph".
        whole: Seconds of a step.
        parts: Mean seconds of each part, of steps in which every part waits for the device.
        host: Mean seconds until a call of the model returned.
        profile: By module and kernel.
    """

    structure: str
    atoms: int
    way: str
    whole: Spread
    parts: dict[str, float]
    host: float
    profile: Profile


class Steps:
    """Steps of a structure whose atoms swing a little."""

    def __init__(self, calculator: Any, atoms: Any) -> None:
        self.calculator, self.atoms, self._number = calculator, atoms.copy(), 0
        random = np.random.default_rng(0)
        self._direction = random.normal(scale=SPEED, size=atoms.positions.shape)

    def __call__(self) -> None:
        """Move, and calculate."""
        self.atoms.positions += self._direction * np.cos(2 * np.pi * self._number / PERIOD)
        self._number += 1
        self.calculator.calculate(self.atoms)


def profiled(
    model: Any, structures: list[Any], args: argparse.Namespace, step: Callable[[str], None]
) -> Iterator[Step]:
    """Every structure in every way."""
    with contextlib.redirect_stdout(io.StringIO()):  # what it says of other packages is no JSON
        importlib.import_module("mace.calculators")
    device = torch.device(args.device)
    dtype = args.dtype[0] if args.dtype else str(dtype_of(model)).removeprefix("torch.")
    model = copy.deepcopy(model).to(device, getattr(torch, dtype)).requires_grad_(False).eval()
    ways = (STOCK, "eager", "graph") if device.type == "cuda" else (STOCK, "eager")
    models = {way: copy.deepcopy(model) for way in ways}
    for way in ways:
        switch.accelerate(models[way], graph="auto" if way == "graph" else "0")
    timed: list[tuple[Steps, Step]] = []
    for atoms in structures:
        for way in ways:
            step(f"{atoms.get_chemical_formula()}, {way}")
            with _as(way):
                timed.append(_timed(models[way], atoms, way, args, dtype))
    # once the profiler has run in a process, it stays attached to the driver, and each launch takes longer
    for steps, found in timed:
        step(f"{found.structure}, {found.way}, profiled")
        with _as(found.way):
            yield replace(found, profile=profile(steps, models[found.way], PROFILED))


def _as(way: str) -> AbstractContextManager[None]:
    """Stock e3nn, where that is the way."""
    return suspend() if way == STOCK else contextlib.nullcontext()


def _timed(
    model: Any, atoms: Any, way: str, args: argparse.Namespace, dtype: str
) -> tuple[Steps, Step]:
    from mace.calculators import MACECalculator

    heads = getattr(model, "heads", None) or ["Default"]
    head = next((h for h in heads if h.lower() == "default"), heads[-1])
    calculator: Any = MACECalculator(
        models=model, device=args.device, default_dtype=dtype, head=head
    )
    steps = Steps(calculator, atoms)
    for _ in range(WARM_UP):
        steps()
    whole = []
    for _ in range(args.rounds):
        started = time.perf_counter()
        steps()
        whole.append(time.perf_counter() - started)
    clock = Clock(torch.device(args.device))
    with watched(clock, type(model), way == STOCK):
        for _ in range(args.rounds):
            with clock.part("rest"):
                steps()
    return steps, Step(
        atoms.get_chemical_formula(),
        len(atoms),
        way,
        Spread.of(whole),
        {name: clock.seconds[name] / args.rounds for name in PARTS},
        clock.host["model forward"] / args.rounds,
        Profile(),
    )


def tables(steps: list[Step], on_gpu: bool) -> Iterator[Table | str]:
    """Parts of a step, modules, and kernels, for people; of the largest structure alone the last two."""
    columns = ["structure", "way", "step ms", *PARTS]
    if on_gpu:
        columns += ["host", "launches", "GPU busy"]
    rows = []
    for s in steps:
        cells = [f"{s.structure[:24]}", s.way, milliseconds(s.whole)]
        cells += [_ms(s.parts[name]) for name in PARTS]
        if on_gpu:
            cells += [_ms(s.host), f"{s.profile.launches:.0f}", _ms(s.profile.busy)]
        rows.append(cells)
    yield Table(columns, rows, "a step of MACECalculator; parts in ms, each waited for")
    largest = max(s.atoms for s in steps)
    shown = [s for s in steps if s.atoms == largest]
    what = "GPU" if on_gpu else "CPU"
    yield ""
    yield _modules([s for s in shown if s.way != "graph"], what)
    for s in shown:
        yield ""
        yield _kernels(s, "kernel" if on_gpu else "operation")


def _modules(steps: list[Step], what: str) -> Table:
    columns = ["module"]
    for s in steps:
        columns += [f"{s.way} forward", f"{s.way} backward"]
    paths = {path for s in steps for path in s.profile.modules}
    largest = {p: max(sum(s.profile.modules.get(p, (0.0,))) for s in steps) for p in paths}
    rows = []
    for path in sorted(paths, key=lambda p: -largest[p])[:MOST_ROWS]:
        times = [t for s in steps for t in s.profile.modules.get(path, (0.0, 0.0))]
        rows.append([path, *map(_ms, times)])
    title = f"{steps[0].structure}: {what} time by module, ms a step ({OTHER}: what is in none)"
    return Table(columns, rows, title)


def _kernels(step: Step, what: str) -> Table:
    found = sorted(step.profile.kernels.items(), key=lambda item: -item[1][1])[:MOST_ROWS]
    rows = [[name[:72], f"{number:.0f}", _ms(seconds)] for name, (number, seconds) in found]
    return Table((what, "times", "ms"), rows, f"{step.structure}, {step.way}: time by {what}")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def document(steps: list[Step]) -> list[dict[str, Any]]:
    """For ``--json``."""
    return [asdict(step) for step in steps]
