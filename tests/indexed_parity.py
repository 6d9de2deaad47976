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
from product_parity import TOLERANCE

SHAPES = {
    "many species": ("2x0e+3x1o", "89x0e", "3x0e+2x1o"),
    "unreachable": ("3x0e+2x1o+1x2e", "3x0e", "2x2e+1x3o+3x0e"),
    "several paths": ("2x0e+3x2e+2x0e+4x2e", "3x0e", "3x0e+70x2e+2x0e"),
    "no channels": ("2x0e+0x1o", "3x0e", "3x0e+2x1o+0x0e"),
    "odd scalars": ("2x0o+1x1e", "3x0o", "3x0e+2x1o"),
    "degrees": ("3x7o+2x5e", "3x0e", "2x5e+2x7o"),
}


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
