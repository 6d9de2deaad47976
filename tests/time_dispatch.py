"""Time the host's part of a call on the cuda backend: everything up to the driver, which does nothing here.

python tests/time_dispatch.py [profile]

Needs no GPU: plans and launches are the real ones, on CPU tensors, and the driver's launch is a function
that returns. What a device adds (the driver's own 2 to 4 microseconds a launch, torch's allocator) is missing.
A call is as MACE makes it, of 64 nodes: without gradients; recorded for them; its backward pass, by the
features alone as for forces and by the weights, too; the plan alone, without dispatch; and what compiled code
calls, a value, a gradient, and such a gradient if forward had to be run again for it. Microseconds,
median with quartiles of blocks of calls that take turns. ``profile`` lists where the time goes.
"""

from __future__ import annotations

import cProfile
import importlib
import os
import pkgutil
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch
from e3nn import o3

import e3nn_accel
from e3nn_accel import argument_block, groupings, launch
from e3nn_accel.backends import cuda
from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config
from e3nn_accel.ops import derivatives, opaque
from e3nn_accel.plan import Availability, Plan, PlanContext

NODES, SPECIES, CHANNELS = 64, 10, 128
ROUNDS, CALLS = 25, 100
Call = Callable[[], Any]


class NoProgram:
    """In place of `LoadedProgram`: its kernels are real but for the driver."""

    def kernel(self, name: str, parameters: str) -> launch.Kernel:
        """Packs its arguments, and launches nothing."""
        driver = SimpleNamespace(
            launchKernel=lambda *arguments: None,
            funcSetAttribute=lambda *arguments: None,
            funcGetAttribute=lambda *arguments: 0,
        )
        return launch.Kernel(driver, SimpleNamespace(ptr=1), parameters, 0)


def no_programs(
    programs: Sequence[KernelProgram], device: torch.device, config: Config
) -> tuple[NoProgram, ...]:
    """In place of `launch.load_all`."""
    return tuple(NoProgram() for _ in programs)


def without_a_device() -> ExitStack:
    """The cuda backend plans for CPU tensors, and nothing is launched."""
    stack = ExitStack()
    changes: list[tuple[Any, str, Any]] = [
        (cuda.CudaBackend, "device_type", "cpu"),
        (cuda.CudaBackend, "available", lambda self: Availability(True)),
        (argument_block, "driver_for_this_thread", lambda: None),
        (launch, "current_device_function", lambda: lambda: 0),
        (launch, "current_stream_function", lambda: lambda index: 0),
        # on a device, groupings are found again by their tensor and its version, without a look at it
        (groupings, "_find_in", lambda tensor, version, find: (version, None, find(tensor))),
    ]
    for found in pkgutil.iter_modules(cuda.__path__):
        module = importlib.import_module(f"{cuda.__name__}.{found.name}")
        for name, value in (("load_all", no_programs), ("multiprocessors", lambda device: 132)):
            if hasattr(module, name):
                changes.append((module, name, value))
    for owner, name, value in changes:
        stack.enter_context(patch.object(owner, name, value))
    return stack


def modules() -> Iterator[tuple[str, Callable[[], torch.nn.Module], tuple[torch.Tensor, ...]]]:
    """A name, what makes the module, and its arguments."""
    hidden = o3.Irreps(f"{CHANNELS}x0e+{CHANNELS}x1o")
    attrs = torch.nn.functional.one_hot(torch.arange(NODES) % SPECIES, SPECIES).float()
    x = torch.randn(NODES, hidden.dim)
    species = o3.Irreps(f"{SPECIES}x0e")
    yield "Linear", lambda: o3.Linear(hidden, hidden), (x,)
    skip = lambda: o3.FullyConnectedTensorProduct(hidden, species, hidden)  # noqa: E731
    yield "FullyConnectedTensorProduct", skip, (x, attrs)
    try:
        from mace.modules.symmetric_contraction import SymmetricContraction
    except ImportError:
        return
    features = o3.Irreps("+".join(f"{CHANNELS}x{ir}" for ir in ("0e", "1o", "2e", "3o")))
    yield (
        "SymmetricContraction",
        lambda: SymmetricContraction(features, hidden, correlation=3, num_elements=SPECIES),
        (torch.randn(NODES, CHANNELS, 16), attrs),
    )


def calls_of(
    make: Callable[[], torch.nn.Module], x: torch.Tensor, *others: torch.Tensor
) -> dict[str, Call]:
    """What is timed of a module, by name."""
    # a weight that `autograd.grad` was asked for once is taken for wanted ever after: not the same module
    module, another = make(), make()
    wanting = x.clone().requires_grad_()
    weights = [p for p in another.parameters() if p.numel()]

    def without_gradients() -> Any:
        with torch.no_grad():
            return module(x, *others)

    def backward(out: torch.Tensor, by: list[torch.Tensor]) -> Call:
        grad = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, by, grad, retain_graph=True)

    without_gradients()
    dispatcher = e3nn_accel.switch.active.dispatcher
    assert dispatcher is not None
    (outcome,) = dispatcher.runners[module].outcomes.values()
    assert outcome.plan is not None, outcome.reason
    assert outcome.plan.backend == "cuda"
    target, _ = dispatcher.target_of(module) or (None, None)
    assert target is not None
    operands, run = target.bind(module, x, *others).operands, outcome.plan.run

    def plan_alone() -> Any:
        with torch.no_grad():
            return run(*operands)

    return {
        "forward": without_gradients,
        "its plan": plan_alone,
        "recorded": lambda: module(wanting, *others),
        "backward, x": backward(module(wanting, *others), [wanting]),
        "backward, x and w": backward(another(wanting, *others), [wanting, *weights]),
        "of it torch's own": backward(wanting.view_as(wanting), [wanting]),
        **compiled_calls(outcome.plan, tuple(t.detach() for t in operands)),
    }


def compiled_calls(plan: Plan, operands: tuple[torch.Tensor, ...]) -> dict[str, Call]:
    """What code that torch.compile made calls: the value, and the gradient of x with and without it."""
    opaque.register()
    context = PlanContext(operands[0].dtype, operands[0].device, Config())
    g, wanted = torch.randn_like(plan.run(*operands)), (True, *[False] * (len(operands) - 1))

    def gradient(known: Plan) -> Call:
        name = derivatives.name_of(known, context)
        derivatives.function_of.cache_clear()
        function = derivatives.function_of(derivatives.gradient_of(name, wanted))

        def call() -> Any:
            derivatives._plans[name] = known
            with torch.no_grad():
                return function((g, *operands))

        return call

    name = derivatives.name_of(plan, context)
    return {
        "compiled": lambda: torch.ops.e3nn_accel.run.default(list(operands), name),
        "compiled, x": gradient(plan),
        "running again": gradient(replace(plan, gradients=None)),
    }


def timed(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Microseconds a call of each, one number a block; blocks take turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 2):
        for name, call in calls.items():
            started = time.thread_time()
            for _ in range(CALLS):
                call()
            if round_ > 1:
                found[name].append(1e6 * (time.thread_time() - started) / CALLS)
    return found


def profiled(call: Call) -> None:
    """Where the time of a call goes."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(20 * CALLS):
        call()
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(18)


def main(profile: bool) -> None:
    """Print a row for each call."""
    torch.set_num_threads(1)
    with without_a_device():
        # nothing is computed, so that there is nothing to compare with stock e3nn
        e3nn_accel.enable(backend="cuda", self_check=False)
        for name, make, arguments in modules():
            calls = calls_of(make, *arguments)
            for what, times in timed(calls).items():
                low, median, high = statistics.quantiles(times, n=4, method="inclusive")
                print(f"{name:28} {what:18} {median:7.1f} [{low:.1f}-{high:.1f}]", flush=True)
                if profile:
                    profiled(calls[what])
        e3nn_accel.disable()


if __name__ == "__main__":
    main("profile" in sys.argv[1:])
