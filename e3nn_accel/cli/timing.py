"""Time several ways to do the same thing, in turns: what else the machine does hits them all.

On a GPU a call ends when the device has finished, which is waited for after each, as a step of
molecular dynamics does: work of the host that the device waits for counts.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Prepare = Callable[[], Callable[[], object]]
"""Makes fresh inputs, off the clock, and returns the call to time."""

WARM_UP = 5
SAMPLE_SECONDS = 0.005
MOST_REPEATS = 200


@dataclass(frozen=True)
class Spread:
    """Median and quartiles; a figure is never given without them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Measurement:
    """One thing, done in several ways.

    Attributes:
        seconds: A call's time, by way.
        speedup: How many times faster ours is than each of the others; of every round by itself,
            so that drifts cancel.
        rounds: How many samples each has.
    """

    seconds: dict[str, Spread]
    speedup: dict[str, Spread]
    rounds: int


def measure(
    ways: Mapping[str, Prepare], ours: str, rounds: int, device: torch.device
) -> Measurement:
    """Time the ways in turns, A B B A A B ...

    Short calls are repeated within a sample until it takes some milliseconds.
    """
    wait = _waiting(device)
    for _ in range(WARM_UP):
        for prepare in ways.values():
            prepare()()
    repeats = max(1, min(MOST_REPEATS, *[_repeats(prepare, wait) for prepare in ways.values()]))
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(rounds):
        for name in list(ways) if n % 2 == 0 else reversed(list(ways)):
            samples[name].append(_sample(ways[name], repeats, wait))
    speedup = {
        name: Spread.of([a / b for a, b in zip(times, samples[ours], strict=True)])
        for name, times in samples.items()
        if name != ours
    }
    seconds = {name: Spread.of(times) for name, times in samples.items()}
    return Measurement(seconds, speedup, rounds)


def _waiting(device: torch.device) -> Callable[[], None]:
    """Waits until a device has finished."""
    if device.type != "cuda":
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


def _repeats(prepare: Prepare, wait: Callable[[], None]) -> int:
    return int(SAMPLE_SECONDS / max(_sample(prepare, 1, wait), 1e-6)) + 1


def _sample(prepare: Prepare, repeats: int, wait: Callable[[], None]) -> float:
    calls = [prepare() for _ in range(repeats)]
    wait()  # for fresh inputs
    with _without_garbage_collection():
        started = time.perf_counter()
        for call in calls:
            call()
            wait()
        return (time.perf_counter() - started) / repeats


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def milliseconds(spread: Spread) -> str:
    """For people: the median, and the quartiles in brackets."""
    digits = 3 if spread.median < 1e-3 else 2 if spread.median < 1e-1 else 1
    median, low, high = (f"{1e3 * t:.{digits}f}" for t in (spread.median, spread.low, spread.high))
    return f"{median} [{low}-{high}]"


def times(spread: Spread) -> str:
    """A speedup for people, as `milliseconds`."""
    return f"{spread.median:.2f}x [{spread.low:.2f}-{spread.high:.2f}]"
