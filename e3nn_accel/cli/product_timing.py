"""Products timed in three modes by CUDA events, all ways in turns; on the CPU by the clock.

A timing starts before the call's first line of Python and ends after its last kernel, so work of the
host that the device waits for counts; ``busy`` is the device's time alone, by torch's profiler. That stays
attached to the driver once it ran: from the second mode on, every launch of every way takes longer by some 7 us
(tests/gpu/time_single_calls.py, on an H200's host).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from e3nn_accel.cli.timing import Spread

Call = Callable[..., torch.Tensor]
MODES = ("forward", "forward+backward", "and double")
WARM_UP, CALLS = 3, 3
"""How often each way is called before it is timed, and a turn."""
LONG = 0.05
"""Seconds of a call beyond which it is called once a turn, if there are several."""


@dataclass(frozen=True)
class Timing:
    """One way in one mode.

    Attributes:
        seconds: Of a call.
        busy: Of the device in one call; None on the CPU.
    """

    seconds: Spread
    busy: float | None


@dataclass
class Result:
    """One product in one dtype: timings by way and mode, and why a way has none.

    Attributes:
        grouping: Of a convolution's edges, which all layers of a call share.
        squares: The part of "and double" that is no way's own: torch squares gradients and differentiates that.
    """

    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    grouping: Spread | None = None
    squares: Timing | None = None


def modes_of(call: Call, tensors: tuple[torch.Tensor, ...]) -> dict[str, Callable[[], object]]:
    """What is timed: the value, gradients of all operands, and gradients of those gradients' squares."""
    leaves = [t.detach().clone().requires_grad_(True) for t in tensors]
    with torch.no_grad():
        direction = torch.randn_like(call(*tensors))
    wanted = direction.clone().requires_grad_(True)

    def forward() -> object:
        with torch.no_grad():
            return call(*tensors)

    def backward() -> object:
        return torch.autograd.grad(call(*leaves), leaves, direction)

    def double() -> object:
        first = torch.autograd.grad(call(*leaves), leaves, wanted, create_graph=True)
        return torch.autograd.grad(_squares(first), [*leaves, wanted], allow_unused=True)

    return dict(zip(MODES, (forward, backward, double), strict=True))


def squares_of(tensors: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """What "and double" does with gradients of these shapes, by itself."""
    first = [torch.randn_like(t).requires_grad_() for t in tensors]
    return lambda: torch.autograd.grad(_squares(first), first)


def _squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(g * g).sum() for g in gradients]).sum()


def time_ways(
    ways: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Time callables in turns, A B B A A B ..., a few calls a turn."""
    calls = {name: CALLS for name in ways}
    for name, run in ways.items():
        run()  # which may compile
        if _seconds(run, device) > LONG and rounds > 1:  # quartiles are of two times at least
            calls[name] = 1
        else:
            for _ in range(WARM_UP - 2):
                run()
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(rounds):
        for name in list(ways) if n % 2 == 0 else reversed(list(ways)):
            samples[name] += [_seconds(ways[name], device) for _ in range(calls[name])]
    return {
        name: Timing(Spread.of(samples[name]), _busy(run, device)) for name, run in ways.items()
    }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def _busy(run: Callable[[], object], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return float(sum(e.device_time for e in found.events() if e.device_type.name == "CUDA")) / 1e6
