"""Time the host's part of a training step on the cuda backend: everything up to the driver, which does nothing here.

python tests/time_training_host.py [tiny|mp0-medium] [profile]

As `time_dispatch.py`, which says what is missing, for a whole model: silane, five atoms, so that what torch
computes on the CPU takes little time next to calling it. Loss of energy, forces and stress. "gathers" is with
gradients of gathers as on a GPU, "torch's gathers" without. Milliseconds, median with quartiles; both
take turns. ``profile`` lists where the time goes.
"""

from __future__ import annotations

import contextlib
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from time_dispatch import without_a_device

import e3nn_accel
from e3nn_accel import structures, switch
from e3nn_accel.cli.shapes import build
from e3nn_accel.graphs import eager

ROUNDS = 60
Call = Callable[[], Any]


def parts_of(model: Any, batch: dict[str, Any]) -> dict[str, Call]:
    """What is timed, by name."""

    def forward() -> Any:
        data = {k: v.detach() if torch.is_tensor(v) else v for k, v in batch.items()}
        return model(data, training=True, compute_stress=True)

    def step() -> None:
        model.zero_grad()
        out = forward()
        sum(out[name].square().mean() for name in ("energy", "forces", "stress")).backward()

    def by_torch(call: Call) -> Call:
        return lambda: with_gathers_on("cuda", call)

    def quickly(call: Call) -> Call:
        return lambda: with_gathers_on("cpu", call)

    return {
        "energy, forces, stress": quickly(forward),
        ".. torch's gathers": by_torch(forward),
        "and the loss' gradients": quickly(step),
        ".. torch's gathers ": by_torch(step),
    }


def with_gathers_on(device: str, call: Call) -> None:
    """Calls of models are taken where the batch is on this kind of device."""
    assert switch.active.dispatcher is not None
    switch.active.dispatcher.model_calls.device_type = device
    call()


def timed(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Milliseconds of each, calls taking turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 5):
        for name, call in calls.items():
            started = time.thread_time()
            call()
            if round_ >= 5:
                found[name].append(1e3 * (time.thread_time() - started))
    return found


def profiled(call: Call) -> None:
    """Where the time of a call goes."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(ROUNDS):
        call()
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(45)


def main(shape: str, profile: bool) -> None:
    """Print a row for each part."""
    from ase.build import molecule

    torch.set_num_threads(1)
    model: Any = build(shape)
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_a_device())
        # nothing is computed, so that there is nothing to compare with stock e3nn
        stack.enter_context(e3nn_accel.enabled(self_check=False))
        stack.enter_context(patch.object(eager, "ENOUGH_EDGES", 0))
        batch = structures.batch_of(model, molecule("SiH4"), torch.float32)
        calls = parts_of(model, batch)
        for name, times in timed(calls).items():
            low, median, high = statistics.quantiles(times, n=4, method="inclusive")
            print(f"{name:26} {median:7.3f} [{low:.3f}-{high:.3f}]", flush=True)
        if profile:
            profiled(list(calls.values())[2])


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if argument != "profile"]
    main(names[0] if names else "tiny", "profile" in sys.argv[1:])
