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

CASES = {
    "MACE": ("33x0e+33x1o", "33x0e+33x1o"),
    "wide": ("70x0e+128x1o", "65x1o+3x0e"),
    "several paths, unreachable": ("2x0e+3x2e+2x0e+1x1e", "3x0e+2x2e+1x0e+2x1o"),
    "no channels": ("2x0e+0x1o", "3x0e+2x1o+0x0e"),
}


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


def built(*irreps: str, **given: int | list[bool]) -> Any:
    """With random weights."""
    return randomise(o3.Linear(*irreps, **given), 1)


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
