"""Time small tensor products on the CPU, stock e3nn's and ours: from how many rows, and how much work, a plan pays.

python tests/time_small_products.py

Of each product, for a few numbers of rows, multiplications in all, then microseconds of stock e3nn and of the torch
backend with their quotient: forward without gradients, and forward with the gradients of both inputs. Medians, one
way after the other. `FEWEST_ROWS` and `LEAST_WORK` of e3nn_accel/backends/torch/tensor_product.py are found by this.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch
from e3nn import o3

import e3nn_accel
from e3nn_accel.backends.torch.tensor_product import multiplications
from e3nn_accel.cli.machine import this_machine
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.health import registry

ROUNDS, CALLS = 15, 3
ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128)
MOST_WORK = 3_000_000
MIXED = "1e+2e+3x3o"


def of_mode(mode: str, l1: int, l2: int, l3: int) -> o3.TensorProduct:
    """As e3nn's own tests have them: one path of a mode, twice, and two that mix all channels."""
    channels = {mul: mul**2 if mode == "uvuv" else mul for mul in (25, 19)}
    return o3.TensorProduct(
        [(25, (l1, 1)), (19, (l1, 1))],
        [(25, (l2, 1)), (19, (l2, 1))],
        [(channels[25], (l3, 1)), (channels[19], (l3, 1))],
        [
            (0, 0, 0, mode, True), (1, 1, 1, mode, True),
            (0, 0, 1, "uvw", True, 0.5), (0, 1, 1, "uvw", True, 0.2),
        ],
    )  # fmt: skip


def of_edges(channels: int, degree: int) -> o3.TensorProduct:
    """As in a convolution, with weights of each row's own."""
    first = o3.Irreps([(channels, (n, (-1) ** n)) for n in range(degree + 1)])
    second = o3.Irreps.spherical_harmonics(degree)
    found = [
        (i, j, ir)
        for i, (_, a) in enumerate(first)
        for j, (_, b) in enumerate(second)
        for ir in a * b
        if ir.l <= degree
    ]
    out = [(channels, ir) for _, _, ir in found]
    paths = [(i, j, n, "uvu", True) for n, (i, j, _) in enumerate(found)]
    return o3.TensorProduct(first, second, out, paths, internal_weights=False, shared_weights=False)


PRODUCTS: dict[str, Callable[[], o3.TensorProduct]] = {
    **{f"{mode} {ls}": lambda mode=mode, ls=ls: of_mode(mode, *ls)  # type: ignore[misc]
       for mode, ls in (("uvw", (1, 1, 1)), ("uvw", (2, 2, 2)), ("uvu", (1, 1, 1)), ("uvv", (1, 1, 1)),
                        ("uuw", (1, 2, 1)), ("uuu", (0, 0, 0)), ("uvuv", (1, 1, 2)))},
    "32 channels to l = 2": lambda: of_edges(32, 2),
    "128 channels to l = 1": lambda: of_edges(128, 1),
    MIXED: lambda: o3.FullyConnectedTensorProduct(MIXED, MIXED, MIXED),
    "full": lambda: o3.FullTensorProduct("4x0e+4x1o", "4x0e+4x1o"),
}  # fmt: skip


def medians(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Microseconds of each, taking turns."""
    found: list[list[float]] = [[] for _ in calls]
    for round_ in range(ROUNDS + 2):
        for call, times in zip(calls, found, strict=True):
            call()
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            if round_ > 1:
                times.append(1e6 * (time.perf_counter() - started) / CALLS)
    return [statistics.median(times) for times in found]


def calls_of(product: o3.TensorProduct, rows: int) -> list[Callable[[], object]]:
    """Forward, and forward with gradients."""
    x, y = product.irreps_in1.randn(rows, -1), product.irreps_in2.randn(rows, -1)
    own = product.internal_weights or not product.weight_numel
    weights = () if own else (torch.randn(rows, product.weight_numel),)
    wanting = x.clone().requires_grad_(), y.clone().requires_grad_()

    def forward() -> object:
        with torch.no_grad():
            return product(x, y, *weights)

    return [
        forward,
        lambda: torch.autograd.grad(product(*wanting, *weights).sum(), wanting),
    ]


def main() -> None:
    """Print a line for each product and number of rows."""
    torch.set_num_threads(1)
    print(this_machine("cpu").heading)
    for name, make in PRODUCTS.items():
        product = make()
        found = registry().describe(product, "tensor_product")
        assert isinstance(found, TensorProductDescriptor)
        work = multiplications(found)
        for rows in ROWS:
            if rows * work > MOST_WORK:
                break
            calls = calls_of(product, rows)
            stock = medians(calls)
            with e3nn_accel.enabled(backend="torch"):
                ours = medians(calls)
            both = (f"{s:7.0f} {o:7.0f} {s / o:5.2f}" for s, o in zip(stock, ours, strict=True))
            print(f"{name:24} {rows:4} rows {rows * work:9}  {'   '.join(both)}", flush=True)


if __name__ == "__main__":
    main()
