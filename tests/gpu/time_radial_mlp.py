"""Time radial MLPs of MACE, stock e3nn's and ours, forward and with gradients.

python tests/gpu/time_radial_mlp.py           every shape and dtype
python tests/gpu/time_radial_mlp.py tune      rows and blocks of the hidden layers' kernels, by themselves

Times are the device's own, of calls replayed by a CUDA graph, in milliseconds. "dx" is forward and the
gradient of the input, weights frozen, as for forces; "dx, dW" has the weights' gradients too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from radial_parity import Net
from tune_convolution import milliseconds

import e3nn_accel
from e3nn_accel.backends.cuda import radial_mlp_kernels
from e3nn_accel.backends.cuda.radial_mlp_kernels import ALL, FORWARD, INPUT, RadialMlpKernels
from e3nn_accel.config import Config
from e3nn_accel.health import registry
from e3nn_accel.plan import PlanContext

HIDDEN = (8, 64, 64, 64)
EDGES = (3_000, 46_000, 187_000)
DTYPES = (torch.float32, torch.float64)


def replayed(run: Callable[[], object], calls: int = 3) -> float:
    """Milliseconds of a call without the host's."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return milliseconds(graph.replay) / calls


def times(module: Any, x: torch.Tensor, g: torch.Tensor) -> list[float]:
    """Forward, with dx, and with dx and dW."""
    weights = list(module.parameters())

    def forward() -> object:
        with torch.no_grad():
            return module(x)

    def gradients(leaves: list[torch.Tensor]) -> object:
        return torch.autograd.grad(module(x), leaves, g)

    module.requires_grad_(False)
    found = [replayed(forward), replayed(lambda: gradients([x]))]
    module.requires_grad_(True)
    return [*found, replayed(lambda: gradients([x, *weights]))]


def compare() -> None:
    """Print a line for each shape, dtype and number of edges."""
    print(f"{'':44s} {'forward':>18s} {'dx':>18s} {'dx, dW':>18s}   ms, stock and ours")
    for dtype, width, edges in product(DTYPES, (1280, 640), EDGES):
        module = Net((*HIDDEN, width)).build().to("cuda", dtype)
        x = torch.randn(edges, 8, device="cuda", dtype=dtype, requires_grad=True)
        g = torch.randn(edges, width, device="cuda", dtype=dtype)
        stock = times(module, x, g)
        with e3nn_accel.enabled(strict=True, backend="cuda"):
            ours = times(module, x, g)
        both = " ".join(f"{a:9.4f}{b:9.4f}" for a, b in zip(stock, ours, strict=True))
        print(f"{(*HIDDEN, width)!s:26s} {str(dtype)[6:]:8s} {edges:8d} {both}", flush=True)


def tune() -> None:
    """Print a line for each kernel of the hidden layers and each way to cut it."""
    described: Any = registry().describe(Net((*HIDDEN, 8)).build(), "radial_mlp")
    chosen = radial_mlp_kernels.cut
    for dtype, kind in product(DTYPES, (FORWARD, INPUT, ALL)):
        for rows, blocks in product((32, 64, 128), (1, 2, 3, 4, 5)):

            def cut(widths: Any, bytes_each: int, of: str, given: Any = (rows, blocks)) -> Any:
                mine, (tall, many) = chosen(widths, bytes_each, of), given
                of_a_row = radial_mlp_kernels.shared_of_a_row(widths, of) * bytes_each
                more = mine.shared + (tall - mine.rows) * of_a_row
                return mine._replace(rows=tall, blocks=many, shared=more)

            with mock.patch.object(radial_mlp_kernels, "cut", cut):
                context = PlanContext(dtype, torch.device("cuda"), Config())
                kernels = RadialMlpKernels(described.layers[:-1], "", context)
            for edges in EDGES:
                draw = lambda *n: torch.randn(n, device="cuda", dtype=dtype)  # noqa: B023, E731
                x, g = draw(edges, 8), draw(edges, 64)
                w = [draw(a, b) for a, b in pairwise(HIDDEN)]
                try:
                    if kind == FORWARD:
                        time = replayed(lambda: kernels.forward(x, w))  # noqa: B023
                    else:
                        wanted = (True, *[kind == ALL] * 3)
                        time = replayed(lambda: kernels.backward(g, x, w, wanted))  # noqa: B023
                except Exception as error:  # too much shared memory
                    print(f"{kind:9s} {str(dtype)[6:]} {rows} {blocks}: {str(error)[:70]}")
                    break
                mine = chosen(HIDDEN, dtype.itemsize, kind)
                mark = "  <- chosen" if (rows, blocks) == mine[:2] else ""
                print(f"{kind:9s} {str(dtype)[6:]} rows {rows:3d} blocks {blocks} edges {edges:6d}: "
                      f"{time:.4f} ms{mark}", flush=True)  # fmt: skip


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__)
    tune() if sys.argv[1:] == ["tune"] else compare()
