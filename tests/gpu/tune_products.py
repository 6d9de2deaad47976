"""Time the kernels of products with weights of each row, by bulk copies and without, for several layouts.

python tests/gpu/tune_products.py diffdock float32

Names are those of `bench --ops`. What `tensor_product_staged.RESIDENCES` and `tensor_product_warps.THREADS` say of an
H200 was found by this. Milliseconds of launches, medians by CUDA events: forward, gradients by all operands, by both
inputs alone, second derivatives; errors are relative, against the kernels without bulk copies.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch
from tune_convolution import milliseconds

from e3nn_accel.availability import architecture_of
from e3nn_accel.backends.cuda import tensor_product_staged, tensor_product_warps
from e3nn_accel.backends.cuda.tensor_product_cut import parts_of
from e3nn_accel.backends.cuda.tensor_product_launch import EVERYTHING, ProductLaunch
from e3nn_accel.backends.cuda.tensor_product_layout import Layout
from e3nn_accel.backends.cuda.tensor_product_plan import numbered
from e3nn_accel.backends.cuda.tensor_product_staged import StagedMixPart, staged
from e3nn_accel.cli.products import PRODUCTS, Work, work
from e3nn_accel.config import Config
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.health import registry
from e3nn_accel.plan import PlanContext

EDGES = 150_000
THREADS = (256, 128, 512)
RESIDENCES = ((3, 2), (2, 3), (2, 2), (4, 2), (1, 4), (1, 3), (1, 2))


@contextmanager
def laid_out(threads: int, residence: tuple[int, int]) -> Iterator[None]:
    """Plans made within have so many threads, blocks of a multiprocessor and slots."""
    changes = [(tensor_product_staged, "RESIDENCES", (residence,))]
    changes += [(m, "THREADS", threads) for m in (tensor_product_staged, tensor_product_warps)]
    changes += [(tensor_product_warps, "WARPS", threads // tensor_product_warps.WARP)]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def launch_of(of: Work, dtype: torch.dtype, by_copies: bool) -> ProductLaunch | None:
    """The kernels of a product; None where bulk copies have no room."""
    d = registry().describe(of.module, "tensor_product")
    assert isinstance(d, TensorProductDescriptor)
    paths, device = numbered(d), torch.device("cuda", torch.cuda.current_device())
    layout = Layout.of(d, paths)
    parts = parts_of(d, layout, paths, torch.finfo(dtype).bits // 8)
    if by_copies:
        parts = [staged(part, architecture_of(device)) for part in parts]
        if not any(isinstance(part, StagedMixPart) for part in parts):
            return None
    context = PlanContext(dtype, device, Config())
    return ProductLaunch(d, tuple(parts), layout.segments, context)


def results(kernels: ProductLaunch, of: Work, g: torch.Tensor) -> list[torch.Tensor]:
    """The value and all gradients."""
    found = [
        kernels.forward(*of.tensors, True),
        *kernels.backward(g, *of.tensors, True, EVERYTHING),
    ]
    return [t.double() for t in found if t is not None]


def times(kernels: ProductLaunch, of: Work, g: torch.Tensor) -> list[float]:
    """Milliseconds of each kind of launch that there is."""
    tangents = [torch.randn_like(t) for t in of.tensors]
    found = [
        milliseconds(lambda: kernels.forward(*of.tensors, True)),
        milliseconds(lambda: kernels.backward(g, *of.tensors, True, EVERYTHING)),
        milliseconds(lambda: kernels.backward(g, *of.tensors, True, (True, True, False))),
    ]
    if kernels.fused_double:
        found.append(milliseconds(lambda: kernels.double(g, *of.tensors, *tangents, True)))
    return found


def main(name: str, dtype_name: str = "float32") -> None:
    """Print a line for each layout."""
    dtype = getattr(torch, dtype_name)
    product = next(product for product in PRODUCTS if product.name == name)
    of = work(product, EDGES, dtype, torch.device("cuda"))
    g = torch.randn(len(of.tensors[0]), of.module.irreps_out.dim, device="cuda", dtype=dtype)
    print(torch.cuda.get_device_name(), name, dtype_name)
    without = launch_of(of, dtype, by_copies=False)
    assert without is not None
    print("without bulk copies", *(f"{t:.4f}" for t in times(without, of, g)))
    exact = results(without, of, g)
    for threads in THREADS:
        for residence in RESIDENCES:
            with laid_out(threads, residence):
                kernels = launch_of(of, dtype, by_copies=True)
                if kernels is None:
                    continue
                found = results(kernels, of, g)
                errors = [(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
                line = " ".join(f"{t:.4f}" for t in times(kernels, of, g))
            print(f"{threads} threads, {residence}: {line}, differs by {float(max(errors)):.0e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
