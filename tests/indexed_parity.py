"""Products with one-hot scalars for the cuda backend against float64 stock e3nn, each species by itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from comparison import (
    Derivatives,
    Operands,
    accelerated,
    assert_close,
    derivatives,
    draw,
    poisoned_memory,
    randomise,
    strategy,
    usage,
)
from e3nn import o3
from mace_parts import node_attrs
from product_parity import TOLERANCE

SHAPES = {
    "many species": ("2x0e+3x1o", "89x0e", "3x0e+2x1o"),
    "unreachable": ("3x0e+2x1o+1x2e", "3x0e", "2x2e+1x3o+3x0e"),
    "several paths": ("2x0e+3x2e+2x0e+4x2e", "3x0e", "3x0e+70x2e+2x0e"),
    "no channels": ("2x0e+0x1o", "3x0e", "3x0e+2x1o+0x0e"),
    "odd scalars": ("2x0o+1x1e", "3x0o", "3x0e+2x1o"),
    "degrees": ("3x7o+2x5e", "3x0e", "2x5e+2x7o"),
}

IN_HALVES = {
    "small": ("16x0e+8x1o", "4x0e", "8x1o+12x0e"),
    "whole tiles": ("64x0e+128x1o", "3x0e", "128x0e+128x1o"),
    "parts of tiles": ("36x0e+20x1o+4x2e", "3x0e", "8x2e+44x0e+132x1o+4x3o"),
    "several paths": ("32x0e+16x1o+48x0e+20x1o", "3x0e", "20x1o+64x0e+12x1o"),
    "scalars": ("64x0e", "2x0e", "192x0e"),
    "many species": ("16x0e+4x1o", "89x0e", "8x0e+4x1o"),
    "degree 7": ("16x7o", "2x0e", "16x7o"),
}
"""Rows that are copied four numbers at a time."""


def built(irreps: tuple[str, str, str], **given: bool) -> Any:
    """In float64, its constants too, with weights that are the same each time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return randomise(o3.FullyConnectedTensorProduct(*irreps, **given), 1)
    finally:
        torch.set_default_dtype(before)


def check(
    irreps: tuple[str, str, str],
    y: torch.Tensor,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> None:
    """Values, first and second derivatives, each block's, path's and species's by itself."""
    module = built(irreps)
    x = draw((*y.shape[:-1], module.irreps_in1.dim), 3).requires_grad_()
    compare(module, {"x": x, "y": y}, dtype, device)


def compare(
    module: Any, operands: Operands, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> None:
    """On these operands and the module's weights, rounded to the dtype."""
    module = module.to(device)
    ours = copy.deepcopy(module).to(dtype)
    here, exact = operands, operands
    if dtype != torch.float64 or device != "cpu":
        here = {
            k: t.detach().to(device, dtype).requires_grad_(t.requires_grad)
            for k, t in operands.items()
        }
        exact = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in here.items()}
        with torch.no_grad():  # the same numbers, rounded once
            module.weight.copy_(ours.weight)

    def call(of: Any, o: Operands) -> torch.Tensor:
        out: torch.Tensor = of(o["x"], o["y"], *([o["w"]] if "w" in o else []))
        return out

    expected = derivatives(lambda o: call(module, o), exact | dict(module.named_parameters()))
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        found = derivatives(lambda o: call(ours, o), here | dict(ours.named_parameters()))
        assert usage(ours) == {("tensor_product", "cuda"): 1}
        assert strategy(ours).startswith("indexed linear over")
    assert {t.dtype for t in found.tensors.values()} == {dtype}
    pieces = slices_of(module)
    for name, tolerance in zip(("value", ""), TOLERANCE[dtype], strict=True):
        a, b = (
            Derivatives({n: t.double() for n, t in d.tensors.items() if not name or n == name})
            for d in (found, expected)
        )
        assert_close(a, b, tolerance, pieces)
    _each_species(module, found, expected, TOLERANCE[dtype][1])


def scaled(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of rows, columns and species of very different sizes, and what they are measured by.

    By the norms of a row of the input and a column of its species' weights, whose product is their result's size; rows
    of several species by the largest such product.
    """
    species, rows = 3, 200
    module = built(("96x0e", f"{species}x0e", "64x0e")).to(device)
    of_rows, of_columns = (10 ** (4 * draw(n, n[0])).to(device) for n in ((rows, 1), (species, 64)))
    with torch.no_grad():
        module.weight.copy_((module.weight.view(96, species, 64) * of_columns).flatten())
    x = (of_rows * draw((rows, 96), 1).to(device)).float()
    y = node_attrs("all species", rows, species)
    y[::9] = draw((species,), 5)  # of all
    y[4::9] = torch.tensor([0.0, 1e-20, 3.0])
    y = y.to(device, torch.float32)
    ours = copy.deepcopy(module).float()
    module.load_state_dict(ours.state_dict())  # the same numbers, rounded once
    with accelerated(self_check=False, backend="cuda"), torch.no_grad():
        found = ours(x, y)
        assert usage(ours) == {("tensor_product", "cuda"): 1}
    with torch.no_grad():
        exact = module(x.double(), y.double())
    columns = module.weight.detach().view(96, species, 64).norm(dim=0)
    largest = (y.double().abs()[:, :, None] * columns).amax(1)
    sizes = x.double().norm(dim=1)[:, None] * largest / (96 * species) ** 0.5
    return (found.double() - exact).abs(), sizes


def shrinkage(device: str = "cpu", rows: int = 1000) -> list[float]:
    """Of values and gradients of the features, the part of the error that is a multiple of what is right.

    64 channels of 4 species have a path weight that float32 holds.
    """
    module = built(("64x0e", "4x0e", "64x0e")).to(device)
    ours = copy.deepcopy(module).float()
    module.load_state_dict(ours.state_dict())  # the same numbers, rounded once
    x, g = (draw((rows, 64), seed, torch.float32).to(device) for seed in (3, 4))
    y = node_attrs("all species", rows).to(device)

    def results(of: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        here = x.to(dtype).requires_grad_()
        out = of(here, y.to(dtype))
        return out.detach(), *torch.autograd.grad(out, here, g.to(dtype))

    with accelerated(self_check=False, backend="cuda"):
        found = results(ours, torch.float32)
        assert usage(ours) == {("tensor_product", "cuda"): 1}
    return [
        float(((a.double() - b) * b).sum() / b.square().sum())
        for a, b in zip(found, results(module, torch.float64), strict=True)
    ]


def rows_of_any_company(device: str = "cpu") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs and gradients of every fourth row, of numbers of few bits, by themselves and beside the others."""
    module = built(IN_HALVES["small"]).to(device, torch.float32)
    rows = 150
    x = draw((rows, module.irreps_in1.dim), 1, torch.float32).to(device)
    x[::4] = x[::4].round()
    y = node_attrs("one row mixed", rows)
    y[::12] = draw((4,), 5)
    y[4::12, 1] += 2
    y = y.to(device, torch.float32)

    def found(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaf = x.clone().requires_grad_()
        out = module(leaf, y)
        return out, *torch.autograd.grad(out.sum(), leaf)

    with accelerated(backend="cuda", self_check=False):
        alone, together = found(x[::4], y[::4].contiguous()), found(x, y)
    return [(a, b[::4]) for a, b in zip(alone, together, strict=True)]


def slices_of(module: Any) -> dict[str, list[slice]]:
    """Blocks of rows, paths of weights."""
    paths, start = [], 0
    for instruction in module.instructions:
        size = torch.Size(instruction.path_shape).numel()
        paths.append(slice(start, start + size))
        start += size
    out = list(module.irreps_out.slices())
    return {
        "x": list(module.irreps_in1.slices()),
        "value": out,
        "direction": out,
        "weight": paths,
        "w": paths,
    }


def _each_species(module: Any, found: Derivatives, expected: Derivatives, tolerance: float) -> None:
    """A species has few rows: its weights' gradient is compared with its own size, zero with zero."""
    for name in ("d weight", "d w"):
        if name in expected.tensors:
            for instruction, piece in zip(
                module.instructions, slices_of(module)["weight"], strict=True
            ):
                a, b = (
                    d.tensors[name][piece].reshape(instruction.path_shape).double().transpose(0, 1)
                    for d in (found, expected)
                )
                for ours, stock in zip(a, b, strict=True):
                    assert float((ours - stock).norm()) <= 4 * tolerance * float(stock.norm())
