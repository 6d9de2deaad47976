"""Time the host's part of a call that is replayed: everything but the launch of its graph, which does nothing here.

python tests/time_replay_host.py [tiny|mp0-medium|off-large] [atoms] [profile]

From having a batch's tensors to having results, with frozen parameters, on CPU tensors: what a device adds (launches of
a few copies, counted as kernels of their own; torch's allocator) is missing, and what the CPU copies is in it. In
"edges come and go" each call has a few edges more or fewer than the last, as in molecular dynamics. "graph" is as
`MACECalculator` has it, "graph=1" with results detached; a training step is its forward and the gradients of a loss,
of which a large model's are mostly copying. Microseconds, medians with quartiles, all ways taking turns, and how often
torch is asked to copy. ``profile`` lists where the time goes.
"""

from __future__ import annotations

import contextlib
import cProfile
import io
import itertools
import os
import pstats
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch
from model_graphs import CpuLane, StandIn, replaying, rows
from torch.overrides import TorchFunctionMode

from e3nn_accel import structures
from e3nn_accel.cli.shapes import build, structure
from e3nn_accel.cli.timing import Spread
from e3nn_accel.graphs.model_state import ENOUGH

ROUNDS, CALLS = 30, 20
PER_EDGE = {"edge_index": 1, "shifts": 0, "unit_shifts": 0}
Call = Callable[[], Any]


class Nothing(CpuLane):
    """Where a replay launches nothing: results are those of the capture."""

    def record(self, run: Any, derivative: Any = None) -> StandIn:
        """Captured as ever."""
        found: Any = super().record(run, derivative)
        found.replay = lambda: None
        found.replay_gradients = lambda: found.gradients
        return found


def calls_of(model: Any, batch: dict[str, Any], training: bool) -> dict[str, Call]:
    """By name; each makes tensors anew, in which nothing is copied."""
    edges = batch["edge_index"].shape[1]
    fewer = [{**batch, **{name: batch[name].narrow(dim, 0, edges - 2 * n).contiguous()
                          for name, dim in PER_EDGE.items()}} for n in range(5)]  # fmt: skip
    turns = itertools.cycle(fewer)

    def data(batch: dict[str, Any] = batch) -> dict[str, Any]:
        return {name: tensor.detach() for name, tensor in batch.items()}

    def step() -> None:
        out = model(data(), training=True, compute_stress=True)
        loss = out["energy"].sum() + out["forces"].sum()
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    if training:
        return {"training step": step}
    return {
        "forces": lambda: model(data()),
        "edges come and go": lambda: model(data(next(turns))),
        "forces, stress": lambda: model(data(), compute_stress=True),
        "its batch alone": data,
    }


def timed(calls: dict[str, Call]) -> dict[str, Spread]:
    """Seconds of the processor."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            started = time.thread_time()
            for _ in range(CALLS):
                call()
            found[name].append((time.thread_time() - started) / CALLS)
    return {name: Spread.of(times) for name, times in found.items()}


class Copies(TorchFunctionMode):
    """Counts what a device would be asked to copy: each call a kernel or a transfer."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """As ever."""
        self.number += function in (torch.Tensor.copy_, torch._foreach_copy_)
        return function(*args, **(kwargs or {}))


def copies(call: Call) -> float:
    """Of a call, on average."""
    with Copies() as counting:
        for _ in range(CALLS):
            call()
    return counting.number / CALLS


def profiled(call: Call) -> None:
    """Where the time of a call goes."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(10 * CALLS):
        call()
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(30)
    print(text.getvalue())


def main(shape: str = "mp0-medium", atoms: str = "64", *options: str) -> None:
    """Print a row for each way."""
    torch.set_num_threads(1)
    for way, settings in (("graph", {}), ("graph=1", {"graph": "1"}), ("training", {})):
        model: Any = build(shape).requires_grad_(way == "training")
        batch = structures.batch_of(model, structure(shape, int(atoms)), torch.float32)
        calls = calls_of(model, batch, way == "training")
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaying(Nothing, self_check=False, **settings))
            for _ in range(ENOUGH + 1):
                for call in calls.values():
                    call()
            for name, spread in timed(calls).items():
                low, median, high = (1e6 * t for t in (spread.low, spread.median, spread.high))
                print(
                    f"{way:10} {name:18} {median:7.1f} [{low:.1f}-{high:.1f}]  "
                    f"{copies(calls[name]):.1f} copies",
                    flush=True,
                )
            eager = [why for how, why in rows() if how == "eager" and "often" not in why]
            assert not eager, eager
            if "profile" in options:
                for call in calls.values():
                    profiled(call)


if __name__ == "__main__":
    main(*sys.argv[1:])
