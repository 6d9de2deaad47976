"""The cuda backend on the CPU: its plans and kernels against float64 stock e3nn, path by path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod

import pytest
import torch
from comparison import (
    Derivatives,
    Operands,
    Slices,
    accelerated,
    assert_close,
    derivatives,
    draw,
    poisoned_memory,
    usage,
)
from e3nn import o3
from graphs import GRAPHS, random_edges


pytestmark = pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host")

Instructions = list[tuple[int, int, int, str, bool, float]]

SH = "0e+1o+2e+3o"
TARGET = "0e+0o+1e+1o+2e+2o"
CASES = {
    "MACE layer 1": ("40x0e", SH, SH),
    "MACE layer 2": ("33x0e+33x1o", SH, SH),
    "several warps": ("160x0e+160x1o", "0e+1o", "0e+1o"),
    "mixed multiplicities": ("64x0e+33x1e+5x2e", "0e+1e+2e", "0e+1e+2e"),
    "odd multiplicities": ("5x0e+3x1o", "0e+1o", "0e+1o"),
    "several channels of the second input": ("8x0e+8x1o", "2x0e+3x1o", "0e+1o"),
    "several groups": ("+".join(f"8x{degree}" for degree in TARGET.split("+")), "0e+1o+2e", TARGET),
}
TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.float64: (1e-12, 1e-12)}


def every_path(irreps1: str, irreps2: str, target: str) -> o3.TensorProduct:
    """Each pair of inputs to each output that ``target`` has, each with an output of its own."""
    outputs: list[tuple[int, o3.Irrep]] = []
    instructions: Instructions = []
    for i, (mul, a) in enumerate(o3.Irreps(irreps1)):
        for j, (_, b) in enumerate(o3.Irreps(irreps2)):
            for c in a * b:
                if c in o3.Irreps(target):
                    instructions.append((i, j, len(outputs), "uvu", True, 1.0))
                    outputs.append((mul, c))
    return o3.TensorProduct(
        irreps1,
        irreps2,
        o3.Irreps(outputs),
        instructions,
        shared_weights=False,
        internal_weights=False,
    )


def shared_outputs() -> o3.TensorProduct:
    """Paths without weights, outputs that two paths lead to, and one that none does."""
    instructions: Instructions = [
        (0, 0, 0, "uvu", True, 1.0),
        (1, 1, 0, "uvu", True, 0.5),
        (0, 1, 2, "uvu", False, 1.0),
        (1, 0, 2, "uvu", True, 2.0),
        (1, 1, 3, "uvu", False, 0.7),
    ]
    return o3.TensorProduct(
        "5x0e+5x1o",
        "0e+1o",
        "5x0e+2x2e+5x1o+5x1e",
        instructions,
        shared_weights=False,
        internal_weights=False,
    )


def hub(nodes: int = 7) -> torch.Tensor:
    """Unsorted edges; one node receives more than a batch, the last two have none."""
    ends = random_edges(nodes - 2, 60, seed=4)
    ends[1, 10:50] = 1
    return ends


def operands_of(
    module: o3.TensorProduct, nodes: int, edges: int, dtype: torch.dtype, wanted: str = "xyw"
) -> Operands:
    """Node features, edge attributes and weights; those whose initial is wanted want gradients."""
    shapes = {
        "x": (nodes, module.irreps_in1.dim),
        "y": (edges, module.irreps_in2.dim),
        "weight": (edges, module.weight_numel),
    }
    return {
        name: draw(shape, seed, dtype).requires_grad_(name[0] in wanted)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def fused(module: o3.TensorProduct, ends: torch.Tensor) -> Callable[[Operands], torch.Tensor]:
    return lambda o: module(o["x"], o["y"], o["weight"], ends)


def stock(module: o3.TensorProduct, ends: torch.Tensor) -> Callable[[Operands], torch.Tensor]:
    """Gather, stock product, sum."""

    def run(o: Operands) -> torch.Tensor:
        messages = module(o["x"][ends[0]], o["y"], o["weight"])
        return messages.new_zeros(len(o["x"]), messages.shape[1]).index_add(0, ends[1], messages)

    return run


def doubled(operands: Operands) -> Operands:
    return {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in operands.items()}


def slices_of(module: o3.TensorProduct) -> Slices:
    """Each path's weights, each block of the other operands and of the result."""
    paths, start = [], 0
    for instruction in module.instructions:
        size = prod(instruction.path_shape) if instruction.has_weight else 0
        paths.append(slice(start, start + size))
        start += size
    blocks = {"x": module.irreps_in1, "y": module.irreps_in2, "value": module.irreps_out}
    found = {name: list(irreps.slices()) for name, irreps in blocks.items()}
    return found | {"direction": found["value"], "weight": paths}


def check(
    module: o3.TensorProduct, ends: torch.Tensor, operands: Operands, dtype: torch.dtype
) -> None:
    """Everything within rounding of float64 stock e3nn on the same operands."""
    ours = copy.deepcopy(module).to(dtype)
    with accelerated(backend="cuda", self_check=False), poisoned_memory():
        found = derivatives(fused(ours, ends), operands)
        assert usage(ours) == {("convolution", "cuda"): 1}
    expected = derivatives(stock(module, ends), doubled(operands))
    assert {t.dtype for t in found.tensors.values()} == {dtype}
    found = Derivatives({name: t.double() for name, t in found.tensors.items()})
    forward, gradient = TOLERANCE[dtype]
    slices = slices_of(module)
    value = lambda d: Derivatives({"value": d.tensors["value"]})  # noqa: E731
    assert_close(value(found), value(expected), forward, slices)
    assert_close(found, expected, gradient, slices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", list(CASES))
def test_values_and_derivatives(case: str, dtype: torch.dtype) -> None:
    """First and second derivatives, by every operand."""
    module, ends = every_path(*CASES[case]), hub()
    check(module, ends, operands_of(module, 7, ends.shape[1], dtype), dtype)
