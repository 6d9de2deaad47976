"""Nothing waits for the device: neither values nor first and second derivatives, once an operation has run, on a GPU.

Also of operands that haven't been seen: edges and species are sorted on the device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import test_convolution_gpu
import torch
from comparison import accelerated, draw, usage
from harmonics_parity import built as harmonics
from indexed_parity import built as indexed
from linear_parity import built as linear
from mace_parts import Contraction, node_attrs
from product_parity import Product
from radial_parity import Net
from test_tensor_product_gpu import CASES as PRODUCTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float64"),
]

Tensors = list[torch.Tensor]


class Work(NamedTuple):
    """A call of one module.

    Attributes:
        operation: As plans are asked for it.
        call: The module as a function of operands and constants.
        draw: Of a seed, operands that want gradients and constants.
    """

    module: Any
    operation: str
    call: Callable[..., torch.Tensor]
    draw: Callable[[int], tuple[Tensors, Tensors]]


def convolution(edges: int) -> Work:
    module = test_convolution_gpu.product("mace layer 2", torch.float32)
    nodes = 50

    def drawn(seed: int) -> tuple[Tensors, Tensors]:
        shapes = (
            (nodes, module.irreps_in1.dim),
            (edges, module.irreps_in2.dim),
            (edges, module.weight_numel),
        )
        generator = torch.Generator().manual_seed(seed)
        ends = torch.randint(0, nodes, (2, edges), generator=generator)
        return [draw(shape, seed + n) for n, shape in enumerate(shapes)], [ends]

    return Work(module, "convolution", module, drawn)


def product(case: Product, rows: int = 500) -> Work:
    module = case.build()
    return Work(
        module,
        "tensor_product",
        module,
        lambda seed: ([t + seed for t in case.operands(module, rows, torch.float32).values()], []),
    )


def linear_of(rows: int) -> Work:
    module = linear("128x0e+128x1o", "128x0e+128x1o")
    return Work(module, "linear", module, lambda seed: ([draw((rows, 512), seed)], []))


def skip_connection(rows: int, species: int) -> Work:
    module = indexed(("128x0e+128x1o", f"{species}x0e", "128x0e+128x1o"))

    def drawn(seed: int) -> tuple[Tensors, Tensors]:
        return [draw((rows, 512), seed)], [node_attrs("all species", rows, species).roll(seed, 0)]

    return Work(module, "tensor_product", module, drawn)


def contraction() -> Work:
    pytest.importorskip("mace", reason="MACE isn't installed")
    from contraction_parity import saved_and_loaded

    of = Contraction("0e+1o+2e+3o", "0e+1o", 3, channels=128, species=10)
    module = saved_and_loaded(of.build(torch.float32))

    def drawn(seed: int) -> tuple[Tensors, Tensors]:
        return [of.features(300, seed)], [node_attrs("all species", 300, of.species).roll(seed, 0)]

    return Work(module, "contraction", module, drawn)


def radial_mlp() -> Work:
    module = Net((8, 64, 64, 64, 1280)).build()
    return Work(module, "radial_mlp", module, lambda seed: ([draw((2000, 8), seed)], []))


def spherical_harmonics() -> Work:
    module = harmonics("MACE")
    return Work(module, "spherical_harmonics", module, lambda seed: ([draw((2000, 3), seed)], []))


def radial_embedding() -> Work:
    pytest.importorskip("mace", reason="MACE isn't installed")
    from radial_embedding_parity import block, embedding, lengths

    module = block()
    return Work(
        module,
        "radial_embedding",
        embedding(module),
        lambda seed: ([lengths(2000, seed).detach()], []),
    )


def reshape_irreps() -> Work:
    pytest.importorskip("mace", reason="MACE isn't installed")
    from reshape_parity import built

    module = built("MACE")
    dim = module.irreps.dim
    return Work(
        module,
        "reshape_irreps",
        lambda x: module(x) ** 3,
        lambda seed: ([draw((300, dim), seed)], []),
    )


CASES: dict[str, Callable[[], Work]] = {
    "convolution": lambda: convolution(2000),
    "convolution of many edges": lambda: convolution(20_000),
    "product, channels": lambda: product(PRODUCTS["128 channels"]),
    "product, pairs": lambda: product(PRODUCTS["pairs as they are"]),
    "product, weights of rows": lambda: product(PRODUCTS["DiffDock"]),
    "linear": lambda: linear_of(5000),
    "linear of few rows": lambda: linear_of(40),
    "skip connection": lambda: skip_connection(300, 89),
    "skip connection of many rows": lambda: skip_connection(5000, 3),
    "contraction": contraction,
    "radial MLP": radial_mlp,
    "spherical harmonics": spherical_harmonics,
    "radial embedding": radial_embedding,
    "reshape_irreps": reshape_irreps,
}


@contextmanager
def no_waiting() -> Iterator[None]:
    """What waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on(device: str, work: Work, seed: int) -> tuple[Tensors, Tensors]:
    """Operands in single precision, constants of numbers too."""
    operands, constants = work.draw(seed)
    return (
        [t.detach().to(device, torch.float32).requires_grad_() for t in operands],
        [t.to(device, torch.float32 if t.is_floating_point() else t.dtype) for t in constants],
    )


def everything(work: Work, operands: Tensors, constants: Tensors) -> tuple[torch.Tensor, ...]:
    """The value, and derivatives as in training on forces."""
    leaves = [*operands, *(p for p in work.module.parameters() if p.requires_grad)]
    out = work.call(*operands, *constants)
    direction = torch.ones_like(out).requires_grad_()
    first = torch.autograd.grad(out, leaves, direction, create_graph=True)
    squares = sum((t * t).sum() for t in first)
    return out, *first, *torch.autograd.grad(squares, [*leaves, direction], allow_unused=True)


def test_waiting_would_be_noticed() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        float(x.sum())


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_for_the_device(case: str) -> None:
    work = CASES[case]()
    work.module.to("cuda", torch.float32)
    with accelerated(backend="cuda"):
        everything(work, *on("cuda", work, 1))
        fresh = on("cuda", work, 2)
        with no_waiting():
            everything(work, *fresh)
        assert usage(work.module) == {(work.operation, "cuda"): 2}
