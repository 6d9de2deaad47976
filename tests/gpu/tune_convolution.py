"""Time layouts of the convolution's kernels by themselves, each held against the one that is chosen.

python tests/gpu/tune_convolution.py "mace layer 2" backward float32

What `e3nn_accel/backends/cuda/convolution_schedule.py` says of an H100 was found by this. Times are of
launches alone, medians of 20 by CUDA events; dx is before its sum by sender.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch

from e3nn_accel.backends.cuda.convolution_kernels import (
    SIGNATURES,
    FusedConvolution,
    Variant,
    _launch,
)
from e3nn_accel.backends.cuda.convolution_plan import header
from e3nn_accel.backends.cuda.convolution_schedule import Kind, _staged_bytes
from e3nn_accel.cli.products import PRODUCTS, work
from e3nn_accel.config import Config
from e3nn_accel.descriptor import ConvolutionDescriptor
from e3nn_accel.groupings import Neighbours, neighbours_of
from e3nn_accel.health import registry
from e3nn_accel.launch import load_all
from e3nn_accel.plan import PlanContext

EDGES = 150_000
SIZES = [(edges, slots) for edges in (32, 16, 8) for slots in (6, 5, 4, 3)]


def layouts(kernels: FusedConvolution, kind: Kind) -> Iterator[tuple[str, Any]]:
    """The plain kernel, the staged one as chosen, and others of up to two blocks more and less."""
    (plain,) = kernels.parts(Variant(kind))
    yield "plain", plain
    chosen = kernels.staged[kind]
    if chosen is None:
        return
    (part,) = kernels.parts(Variant(kind, staged=True))
    yield "staged", part
    for blocks in range(max(1, chosen.blocks - 2), chosen.blocks + 3):
        for edges, slots in SIZES:
            shared = _staged_bytes(kernels.d, part.group, kind, kernels.bytes, edges, slots)
            if blocks * (shared + 1024) > 228 * 1024:
                continue
            layout = replace(chosen, blocks=blocks, edges=edges, slots=slots, shared=shared)
            program = replace(
                part.program, header=header(kernels.d, part.group, layout, kernels.real)
            )
            yield "", replace(part, layout=layout, program=program)


def arguments(
    kind: Kind, tensors: tuple[torch.Tensor, ...], graph: Neighbours, width: int
) -> tuple[list[Any], list[torch.Tensor]]:
    """A kernel's arguments, and those among them that it writes, poisoned."""
    x, y, w = tensors
    index = [graph.by_receiver, graph.senders, graph.first_of_receiver]
    like = lambda t: torch.randn_like(t)  # noqa: E731
    new = lambda *shape: x.new_full(shape, float("nan"))  # noqa: E731
    out, dx, dy, dw = new(graph.nodes, width), new(len(y), x.shape[1]), new(*y.shape), new(*w.shape)
    torch.manual_seed(1)
    g, tangents = like(out.nan_to_num()), [like(x), like(y), like(w)]
    if kind == "forward":
        return [x, y, w, *index, out], [out]
    if kind == "backward":
        return [x, y, w, g, *index, len(y), dx, dy, dw], [dy, dw]
    return [x, y, w, g, *tangents, *index, len(y), out, dx, dy, dw], [out, dy, dw]


def milliseconds(run: Callable[[], object]) -> float:
    """Median of 20."""
    for _ in range(3):
        run()
    times = []
    for _ in range(20):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(float(before.elapsed_time(after)))
    return statistics.median(times)


def main(name: str, kind: Kind, dtype: str) -> None:
    """Print a line for each layout, fastest first."""
    (product,) = [p for p in PRODUCTS if p.name == name]
    device = torch.device("cuda")
    here = work(product, EDGES, getattr(torch, dtype), device)
    descriptor = registry().describe(here.module, "convolution")
    assert isinstance(descriptor, ConvolutionDescriptor)
    assert here.edge_index is not None
    kernels = FusedConvolution(
        descriptor.product, PlanContext(getattr(torch, dtype), device, Config())
    )
    graph = neighbours_of(here.edge_index, len(here.tensors[0]))
    found = list(layouts(kernels, kind))
    loaded = load_all([part.program for _, part in found], device, Config())
    lines, exact = [], None
    for (label, part), program in zip(found, loaded, strict=True):
        entry = part.program.entries[0]
        kernel = program.kernel(entry, SIGNATURES[entry])
        given, written = arguments(kind, here.tensors, graph, kernels.dim_out)
        grid, block, shared = _launch(graph, part.layout)
        time = milliseconds(lambda: kernel(grid, block, *given, shared=shared))  # noqa: B023
        exact = exact or [t.double() for t in written]
        error = max(
            float((t.double() - e).norm() / e.norm()) for t, e in zip(written, exact, strict=True)
        )
        use, layout = program.binary.resources[entry], part.layout
        lines.append(
            (time, f"{time:.4f} ms  {label:7s} blocks {layout.blocks} edges {layout.edges} "
             f"slots {layout.slots}: {use}; differs by {error:.0e}")
        )  # fmt: skip
    print(torch.cuda.get_device_name(), name, kind, dtype)
    print(*[line for _, line in sorted(lines)], sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
