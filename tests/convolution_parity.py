"""Convolutions for the cuda backend, and everything about them against float64 stock e3nn, path by path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod

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
from graphs import random_edges

Instructions = list[tuple[int, int, int, str, bool, float]]

TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.float64: (1e-12, 1e-12)}
"""Relative and norm-wise, of values and of gradients."""


def every_path(irreps1: str, irreps2: str, target: str, **options: bool) -> o3.TensorProduct:
    """Each pair of inputs to each output that ``target`` has, each with an output of its own.

    Args:
        irreps1, irreps2: The inputs.
        target: Irreps; multiplicities are those of the first input.
        **options: Of e3nn: whether to generate its code.
    """
    outputs: list[tuple[int, o3.Irrep]] = []
    instructions: Instructions = []
    for i, (mul, a) in enumerate(o3.Irreps(irreps1)):
        for j, (_, b) in enumerate(o3.Irreps(irreps2)):
            for c in a * b:
                if c in o3.Irreps(target):
                    instructions.append((i, j, len(outputs), "uvu", True, 1.0))
                    outputs.append((mul, c))
    return product(irreps1, irreps2, o3.Irreps(outputs), instructions, **options)


def shared_outputs() -> o3.TensorProduct:
    """Paths without weights, outputs that two paths lead to, and one that none does."""
    return product(
        "5x0e+5x1o",
        "0e+1o",
        "5x0e+2x2e+5x1o+5x1e",
        [
            (0, 0, 0, "uvu", True, 1.0),
            (1, 1, 0, "uvu", True, 0.5),
            (0, 1, 2, "uvu", False, 1.0),
            (1, 0, 2, "uvu", True, 2.0),
            (1, 1, 3, "uvu", False, 0.7),
        ],
    )


def product(
    irreps1: str,
    irreps2: str,
    outputs: str | o3.Irreps,
    instructions: Instructions,
    **options: bool,
) -> o3.TensorProduct:
    """With weights of each edge."""
    own_weights = {"shared_weights": False, "internal_weights": False}
    return o3.TensorProduct(irreps1, irreps2, outputs, instructions, **own_weights, **options)


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
    """The four-argument call."""
    return lambda o: module(o["x"], o["y"], o["weight"], ends)


def unfused(module: o3.TensorProduct, ends: torch.Tensor) -> Callable[[Operands], torch.Tensor]:
    """Gather, stock product, sum."""

    def run(o: Operands) -> torch.Tensor:
        messages: torch.Tensor = module(o["x"][ends[0]], o["y"], o["weight"])
        return messages.new_zeros(len(o["x"]), messages.shape[1]).index_add(0, ends[1], messages)

    return run


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
    """The cuda backend within rounding of float64 stock e3nn on the same operands, all derivatives.

    ``module`` was built in float64; e3nn's constants would be rounded otherwise.
    """
    ours = copy.deepcopy(module).to(dtype)
    with accelerated(self_check=False), poisoned_memory():
        found = derivatives(fused(ours, ends), operands)
        assert usage(ours) == {("convolution", "cuda"): 1}
    assert {t.dtype for t in found.tensors.values()} == {dtype}
    exact = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in operands.items()}
    expected = derivatives(unfused(module, ends), exact)
    found = Derivatives({name: t.double() for name, t in found.tensors.items()})
    forward, gradient = TOLERANCE[dtype]
    slices = slices_of(module)
    assert_close(_value(found), _value(expected), forward, slices)
    assert_close(found, expected, gradient, slices)


def _value(d: Derivatives) -> Derivatives:
    return Derivatives({"value": d.tensors["value"]})
