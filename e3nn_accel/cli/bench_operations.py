"""`bench --ops` without a model: operations of known models, beside stock e3nn and peers."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from e3nn_accel import switch
from e3nn_accel.cli import CommandError
from e3nn_accel.cli.machine import this_machine
from e3nn_accel.cli.node_operations import NODE_OPERATIONS, NodeOperation, NodeWork, node_work
from e3nn_accel.cli.peers import NODE_PEERS, PEERS
from e3nn_accel.cli.plot import bars
from e3nn_accel.cli.product_timing import MODES, Result, Timing, modes_of, squares_of, time_ways
from e3nn_accel.cli.products import PRODUCTS, Product, Work, work
from e3nn_accel.cli.tables import Table, progress, show, show_json
from e3nn_accel.cli.timing import Spread, milliseconds
from e3nn_accel.groupings import neighbours_of

OURS, STOCK, ATOMICS = "e3nn_accel", "e3nn", "e3nn_accel, atomics"
DTYPES = ("float32", "float64")


def run(args: argparse.Namespace) -> int:
    """Time, and show."""
    every = (*PRODUCTS, *NODE_OPERATIONS)
    chosen = [p for p in every if not args.only or any(part in p.name for part in args.only)]
    if not chosen:
        names = ", ".join(repr(p.name) for p in every)
        raise CommandError(f"--only {' '.join(args.only)!r} matches none of {names}")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[tuple[str, str], Result] = {}
    was_enabled = switch.is_enabled()
    machine = this_machine(str(device))
    if not args.json:
        show(f"operations for {args.edges} edges, random operands: {machine.heading}")
        show("median ms [quartiles] of a call / the device's own time")
    with progress("timing", args.json) as step:
        try:
            for product in chosen:
                for dtype in args.dtype or DTYPES:
                    step(f"{product.name} {dtype}")
                    result = _result(product, dtype, device, args)
                    found[product.name, dtype] = result
                    if not args.json:  # each as soon as it is there: all of them take minutes
                        _show(f"{product.name}, {dtype}", result)
        finally:
            if not was_enabled:
                switch.disable()
    if args.plot:
        _plot(args, found, machine.heading)
    if args.json:
        cases = [{"name": n, "dtype": d, **asdict(r)} for (n, d), r in found.items()]
        show_json({"edges": args.edges, "machine": asdict(machine), "cases": cases})
    return 0


def _result(
    product: Product | NodeOperation,
    dtype: str,
    device: torch.device,
    args: argparse.Namespace,
) -> Result:
    result = Result()
    size = (args.edges, getattr(torch, dtype), device)
    here: Work | NodeWork
    peers: dict[str, Callable[[Any], Callable[..., torch.Tensor]]]
    if isinstance(product, Product):
        here, peers = work(product, *size), dict(PEERS)
    else:
        try:
            here, peers = node_work(product, *size), dict(NODE_PEERS)
        except ModuleNotFoundError as error:
            result.refused[STOCK] = f"{error.name} is not installed"
            return result
    if not args.peers:
        peers = {}
    calls: dict[str, Callable[..., torch.Tensor]] = {STOCK: here.stock()}
    for name, make in peers.items():
        try:
            calls[name] = make(here)
            calls[name](*here.tensors)
        except ModuleNotFoundError as error:
            result.refused[name] = f"{error.name} is not installed"
        except Exception as error:  # a peer's refusal is a result
            calls.pop(name, None)
            result.refused[name] = f"{type(error).__name__}: {str(error)[:200]}"
    runs = {name: modes_of(call, here.tensors) for name, call in calls.items()}
    runs[OURS] = modes_of(_accelerated(here), here.tensors)
    if here.edge_index is not None and device.type == "cuda":
        runs[ATOMICS] = modes_of(_accelerated(here, deterministic=False), here.tensors)
    for mode in MODES:
        ways = _that_run({name: modes[mode] for name, modes in runs.items()}, mode, result)
        for name, timing in time_ways(ways, args.rounds, device).items():
            result.timings.setdefault(name, {})[mode] = timing
    squares = squares_of(here.tensors)
    result.squares = time_ways({"squares": squares}, args.rounds, device)["squares"]
    if isinstance(here, Work) and here.edge_index is not None:
        result.grouping = _grouping_time(here, args.rounds)
    return result


def _that_run(
    ways: dict[str, Callable[[], object]], mode: str, result: Result
) -> dict[str, Callable[[], object]]:
    """Without those of others that fail: of many edges stock e3nn's derivatives don't fit on a device."""
    found = {}
    for name, run in ways.items():
        try:
            run()
        except Exception as error:
            if name in (OURS, ATOMICS):
                raise
            result.refused[f"{mode} by {name}"] = _summary(error)
        else:
            found[name] = run
    return found


def _summary(error: Exception) -> str:
    """Of what TorchScript says its own part first, and the cause last."""
    last = str(error).strip().rpartition("\n")[2]
    return f"{type(error).__name__}: {last[:200]}"


def _accelerated(here: Work | NodeWork, **options: Any) -> Callable[..., torch.Tensor]:
    module = switch.accelerate(copy.deepcopy(here.module), **options)
    return replace(here, module=module).ours()


def _grouping_time(here: Work, rounds: int) -> Spread:
    edge_index, nodes = here.edge_index, len(here.tensors[0])
    assert edge_index is not None
    fresh = lambda: neighbours_of(edge_index.clone(), nodes)  # noqa: E731
    return time_ways({"grouping": fresh}, rounds, edge_index.device)["grouping"].seconds


def _show(title: str, result: Result) -> None:
    rows = [
        (way, *(_cell(modes[mode]) if mode in modes else "-" for mode in MODES))
        for way, modes in result.timings.items()
    ]
    show("", Table(("", *MODES), rows, title))
    if result.squares is not None:
        show(
            f'in "and double" squares of gradients and theirs, by torch: {_cell(result.squares)} ms'
        )
    if result.grouping is not None:
        show(f"grouping the edges, once a graph: {milliseconds(result.grouping)} ms")
    for way, reason in result.refused.items():
        show(f"no {way}: {reason}")


def _plot(args: argparse.Namespace, found: dict[tuple[str, str], Result], heading: str) -> None:
    times = {
        f"{name}\n{mode}, {dtype}": {
            way: timings[mode].seconds for way, timings in result.timings.items() if mode in timings
        }
        for (name, dtype), result in found.items()
        for mode in MODES
    }
    bars(times, args.plot, f"operations for {args.edges} edges, random operands\n{heading}")


def _cell(timing: Timing) -> str:
    busy = "" if timing.busy is None else f" / {1e3 * timing.busy:.3f}"
    return milliseconds(timing.seconds) + busy
