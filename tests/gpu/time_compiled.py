"""Time models under torch.compile, as MACE prepares them, stock and accelerated, beside eager calls and our CUDA graph.

python tests/gpu/time_compiled.py [--device cuda] [--shape mp0-medium] [--atoms 64,1000] [--dtype float32]
    [--modes default,reduce-overhead] [--calls 30] [--training]
python tests/gpu/time_compiled.py --device cpu --shape tiny --atoms 8 --modes default    does it run? minutes

A call gives energy and forces of silicon, from having the batch's tensors (fresh ones for every call) to having
its results on the device; weights are random and frozen. Compiled models come from `mace.tools.compile.prepare`
and are called as MACECalculator calls them (``training=True``, without which the compiler refuses stock's code,
too), of fixed sizes, which suits the compiler best. "ours, compiled" has our operations in the compiler's graph;
"ours, CUDA graph" isn't compiled, and needs a GPU. All ways take turns of a few calls in one process, and the
first call of a turn isn't counted. Medians with quartiles; the largest difference of forces from "stock",
relative to the largest force; and how long the first call took, in which the compiler works.

With ``--training`` weights aren't frozen, and a call goes on to the gradients by all weights of a loss of energies
and forces; these gradients are what is compared then, each relative to the largest of its parameter.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch

import e3nn_accel
from e3nn_accel import structures
from e3nn_accel.cli.machine import this_machine
from e3nn_accel.cli.shapes import SHAPES, build, silicon
from e3nn_accel.cli.timing import Spread, milliseconds
from e3nn_accel.structures import Batch

TURN, WARM_UP = 6, 5
STOCK = "stock"


@dataclass
class Way:
    """A model, how it is called, and what was measured of it."""

    name: str
    model: Any
    call: Callable[[Batch], Any]
    measured: Callable[[Way, Batch], dict[str, torch.Tensor]]
    first: float = 0.0
    compared: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    failure: str = ""


def frozen(model: Any, options: argparse.Namespace) -> Any:
    """As MACECalculator has its models, or as a training run has them."""
    model = model.to(options.device, getattr(torch, options.dtype))
    return model.train() if options.training else model.requires_grad_(False).eval()


def eager(model: Any, training: bool) -> Callable[[Batch], Any]:
    """An ordinary call."""
    return lambda batch: model(batch, training=training)


def compiled(model: Any, mode: str) -> Callable[[Batch], Any]:
    """A call of the model compiled in one of torch's modes."""
    fast = torch.compile(model, mode=mode, fullgraph=True)

    def call(batch: Batch) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        batch["positions"].requires_grad_()
        return fast(batch, training=True)

    return call


def ways(options: argparse.Namespace) -> Iterator[Way]:
    """All of them. Ours are accelerated before anything is compiled, so that stock's code is never theirs."""
    from mace.tools.compile import prepare

    def eager_model() -> Any:
        return frozen(build(options.shape), options)

    def prepared_model() -> Any:
        return frozen(prepare(build)(options.shape), options)

    training = options.training
    measured = weight_gradients if training else forces
    yield Way(STOCK, model := eager_model(), eager(model, training), measured)
    model = e3nn_accel.accelerate(eager_model(), graph="0")
    yield Way("ours, eager", model, eager(model, training), measured)
    if options.device == "cuda":
        model = e3nn_accel.accelerate(eager_model(), graph="1")
        yield Way("ours, CUDA graph", model, eager(model, training), measured)
    for mode in options.modes:
        model = prepared_model()
        yield Way(f"stock, compiled, {mode}", model, compiled(model, mode), measured)
        model = e3nn_accel.accelerate(prepared_model(), graph="0")
        yield Way(f"ours, compiled, {mode}", model, compiled(model, mode), measured)


def forces(way: Way, batch: Batch) -> dict[str, torch.Tensor]:
    """Of one call."""
    return {"forces": way.call(batch)["forces"].detach()}


def weight_gradients(way: Way, batch: Batch) -> dict[str, torch.Tensor]:
    """Of one step's loss, by the names of those that it depends on."""
    out = way.call(batch)
    loss = out["energy"].square().sum() + out["forces"].square().sum()
    named = dict(way.model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def timed(way: Way, batch: Batch) -> float:
    """Seconds of one call, all of it."""
    wait = torch.cuda.synchronize if batch["positions"].is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    found = way.measured(way, batch)
    wait()
    seconds = time.perf_counter() - started
    way.compared = {name: tensor.clone() for name, tensor in found.items()}
    return seconds


def start(way: Way, fresh: Callable[[], Batch]) -> None:
    """The first calls: compiling, planning, capturing. A way that can't is left out, with the reason."""
    try:
        way.first = timed(way, fresh())
        for _ in range(WARM_UP):
            timed(way, fresh())
    except Exception as error:  # the compiler's errors are of many classes
        lines = str(error).strip().splitlines() or [""]
        way.failure = f"{type(error).__name__}: {lines[0]}"


def take_turns(all_ways: list[Way], calls: int, fresh: Callable[[], Batch]) -> None:
    """Some calls of each, again and again, until each has its number; every second time in reverse."""
    while any(len(way.seconds) < calls for way in all_ways):
        for way in all_ways:
            timed(way, fresh())
            way.seconds += [timed(way, fresh()) for _ in range(TURN - 1)]
        all_ways.reverse()


def show(way: Way, stock: Way) -> None:
    """One line."""
    if way.failure:
        print(f"  {way.name:30s} failed: {way.failure}")
        return
    times = f"{way.name:30s} {milliseconds(Spread.of(way.seconds)):24s} ms"
    print(f"  {times}, {difference(way, stock)}, first call {way.first:.1f} s")


def difference(way: Way, stock: Way) -> str:
    """The largest from stock's, of how many tensors that both have."""
    both = way.compared.keys() & stock.compared.keys()
    largest = max(
        float(
            (way.compared[name] - stock.compared[name]).abs().max()
            / stock.compared[name].abs().max()
        )
        for name in both
    )
    of = ", ".join(both) if len(both) == 1 else f"{len(both)} of {len(stock.compared)} gradients"
    return f"{of} {largest:.1e}"


def where(model: Any) -> str:
    """What ran where in a model, by operation."""
    counts = [(row.operation, row.backend) for row in e3nn_accel.explain(model).rows]
    return ", ".join(f"{counts.count(one)} {' on '.join(one)}" for one in sorted(set(counts)))


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="mp0-medium", choices=sorted(SHAPES))
    parser.add_argument("--atoms", default="64,1000")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--modes", default="default,reduce-overhead", help="of torch.compile")
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument(
        "--training", action="store_true", help="a loss's gradients by the weights, too"
    )
    options = parser.parse_args()
    options.modes = options.modes.split(",")
    dtype = getattr(torch, options.dtype)
    torch.set_default_dtype(dtype)
    print(f"{options.shape}, {options.dtype}, {options.device}: {this_machine().heading}")
    for atoms in map(int, options.atoms.split(",")):
        torch.compiler.reset()
        all_ways = list(ways(options))
        structure = silicon(atoms)
        batch = structures.batch_of(all_ways[0].model, structure, dtype)
        fresh = lambda: structures.cast(batch, dtype, options.device)  # noqa: B023, E731
        for way in all_ways:
            start(way, fresh)
        take_turns([way for way in all_ways if not way.failure], options.calls, fresh)
        print(f"{len(structure)} atoms, {batch['edge_index'].shape[1]} edges")
        for way in all_ways:
            show(way, all_ways[0])
        for way in all_ways:
            print(f"    {way.name}: {where(way.model)}")


if __name__ == "__main__":
    main()
