"""Time single calls, each begun on an idle device, and what they are made of; before and after a profiler has run.

python tests/gpu/time_single_calls.py linears
python tests/gpu/time_single_calls.py parts             of the linear after the convolution, again and again
python tests/gpu/time_single_calls.py 64,1000           calls of MACE-MP-0 medium's shape, of so many atoms, float32

A call is timed between two events that torch records around it, on a device that has nothing to do, as peers'
benchmarks time them: the host's work until the last launch counts, and the device's after it. "host" is the time
until the call returns. Of a linear: nothing but the two events; one of torch's smallest kernels; the plan without
dispatch; the call; the device's own time, of replays. Of a model: what a call copies to where its graph reads it,
by torch and in one launch; fresh copies of its batch, as the benchmark makes them for each call; a call with
them made before; both. "parts" are what that linear's call does by halves, alone and together: memory, either kernel,
both, the launches that are known by rows, the module's call; three times, for the host's part differs from one moment
to the next. Medians with quartiles of 50, in microseconds. A host that others use, too, is half as fast for seconds:
each line says what a loop in Python took beside it.

torch's profiler stays attached to the driver once it has run in a process: everything is timed again after it ran.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch
from e3nn import o3
from time_replays import captured
from torch.profiler import ProfilerActivity, profile
from tune_convolution import milliseconds
from tune_linear import CASES, Case, call_of, replayed

import e3nn_accel
from e3nn_accel import structures
from e3nn_accel.cli.shapes import build, structure
from e3nn_accel.graphs import copying
from e3nn_accel.graphs.padding import AXES
from e3nn_accel.new_memory import new_rows

SHAPE, CALLS, WARM_UP = "mp0-medium", 50, 8
Call = Callable[..., Any]


def times(call: Call, prepare: Call = lambda: ()) -> str:
    """Of whole calls by events, and of the host's part."""
    whole, host = [], []
    for n in range(WARM_UP + CALLS):
        arguments = prepare()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        started = time.perf_counter()
        call(*arguments)
        returned = time.perf_counter()
        end.record()
        end.synchronize()
        if n >= WARM_UP:
            whole.append(1e3 * start.elapsed_time(end))
            host.append(1e6 * (returned - started))
    return f"{spread(whole)}, host {spread(host)}; a loop in Python {loop_in_python():.1f}"


def loop_in_python() -> float:
    """Microseconds of some Python that has nothing to do with a GPU: how fast the host is, at this moment."""
    taken = []
    for _ in range(20):
        found: dict[int, int] = {}
        started = time.perf_counter()
        for n in range(300):
            found[n % 7] = n
        taken.append(1e6 * (time.perf_counter() - started))
    return statistics.median(taken)


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.1f} [{low:.1f}-{high:.1f}]"


def module_of(case: Case, dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A linear or a skip connection with its arguments."""
    torch.set_default_dtype(dtype)
    species = case.species
    module = (
        o3.FullyConnectedTensorProduct(case.irreps_in, f"{species}x0e", case.irreps_out)
        if species
        else o3.Linear(case.irreps_in, case.irreps_out)
    ).to("cuda")
    x = torch.randn(case.rows, o3.Irreps(case.irreps_in).dim, device="cuda")
    if not species:
        return module, (x,)
    kinds = torch.randint(species, (case.rows,), device="cuda")
    return module, (x, torch.nn.functional.one_hot(kinds, species).to(dtype))


def plan_of(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> Call:
    """What runs once a call is found to be one of ours."""
    dispatcher = e3nn_accel.switch.active.dispatcher
    assert dispatcher is not None
    (outcome,) = dispatcher.runners[module].outcomes.values()
    target, _ = dispatcher.target_of(module) or (None, None)
    assert target is not None
    operands, plan = target.bind(module, *arguments).operands, outcome.plan
    assert plan is not None
    return lambda: plan.run(*operands)


def linears() -> dict[str, Call]:
    """By name, what prints a line."""
    small = torch.zeros(8, device="cuda")
    found: dict[str, Call] = {
        "nothing": lambda: times(lambda: None),
        "a kernel of torch's": lambda: times(lambda: small.add_(1)),
    }
    for dtype in (torch.float32, torch.float64):
        for name, case in list(CASES.items())[:4]:
            module, arguments = module_of(case, dtype)
            module(*arguments)
            call, plan = lambda m=module, a=arguments: m(*a), plan_of(module, arguments)
            label = f"{name}, {str(dtype)[6:]}"
            found[f"{label}: plan"] = lambda plan=plan: times(plan)
            found[f"{label}: call"] = lambda call=call: times(call)
            found[f"{label}: device"] = lambda call=call: f"{1e3 * replayed(call):.1f}"
    return found


def parts_of_a_call() -> dict[str, Call]:
    """By name, what prints a line."""
    case = CASES["linear after conv"]
    module, (x,) = module_of(case, torch.float32)
    one_call = call_of(case, torch.float32, "float32")
    kernels, device = one_call.kernels, x.device
    weights = torch.randn(kernels.paths.weights, device=device)
    kernels.known_rows(x, weights, one_call.sorted_rows)
    launch = kernels._launch_of("forward", x.shape, weights.shape, device)
    halved, (cutter, product) = launch.halves, launch.kernels
    assert halved is not None
    small, size = torch.zeros(8, device=device), (case.rows, halved.side.out_row)
    halves, out = new_rows(x, 1, halved.room_for_halves), new_rows(x, *size)
    grid = (launch.blocks, 1, 1)

    def cut() -> None:
        cutter(halved.cutters, halved.cutting, weights, halves)

    def multiply(overlapping: bool = False) -> None:
        product(
            grid, halved.block, x, halves, case.rows, out,
            shared=halved.shared, overlapping=overlapping,
        )  # fmt: skip

    parts: dict[str, Call] = {
        "nothing": lambda: None,
        "a kernel of torch's": lambda: small.add_(1),
        "memory for halves of weights": lambda: new_rows(x, 1, halved.room_for_halves),
        "memory for the result": lambda: new_rows(x, *size),
        "weights cut": cut,
        "product": multiply,
        "both": lambda: (cut(), multiply()),
        "both, overlapping": lambda: (cut(), multiply(halved.overlapping)),
        "of known rows": lambda: kernels.known_rows(x, weights, one_call.sorted_rows),
        "call": lambda: module(x),
    }
    return {
        f"{name}, {turn}": lambda part=part: times(part)
        for turn in range(1, 4)
        for name, part in parts.items()
    }


def models(atoms: str) -> dict[str, Call]:
    """By name, what prints a line."""
    device, found = torch.device("cuda"), {}
    torch.set_default_dtype(torch.float32)
    model = build(SHAPE).to(device).requires_grad_(False).eval()
    for count in map(int, atoms.split(",")):
        batch = structures.batch_of(model, structure(SHAPE, count), torch.float32)
        batch = structures.cast(batch, torch.float32, device)

        def fresh(batch: Any = batch) -> dict[str, Any]:
            return {k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}

        def call(data: dict[str, Any]) -> Any:
            return model(data, compute_force=True)

        graph, inputs = captured(model, batch), inputs_of(batch)
        targets = list(map(torch.clone, inputs))
        found |= {
            f"{count} atoms: replays": lambda g=graph: f"{1e3 * milliseconds(g.replay):.1f}",
            f"{count} atoms: copied in by torch": lambda t=targets, i=inputs: times(
                lambda: copying.copy_in_torch(t, i)
            ),
            f"{count} atoms: in one launch": lambda t=targets, i=inputs: times(
                lambda: copying.copy_all(t, i)
            ),
            f"{count} atoms: copies of the batch": lambda f=fresh: times(f),
            f"{count} atoms: call": lambda f=fresh: times(call, lambda: (f(),)),
            f"{count} atoms: copies and call": lambda f=fresh: times(lambda: call(f())),
        }
    return found


def inputs_of(batch: dict[str, Any]) -> list[torch.Tensor]:
    """What the graph reads, each in one piece."""
    found = []
    for name, axis in AXES.items():
        if name in batch:
            found += [batch[name]] if axis.dim == 0 else list(batch[name].unbind())
    return found


def run_profiler() -> None:
    """Once, over a small kernel."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]):
        torch.zeros(8, device="cuda").add_(1)
        torch.cuda.synchronize()


def main(what: str = "linears") -> None:
    """Print a line for each part, twice."""
    print(torch.cuda.get_device_name(), torch.__version__, what, flush=True)
    with e3nn_accel.enabled():
        made = {"linears": linears, "parts": parts_of_a_call}
        parts = made[what]() if what in made else models(what)
        with torch.no_grad() if what in made else torch.enable_grad():
            for profiled in (False, True):
                if profiled:
                    run_profiler()
                print("after a profiler ran" if profiled else "no profiler ran yet")
                for name, measure in parts.items():
                    print(f"  {name:42s} {measure()}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
