"""Time layouts of the contraction's kernels by themselves, each held against the first.

python tests/gpu/tune_contraction.py float32                    5000 nodes of 89 species, to 0e+1o
python tests/gpu/tune_contraction.py float64 1000 10 0e+1o+2e   these numbers of nodes and species, these outputs

What `e3nn_accel/backends/cuda/contraction_schedule.py` says was found by this. Times are of launches alone,
medians of 20 by CUDA events; operands take turns, so that they come from memory. A launch's fastest
number of nodes that follow one another (`each`) is printed with its time, and the time of each = 1.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from mace_parts import Contraction

from e3nn_accel.backends.cuda.contraction_basis import ChangeOfBasis
from e3nn_accel.backends.cuda.contraction_kernels import SIGNATURES, FusedContraction
from e3nn_accel.backends.cuda.contraction_paths import Paths
from e3nn_accel.backends.cuda.contraction_schedule import Kind, Schedule, chosen
from e3nn_accel.backends.cuda.species import SpeciesSort
from e3nn_accel.config import Config
from e3nn_accel.descriptor import ContractionDescriptor
from e3nn_accel.groupings import NodesBySpecies
from e3nn_accel.health import registry
from e3nn_accel.launch import load_all
from e3nn_accel.plan import PlanContext

CHANNELS, COMPONENTS = 128, "0e+1o+2e+3o"
COPIES = 3
EACH = (1, 2, 3, 4, 8)
KERNELS: tuple[tuple[Kind, bool], ...] = (
    ("forward", False), ("features", False), ("weights", False),
    ("forward", True), ("features", True),
)  # fmt: skip
Tensors = dict[str, torch.Tensor]


def schedules(kind: Kind, tangent: bool, number_bytes: int, outputs: int) -> Iterator[Schedule]:
    """The chosen one, then others."""
    yield chosen(kind, tangent, number_bytes, outputs)
    if kind == "weights":
        for blocks, section in itertools.product((1, 2, 3, 4, 5, 6), (100, 300, 1000)):
            yield Schedule(128, blocks, registers=210, section=section)
        return
    wide = (number_bytes // 4) * (2 if tangent else 1)
    warps = {1: (12, 16, 20, 24, 32), 2: (8, 12, 16, 20), 4: (4, 8, 12)}[wide]
    for threads, of_warps in itertools.product((128, 256, 512), warps):
        blocks = of_warps * 32 // threads
        if blocks * threads != of_warps * 32:
            continue
        for section in (200, 300, 1000):
            yield Schedule(threads, blocks, section=section)
        if threads > 128:
            for section in (100, 300):
                yield Schedule(threads, blocks, section=section, together=True)
    for registers in (180, 210, 240):
        yield Schedule(128, max(1, 4 // wide), registers=registers)


def operands(nodes: int, species: int, paths: Paths, dtype: torch.dtype) -> list[Tensors]:
    """Some of each."""
    torch.manual_seed(1)
    draw = lambda *shape: torch.randn(shape, dtype=dtype, device="cuda")  # noqa: E731
    row = (nodes, CHANNELS, paths.components)
    shared = {name: draw(species, paths.weights, CHANNELS) for name in ("w", "hw")}
    return [
        {"x": draw(*row), "hx": draw(*row), "g": draw(nodes, CHANNELS * paths.outputs), **shared}
        for _ in range(COPIES)
    ]


def launch_of(
    kernels: FusedContraction, kind: Kind, tangent: bool, kernel: Any, nodes: NodesBySpecies
) -> Callable[[Tensors, int, torch.Tensor], None]:
    """A launch on operands, with so many nodes a thread, into a result."""
    _, layout = kernels.layout(kind, tangent)
    block, count = (layout.threads, 1, 1), len(nodes.order)

    def launch(t: Tensors, each: int, out: torch.Tensor) -> None:
        hx, hw = (t["hx"], t["hw"]) if tangent else (None, None)
        grid = (-(-count // (layout.group * each)), layout.chunks, 1)
        given = [t["x"], t["w"], nodes.attrs, nodes.species, nodes.order, hx, hw]
        if kind == "weights":
            shares = out.shape[0]
            passes = len(kernels.passes(kind, tangent))
            grid = (nodes.kinds * layout.chunks, shares, passes)
            rows = [t["x"], nodes.attrs, nodes.order, nodes.first, hx, t["g"]]
            kernel(grid, block, *rows, nodes.kinds, out)
        elif kind == "features":
            kernel(grid, block, *given, t["g"], count, nodes.kinds, each, out)
        else:
            kernel(grid, block, *given, count, nodes.kinds, each, out)

    return launch


def milliseconds(run: Callable[[int], object]) -> float:
    """Median of 20."""
    for n in range(3):
        run(n)
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(20)]
    for n, (before, after) in enumerate(events):
        before.record()
        run(n)
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def replayed(run: Callable[[], object]) -> float:
    """Median of 20 replays of a CUDA graph: what the device alone takes."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(lambda n: graph.replay())


def tune(
    kind: Kind, tangent: bool, paths: Paths, context: PlanContext, nodes: NodesBySpecies, of: list[Tensors]
) -> None:  # fmt: skip
    """Print a line for each layout, fastest first."""
    number = torch.finfo(context.dtype).bits // 8
    tried = list(dict.fromkeys(schedules(kind, tangent, number, paths.outputs)))
    found = [FusedContraction(paths, context, "", lambda *of, s=s: s) for s in tried]
    programs = [kernels.program(kind, tangent) for kernels in found]
    programs = [replace(p, name=f"{p.name}_{n}") for n, p in enumerate(programs)]
    lines, exact = [], None
    for schedule, kernels, loaded in zip(
        tried, found, load_all(programs, context.device, context.config), strict=True
    ):
        kernel = loaded.kernel(f"contraction_{kind}", SIGNATURES[kind])
        shapes = {"forward": of[0]["g"].shape, "features": of[0]["x"].shape}
        shares = kernels._shares(len(nodes.order), of[0]["w"])
        shape = shapes.get(kind, (shares, *of[0]["w"].shape))
        out = torch.full(shape, float("nan"), dtype=context.dtype, device="cuda")
        launch = launch_of(kernels, kind, tangent, kernel, nodes)
        each_of = (1,) if kind == "weights" else EACH
        times = {
            each: milliseconds(lambda n: launch(of[n % COPIES], each, out))  # noqa: B023
            for each in each_of
        }
        best = min(times, key=lambda each: times[each])
        launch(of[0], best, out)
        exact = out.double() if exact is None else exact
        error = float((out.double() - exact).norm() / exact.norm())
        use = loaded.binary.resources[f"contraction_{kind}"]
        passes = len(kernels.passes(kind, tangent))
        s = schedule
        lines.append((
            times[best],
            f"{times[best]:.4f} ms (each {best}; {times[1]:.4f})  threads {s.threads} blocks {s.blocks} "
            f"section {s.section} together {int(s.together)} passes {passes}: {use}; differs by {error:.0e}",
        ))  # fmt: skip
    print(f"\n{kind}{', tangent' if tangent else ''}; the chosen one:", lines[0][1], sep="\n")
    print(*[line for _, line in sorted(lines)[:16]], sep="\n")


def main(
    dtype: str, nodes: str = "5000", species: str = "89", outputs: str = "0e+1o", only: str = ""
) -> None:
    """Each kernel, or the one named, "features tangent" for instance."""
    device, kind = torch.device("cuda", torch.cuda.current_device()), getattr(torch, dtype)
    module = Contraction(COMPONENTS, outputs, 3, CHANNELS, int(species)).build()
    descriptor = registry().describe(module, "contraction")
    assert isinstance(descriptor, ContractionDescriptor)
    paths = Paths.of(descriptor, float(torch.finfo(kind).eps))
    context = PlanContext(kind, device, Config())
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randint(int(species), (int(nodes),), generator=generator)
    attrs = torch.nn.functional.one_hot(kinds, int(species)).to(device, kind)
    sort = SpeciesSort(context)
    sorted_nodes = sort.nodes(attrs)
    print(torch.cuda.get_device_name(), dtype, nodes, "nodes of", species, "species to", outputs)
    basis = ChangeOfBasis(paths.projections, CHANNELS, context, "")
    weights = [
        torch.randn(int(species), n, CHANNELS, dtype=kind, device="cuda") for n in basis.paths
    ]
    reduced, every = basis.to_basis(weights), [True] * basis.blocks
    for label, run in {
        "sort by species": lambda: sort._find(attrs),
        "weights to the reduced basis": lambda: basis.to_basis(weights),
        "gradients from the reduced basis": lambda: basis.from_basis(reduced, every),
    }.items():
        print(f"{label}: {replayed(run):.4f} ms in a graph")
    of = operands(int(nodes), int(species), paths, kind)
    for of_kind, tangent in KERNELS:
        if only in (f"{of_kind} tangent" if tangent else of_kind, ""):
            tune(of_kind, tangent, paths, context, sorted_nodes, of)


if __name__ == "__main__":
    main(*sys.argv[1:])
