"""``o3.Linear`` by the cuda backend against float64 stock e3nn, path by path."""

from __future__ import annotations

import copy
from typing import Any

import torch
from comparison import (
    Derivatives,
    accelerated,
    assert_close,
    derivatives,
    draw,
    poisoned_memory,
    randomise,
    usage,
)
from e3nn import o3
from product_parity import TOLERANCE
from slow_cases import slow_but

from e3nn_accel.backends.cuda.linear_in_halves import Cut
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.descriptor import LinearDescriptor
from e3nn_accel.patches.linear import e3nn_accel_describe

CASES = {
    "MACE": ("33x0e+33x1o", "33x0e+33x1o"),
    "wide": ("70x0e+128x1o", "65x1o+3x0e"),
    "several paths, unreachable": ("2x0e+3x2e+2x0e+1x1e", "3x0e+2x2e+1x0e+2x1o"),
    "no channels": ("2x0e+0x1o", "3x0e+2x1o+0x0e"),
}

IN_HALVES = {
    "whole tiles": ("64x0e+128x1o", "128x0e+128x1o"),
    "parts of tiles": ("36x0e+20x1o+4x2e", "8x2e+44x0e+132x1o+4x3o"),
    "several paths": ("32x0e+16x1o+48x0e+20x1o", "20x1o+64x0e+12x1o"),
    "scalars": ("64x0e", "192x0e"),
    "degree 7": ("16x7o", "16x7o"),
    "long sums": ("1100x0e+20x0e", "12x0e"),
    "long sums of gradients": ("12x0e", "1100x0e"),
}
"""Rows that are copied four numbers at a time."""

STAGED = {
    "few steps": ("32x1o", "128x1o"),
    "MACE": ("128x0e+128x1o", "128x0e+128x1o"),
    "several paths": ("96x0e+32x2e+128x1o+32x0e", "256x0e+128x2e+128x1o"),
    "degree 7": ("128x7o", "128x7o"),
}
"""Whose channels fill steps and whose columns fill tiles."""

WEIGHTS_IN_HALVES = {
    "MACE": ("128x0e+128x1o", "128x0e+128x1o"),
    "parts of tiles": ("36x0e+132x1o+4x2e", "8x2e+44x0e+140x1o"),
    "few channels": ("64x0e", "192x0e"),
    "few channels, parts of tiles": ("40x0e+12x1o", "132x0e+20x1o"),
    "few columns": ("136x0e+64x1o", "64x0e+60x1o"),
    "several paths": ("96x0e+32x2e+128x1o+32x0e", "256x0e+128x2e+128x1o"),
    "degree 7": ("68x7o", "128x7o"),
}
WEIGHTS_STAGED = {
    **{name: irreps for name, irreps in WEIGHTS_IN_HALVES.items() if name != "degree 7"},
    "degree 6": ("68x6e", "128x6e"),
}
"""Whose gradient of weights is made by halves, where rows are many."""

OTHER_CUTS = slow_but(
    [
        Cut(64, 64, 16, 3, 4),
        Cut(128, 64, 32, 2, 2),
        Cut(128, 128, 16, 3, 2),
        Cut(64, 64, 32, 3, 4, warpgroups=True),
        Cut(64, 128, 32, 2, 3, warpgroups=True),
        Cut(64, 128, 32, 2, 4, warpgroups=True, columns_at_once=64),
        Cut(128, 64, 32, 2, 2, warpgroups=True),
        Cut(128, 128, 32, 2, 2, warpgroups=True),
    ],
    Cut(64, 128, 32, 2, 3, warpgroups=True),
    Cut(64, 64, 32, 3, 4, warpgroups=True),
)
"""Of kernels by halves: Hopper's, and what a device may be better off with."""


def rows_alone_and_together(
    module: Any, x: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs and gradients of every fourth row, of numbers of few bits, by themselves and beside the others."""
    x = x.clone()
    x[::4] = x[::4].round()

    def found(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf = rows.clone().requires_grad_()
        out = module(leaf)
        return out, *torch.autograd.grad(out.sum(), leaf)

    with accelerated(backend="cuda", self_check=False):
        return [(a, b[::4]) for a, b in zip(found(x[::4]), found(x), strict=True)]


def check(
    module: Any, x: torch.Tensor, dtype: torch.dtype, device: str = "cpu", **given: torch.Tensor
) -> None:
    """Values, first and second derivatives, each block's and path's by itself."""
    module = module.to(device)
    ours = copy.deepcopy(module).to(dtype)
    with torch.no_grad():
        for exact_weight, rounded in zip(module.parameters(), ours.parameters(), strict=True):
            exact_weight.copy_(rounded)  # the same numbers, rounded once
    here = {"x": x, **given}
    if dtype != torch.float64 or device != "cpu":
        here = {name: t.detach().to(device, dtype).requires_grad_() for name, t in here.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in here.items()}
    expected = derivatives(
        lambda o: module(o["x"], o.get("w")), exact | dict(module.named_parameters())
    )
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        found = derivatives(
            lambda o: ours(o["x"], o.get("w")), here | dict(ours.named_parameters())
        )
        assert usage(ours) == {("linear", "cuda"): 1}
    pieces, start = [], 0
    for instruction in module.instructions:
        size = torch.Size(instruction.path_shape).numel()
        pieces.append(slice(start, start + size))
        start += size
    out = list(module.irreps_out.slices())
    slices = {"x": list(module.irreps_in.slices()), "value": out, "weight": pieces, "w": pieces}
    found = Derivatives({name: t.double() for name, t in found.tensors.items()})
    assert_close(found, expected, TOLERANCE[dtype][1], slices)


def paths_of(*irreps: str) -> MatrixPaths:
    """Of a linear between these."""
    descriptor = e3nn_accel_describe(built(*irreps), "linear")
    assert isinstance(descriptor, LinearDescriptor)
    paths = MatrixPaths.of_linear(descriptor)
    assert isinstance(paths, MatrixPaths)
    return paths


def built(*irreps: str, **given: int | list[bool]) -> Any:
    """With random weights."""
    return randomise(o3.Linear(*irreps, **given), 1)


def scaled(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of rows, columns and inputs of very different sizes, and what they are measured by.

    By the norms of a row of the input and a column of the weights, whose product is their result's size.
    """
    module = built("96x0e", "64x0e").to(device)
    rows, columns = (10 ** (4 * draw((n, 1), n)).to(device) for n in (200, 64))
    x = (rows * draw((200, 96), 1).to(device)).float()
    with torch.no_grad():
        module.weight.copy_((module.weight.view(96, 64) * columns.T).flatten())
    x[7, 3:] *= 1e-12  # nothing but its first numbers counts
    x[11] = 0
    ours = copy.deepcopy(module).float()
    module.load_state_dict(ours.state_dict())  # the same numbers, rounded once
    with accelerated(self_check=False, backend="cuda"), torch.no_grad():
        found = ours(x)
        assert usage(ours) == {("linear", "cuda"): 1}
    with torch.no_grad():
        exact = module(x.double())
    sizes = x.double().norm(dim=1)[:, None] * module.weight.view(96, 64).norm(dim=0) / 96**0.5
    return (found.double() - exact).abs(), sizes


def scaled_weights(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of a gradient of weights whose channels, columns and rows differ in size, and what they are measured by.

    By the norms of a channel and a column over all rows: x grows from the first row to the last, g falls.
    """
    module = built("132x0e", "68x0e").to(device).float()
    channels, columns = (10 ** (4 * draw((1, n), n)).to(device) for n in (132, 68))
    rows = (10 ** torch.linspace(-5, 5, 300, dtype=torch.float64, device=device))[:, None]
    x = (rows * channels * draw((300, 132), 1).to(device)).float().requires_grad_()
    g = (columns / rows * draw((300, 68), 2).to(device)).float()
    with torch.no_grad():
        x[:, 7] = 0
        x[:-3, 11] *= 1e-12  # nothing but its last numbers counts
    with accelerated(self_check=False, backend="cuda"):
        (found,) = torch.autograd.grad(module(x), module.weight, g)
        assert usage(module) == {("linear", "cuda"): 1}
    x, g = x.detach().double(), g.double()
    exact = x.T @ g / 132**0.5
    sizes = x.norm(dim=0)[:, None] * g.norm(dim=0) / 132**0.5
    return (found.view(132, 68) - exact).abs(), sizes


def shrinkage(device: str = "cpu", width: int = 64, rows: int = 1000) -> dict[str, float]:
    """Of float32's values and first derivatives, the part of the error that is a multiple of what is right.

    It is all that is left in the mean over many edges, and in a stress, where large contributions cancel.
    ``width`` is a power of 4, for a path weight that float32 holds.
    """
    module = built(f"{width}x0e", f"{width}x0e").to(device)
    ours = copy.deepcopy(module).float()
    module.load_state_dict(ours.state_dict())  # the same numbers, rounded once
    x, g = (draw((rows, width), seed, torch.float32).to(device) for seed in (3, 4))

    def results(of: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        here = x.to(dtype).requires_grad_()
        out = of(here)
        return out.detach(), *torch.autograd.grad(out, (here, of.weight), g.to(dtype))

    with accelerated(self_check=False, backend="cuda"):
        found = results(ours, torch.float32)
        assert usage(ours) == {("linear", "cuda"): 1}
    names = ("value", "dx", "dW")
    return {
        name: float(((a.double() - b) * b).sum() / b.square().sum())
        for name, a, b in zip(names, found, results(module, torch.float64), strict=True)
    }
