"""Time by module and by kernel, forward and backward, from torch's profiler.

Calls of modules are ranges of the profile. An operation belongs to the innermost range around it; one
of the backward pass to that of the forward operation that made its node (they share a number). On a
GPU the time is the kernels' own, on a CPU that of operations, and of Python within a range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from e3nn_accel.compat import DeviceType

DEEPEST = 3
"""Modules deeper within the model count as part of those that they are in."""
OTHER = "(elsewhere)"
_RANGE = "module: "
_NODE = "autograd::engine::evaluate_function: "
"""How the profiler names nodes of the backward pass, with their number."""


@dataclass
class Profile:
    """Seconds of one step, on average.

    Attributes:
        modules: By path, of the forward and the backward pass.
        kernels: Of each kernel (on a CPU: operation): how many, and their seconds.
        busy: While the device runs anything; 0 on a CPU.
        launches: Kernels.
    """

    modules: dict[str, list[float]] = field(default_factory=dict)
    kernels: dict[str, list[float]] = field(default_factory=dict)
    busy: float = 0.0
    launches: float = 0.0


@contextmanager
def ranges(model: torch.nn.Module) -> Iterator[None]:
    """Within it calls of the model's modules are ranges of whatever profile is taken.

    Classes get another ``__call__``, since hooks would keep modules from their plans.
    """
    paths = {
        id(module): path or type(model).__name__
        for path, module in model.named_modules()
        if path.count(".") < DEEPEST
    }
    own = {cls for module in model.modules() for cls in type(module).__mro__}
    owners = [cls for cls in own if "__call__" in vars(cls) and issubclass(cls, torch.nn.Module)]
    within: list[int] = []

    def ranged(call: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(module))
            if path is None or within[-1:] == [id(module)]:
                return call(module, *args, **kwargs)
            within.append(id(module))
            try:
                with torch.profiler.record_function(_RANGE + path):
                    return call(module, *args, **kwargs)
            finally:
                within.pop()

        return __call__

    before = [(cls, vars(cls)["__call__"]) for cls in owners]
    for cls, call in before:
        setattr(cls, "__call__", ranged(call))  # noqa: B010 (mypy: a method)
    try:
        yield
    finally:
        for cls, call in before:
            setattr(cls, "__call__", call)  # noqa: B010


def profile(step: Callable[[], object], model: torch.nn.Module, times: int) -> Profile:
    """Profile a step, done so many times."""
    on_gpu = next(model.parameters()).is_cuda
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with ranges(model), torch.profiler.profile(activities=activities) as taken:
        for _ in range(times):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    return summed(list(taken.events()), times, on_gpu)


def summed(events: list[Any], times: int, on_gpu: bool) -> Profile:
    """What the profiler's events say of one step."""
    found, linked = Profile(), 0.0
    makers = _makers(events)
    # a range's own time is Python's; its own kernels are those that no operation of torch's launches
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    for event in on_cpu:
        seconds = 1e-6 / times * _own_time(event, on_gpu)
        linked += seconds
        if not seconds:
            continue
        path, backward = _place(event, makers)
        found.modules.setdefault(path, [0.0, 0.0])[backward] += seconds
        if not on_gpu and not event.name.startswith(_RANGE):
            _add(found, event.name, 1 / times, seconds)
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and _is_work(e)]
    for kernel in kernels:
        seconds = 1e-6 / times * kernel.time_range.elapsed_us()
        _add(found, kernel.name, 1 / times, seconds)
        found.launches += 1 / times
    found.busy = 1e-6 / times * _covered([(k.time_range.start, k.time_range.end) for k in kernels])
    unlinked = sum(seconds for _, seconds in found.kernels.values()) - linked
    if on_gpu and unlinked > 1e-9:  # replays of a graph, and launches that torch knows nothing of
        found.modules.setdefault(OTHER, [0.0, 0.0])[0] += unlinked
    return found


def _is_work(event: Any) -> bool:
    """Ranges appear on the device's side, too, as long as all that is in them."""
    return not event.name.startswith(_RANGE) and not getattr(event, "is_user_annotation", False)


def _add(found: Profile, name: str, number: float, seconds: float) -> None:
    entry = found.kernels.setdefault(name, [0.0, 0.0])
    entry[0] += number
    entry[1] += seconds


def _own_time(event: Any, on_gpu: bool) -> float:
    """Microseconds of the kernels that it launched itself, or of its own on the CPU."""
    if on_gpu:
        return float(sum(kernel.duration for kernel in event.kernels))
    return float(event.self_cpu_time_total)


def _range_of(event: Any) -> str | None:
    """The innermost module around an operation."""
    while event is not None:
        if event.name.startswith(_RANGE):
            return str(event.name.removeprefix(_RANGE))
        event = event.cpu_parent
    return None


def _makers(events: list[Any]) -> dict[int, str]:
    """In which module each node of the backward pass was made, by the number that they share."""
    found: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and event.scope == 0 and not event.name.startswith(_NODE):
            path = _range_of(event)
            if path is not None:
                found[event.sequence_nr] = path
    return found


def _place(event: Any, makers: dict[int, str]) -> tuple[str, bool]:
    """Where an operation belongs, and whether it is one of the backward pass."""
    above = event
    while above is not None:
        if above.name.startswith(_NODE):
            return makers.get(above.sequence_nr, OTHER), True
        above = above.cpu_parent
    return _range_of(event) or OTHER, False


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of a union of intervals."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
