"""Time a model, or a model of a known shape with random weights, accelerated and on stock e3nn.

A whole energy and force call, as in molecular dynamics: frozen parameters, fresh inputs each time.
All ways take turns in one run; figures are medians with quartiles. Ours is shown beside --against.
On a GPU each call is waited for, and ours are replayed as CUDA graphs where they are in a program.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from e3nn_accel.cli import CommandError
from e3nn_accel.cli.arguments import (
    add_device,
    add_json,
    add_structures,
    dtypes,
    model_and_structures,
    positive,
    readable,
    without_warnings,
)
from e3nn_accel.cli.tables import Table, progress, show, show_json

if TYPE_CHECKING:
    from e3nn_accel.cli.cases import Case
    from e3nn_accel.cli.timing import Spread

HELP = "time a model beside stock e3nn"
OURS, STOCK = "e3nn_accel", "e3nn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and what to time."""
    from e3nn_accel.cli.shapes import SHAPES

    parser.add_argument("model", metavar="MODEL", nargs="?", help="a model saved by torch.save")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="instead: random weights")
    parser.add_argument(
        "--atoms",
        type=_numbers,
        default=(64,),
        metavar="64,512",
        help="sizes of structures made up",
    )
    add_structures(parser)
    parser.add_argument(
        "--against",
        type=lambda text: tuple(text.split(",")),
        default=(STOCK,),
        metavar="e3nn,torch",
        help="stock e3nn, or backends of e3nn_accel (operations: always stock e3nn)",
    )
    parser.add_argument(
        "--dtype", type=dtypes, metavar="float32,float64", help="default: the model's"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of torch")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="samples each")
    parser.add_argument("--train", action="store_true", help="also a training step")
    parser.add_argument(
        "--ops",
        action="store_true",
        help="also every distinct operation by itself; without a model: products of known models",
    )
    products = parser.add_argument_group("products of known models")
    products.add_argument("--peers", action="store_true", help="and installed peers beside them")
    products.add_argument(
        "--only", nargs="+", metavar="NAME", help="those whose name has one of these in it"
    )
    products.add_argument(
        "--edges", type=positive, default=150_000, metavar="N", help="of the largest graph"
    )
    where = parser.add_argument_group("where a step of molecular dynamics goes")
    where.add_argument(
        "--profile",
        action="store_true",
        help="instead: neighbour list, batch, model and rest of MACECalculator's step, time by module and kernel",
    )
    add_device(parser, None, "cpu; of products of known models a GPU, if there is one")
    parser.add_argument(
        "--plot", metavar="OUT.png", help="also draw the medians with their quartiles"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Time, and show."""
    import torch

    from e3nn_accel import switch
    from e3nn_accel.cli.cases import Bench
    from e3nn_accel.cli.machine import on, threads
    from e3nn_accel.quantities import dtype_of

    if args.rounds < 2:
        raise CommandError("one round has no spread; --rounds must be 2 or more")
    if args.ops and args.model is None and args.shape is None:
        from e3nn_accel.cli import bench_operations

        with without_warnings(), threads(args.threads), on(args.device):
            return bench_operations.run(args)
    if args.peers or args.only:
        raise CommandError("--peers and --only are of --ops without a model")
    if (args.model is None) == (args.shape is None):
        raise CommandError("give a MODEL or --shape, one of the two, or --ops alone")
    if args.profile and (args.ops or args.train or args.plot):
        raise CommandError("--profile goes with none of --ops, --train and --plot")
    args.device = args.device or "cpu"
    with (
        without_warnings(),
        threads(args.threads),
        on(args.device),
        progress("timing", args.json) as step,
    ):
        model, structures = _inputs(args)
        if args.profile:
            return _profile(args, model, structures, step)
        names = args.dtype or (str(dtype_of(model)).removeprefix("torch."),)
        was_enabled = switch.is_enabled()
        cases: list[Case] = []
        try:
            for name in names:
                cases += Bench(model, getattr(torch, name), args, step).cases(structures)
        finally:
            if not was_enabled:
                switch.disable()
        _report(args, cases)
    return 0


def _profile(
    args: argparse.Namespace, model: Any, structures: list[Any], step: Callable[[str], None]
) -> int:
    from e3nn_accel import switch
    from e3nn_accel.cli import bench_profile
    from e3nn_accel.cli.machine import this_machine

    was_enabled = switch.is_enabled()
    try:
        steps = list(bench_profile.profiled(model, structures, args, step))
    finally:
        if not was_enabled:
            switch.disable()
    subject = args.model or f"shape {args.shape}, random weights"
    machine = this_machine(args.device)
    if args.json:
        found = bench_profile.document(steps)
        show_json({"model": subject, "machine": asdict(machine), "steps": found})
    else:
        show(f"{subject}: {machine.heading}")
        show(*bench_profile.tables(steps, on_gpu=args.device.startswith("cuda")))
    return 0


def _inputs(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    if args.shape is None:
        model, structures = model_and_structures(args)
    else:
        from e3nn_accel.cli.shapes import build, structure
        from e3nn_accel.structures import read_structures

        with readable():
            model = build(args.shape)
            if args.structures is None:
                return model, [structure(args.shape, n) for n in args.atoms]
            structures = read_structures(args.structures)
    if args.structures is not None:
        return model, structures[:1]
    from e3nn_accel.structures import random_crystal

    return model, [random_crystal(model, n) for n in args.atoms]


def _report(args: argparse.Namespace, cases: list[Case]) -> None:
    from e3nn_accel.cli.machine import this_machine
    from e3nn_accel.cli.plot import bars
    from e3nn_accel.cli.timing import milliseconds, times

    machine = this_machine(args.device)
    subject = args.model or f"shape {args.shape}, random weights"
    if args.plot:
        times_of = {f"{c.name}\n{c.mode}, {c.dtype}": c.result.seconds for c in cases}
        bars(times_of, args.plot, f"{subject}\n{machine.heading}")
    if args.json:
        show_json(
            {"model": subject, "machine": asdict(machine), "cases": [asdict(c) for c in cases]}
        )
        return
    ways = (*args.against, OURS)
    columns = ("", "mode", "dtype", *[f"{n} ms" for n in ways])
    columns += tuple(f"over {name}" for name in args.against)
    rows = [
        (
            case.name,
            case.mode,
            case.dtype,
            *(_cell(milliseconds, case.result.seconds, name) for name in ways),
            *(_cell(times, case.result.speedup, name) for name in args.against),
        )
        for case in cases
    ]
    show(f"{subject}: {machine.heading}")
    for detail in dict.fromkeys(f"{c.name}: {c.detail}" for c in cases if c.kind == "call"):
        show(detail)
    show(f"median [quartiles] of {args.rounds} rounds, taking turns", "", Table(columns, rows))


def _cell(text: Callable[[Spread], str], found: dict[str, Spread], name: str) -> str:
    return text(found[name]) if name in found else ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))
