"""Kernels that no other script times by themselves, beside the bandwidth of a copy in the same run.

python tests/gpu/time_rooflines.py [float32|float64]
python tests/gpu/time_rooflines.py cublas               our linears beside torch's products of matrices, float32

Times are the device's own, of calls replayed by a CUDA graph; what fits into the second-level cache stays there.
Bytes are those that can't be avoided: operands, results and gradients once each, and operands again for the gradients.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch
from e3nn import o3
from tune_linear import Case, call_of, replayed

import e3nn_accel
from e3nn_accel.backends.cuda.edges import EdgeSort
from e3nn_accel.backends.cuda.group_sums import GroupSums
from e3nn_accel.backends.cuda.species import SpeciesSort
from e3nn_accel.cli.node_operations import NODE_OPERATIONS, node_work
from e3nn_accel.config import Config
from e3nn_accel.plan import PlanContext
from e3nn_accel.structures import default_dtype

EDGES, NODES, ROWS = 150_000, 5000, 20_000
Timed = tuple[str, Callable[[], object], int]
"""What it is, a call, and the bytes that it moves."""


def main(name: str = "float32") -> None:
    """Print a line for each."""
    torch.manual_seed(0)
    if name == "cublas":
        beside_cublas()
        return
    dtype = getattr(torch, name)
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, {name}; a copy: {copy:.2f} TB/s")
    with e3nn_accel.enabled(backend="cuda"), default_dtype(dtype):
        for what, call, moved in (*products(dtype), *edge_features(dtype), *orders(dtype)):
            time = replayed(call)
            rate = moved / time / 1e9
            print(
                f"{what:58s} {time:.4f} ms, {moved / 1e6:8.1f} MB, {rate:.2f} TB/s, {rate / copy:.0%}"
            )


def copy_bandwidth() -> float:
    """TB/s, of a GiB, by a kernel: what the driver copies by itself comes to less."""
    rows = torch.zeros(1 << 28, dtype=torch.float32, device="cuda")
    copied = torch.empty_like(rows)
    return 2 * rows.nbytes / replayed(lambda: torch.neg(rows, out=copied), 2) / 1e9


def both(what: str, call: Callable[..., torch.Tensor], *operands: torch.Tensor) -> Iterator[Timed]:
    """A call alone, and with the gradients by all operands."""
    leaves = [t.requires_grad_() for t in operands]
    out = call(*leaves)
    g = torch.randn_like(out)
    given, made = sum(t.nbytes for t in operands), out.nbytes
    yield what, lambda: _without_gradients(call, operands), given + made
    yield (
        f"{what}, with gradients",
        lambda: torch.autograd.grad(call(*leaves), leaves, g),
        3 * given + 2 * made,
    )


def _without_gradients(call: Callable[..., torch.Tensor], operands: Any) -> None:
    with torch.no_grad():
        call(*operands)


def products(dtype: torch.dtype) -> Iterator[Timed]:
    """Of modes that tensor_product.cu alone has."""
    irreps = o3.Irreps("64x0e + 64x1o")
    paths = [
        (0, 0, 0, "uuu", True),
        (0, 1, 1, "uuu", True),
        (1, 0, 1, "uuu", True),
        (1, 1, 0, "uuu", True),
    ]
    module = o3.TensorProduct(
        irreps, irreps, irreps, paths, shared_weights=False, internal_weights=False
    )
    pairs = o3.TensorProduct(
        "16x0e + 16x1o", "8x0e + 8x1o", "128x0e + 128x1o + 128x1o",
        [(0, 0, 0, "uvuv", True), (0, 1, 1, "uvuv", True), (1, 0, 2, "uvuv", True)],
        shared_weights=False, internal_weights=False,
    )  # fmt: skip
    for name, of in (("uuu, 64x0e+64x1o", module), ("uvuv, 16 by 8", pairs)):
        of = of.to("cuda", dtype)
        dims = of.irreps_in1.dim, of.irreps_in2.dim, of.weight_numel
        yield from both(
            f"tensor_product.cu, {name}, {ROWS} rows", of, *(draw(ROWS, d, dtype) for d in dims)
        )


def edge_features(dtype: torch.dtype) -> Iterator[Timed]:
    """Spherical harmonics and the radial embedding."""
    for operation in NODE_OPERATIONS:
        if operation.kind in ("harmonics", "radial"):
            work = node_work(operation, EDGES, dtype, torch.device("cuda"))
            yield from both(f"{operation.name}, {EDGES} edges", work.ours(), *work.tensors)


def orders(dtype: torch.dtype) -> Iterator[Timed]:
    """What kernels go by: edges of a small graph by their ends, nodes by their species."""
    kinds = torch.randint(89, (NODES,), device="cuda")
    attrs = torch.nn.functional.one_hot(kinds, 89).to(dtype)
    by_species = SpeciesSort(PlanContext(dtype, torch.device("cuda"), Config()))
    # reads them, and keeps a copy
    yield (
        f"species.cu, {NODES} nodes, 89 species",
        lambda: by_species._find(attrs),
        2 * attrs.nbytes,
    )
    ends = torch.randint(64, (2, 3008), device="cuda")
    order, first = (
        torch.randperm(EDGES, device="cuda").int(),
        torch.arange(0, EDGES + 1, EDGES // NODES),
    )
    rows, sums, first = draw(EDGES, 3, dtype), GroupSums(Config()), first.int().cuda()
    moved = rows.nbytes + order.nbytes + NODES * 3 * rows.element_size()
    yield (
        f"sum_groups.cu, {EDGES} rows of 3, {NODES} groups",
        lambda: sums.sum(rows, order, first),
        moved,
    )
    by_ends = EdgeSort(Config())
    yield "edges.cu, 3008 edges, 64 nodes", lambda: by_ends.find(ends, 64), ends.nbytes


def beside_cublas() -> None:
    """Products of scalars, which a single product of matrices is, and of vectors, three for torch."""
    print(torch.cuda.get_device_name(), "ours, cuBLAS in float32; errors against float64")
    for rows, width_in, width_out in ((187_000, 64, 1280), (187_000, 64, 512), (10_000, 128, 128)):
        x, w = draw(rows, width_in, torch.float32), draw(width_in, width_out, torch.float32)
        g = draw(rows, width_out, torch.float32)
        call = call_of(Case(f"{width_in}x0e", f"{width_out}x0e", rows), torch.float32, "float32")
        scale, flat = width_in**-0.5, w.reshape(-1)
        ours = {"forward": lambda: call.forward(x, flat), "dx": lambda: call.to_input(g, flat)}  # noqa: B023
        theirs = {"forward": lambda: x @ w, "dx": lambda: g @ w.T}  # noqa: B023
        exact = {"forward": x.double() @ w.double(), "dx": g.double() @ w.double().T}
        for what, of in ours.items():
            errors = [
                float((found - exact[what]).norm() / exact[what].norm())
                for found in (of().double() / scale, theirs[what]().double())
            ]
            print(
                f"{rows} rows, {width_in} -> {width_out}, {what:8s} {replayed(of):.4f} and "
                f"{replayed(theirs[what]):.4f} ms; {errors[0]:.1e} and {errors[1]:.1e}"
            )


def draw(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=dtype)


if __name__ == "__main__":
    main(*sys.argv[1:])
