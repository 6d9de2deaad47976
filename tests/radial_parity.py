"""``e3nn.nn.FullyConnectedNet`` by the cuda backend against float64 stock e3nn, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

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
from e3nn.nn import FullyConnectedNet
from product_parity import TOLERANCE

SILU = torch.nn.functional.silu


class Net(NamedTuple):
    """A net by its arguments."""

    widths: tuple[int, ...]
    act: Callable[[torch.Tensor], torch.Tensor] | None = SILU
    variance_in: float = 1
    variance_out: float = 1
    out_act: bool = False

    def build(self) -> Any:
        """With random weights."""
        return randomise(FullyConnectedNet(list(self.widths), *self[1:]), 1)


CASES = {
    "MACE": Net((8, 64, 64, 64, 96)),
    "one hidden layer": Net((8, 64, 20)),
    "no hidden layer": Net((8, 20)),
    "odd widths": Net((3, 17, 40, 5, 7)),
    "wider than a tile": Net((70, 100, 33)),
    "variances, activation of the output": Net((8, 32, 12), SILU, 2.5, 0.3, True),
    "tanh": Net((5, 24, 24, 10), torch.tanh),
    "relu": Net((5, 24, 24, 10), torch.relu),
    "sigmoid": Net((5, 24, 24, 10), torch.sigmoid),
    "no activation": Net((5, 24, 10), None),
    "hidden layers too wide": Net((8, 160, 12)),
    "too many hidden layers": Net((8, 16, 16, 16, 16, 16, 12)),
}


def check(module: Any, x: torch.Tensor, dtype: torch.dtype, device: str = "cpu") -> None:
    """Values to 2e-6 or 1e-12, first and second derivatives to 5e-6 or 1e-12, each weight by itself."""
    module = module.to(device)
    ours = copy.deepcopy(module).to(dtype)
    with torch.no_grad():
        for exact, rounded in zip(module.parameters(), ours.parameters(), strict=True):
            exact.copy_(rounded)  # the same numbers, rounded once
    here = x
    if dtype != torch.float64 or device != "cpu":
        here = x.detach().to(device, dtype).requires_grad_()
    there = here.detach().double().requires_grad_()
    expected = derivatives(lambda o: module(o["x"]), {"x": there} | dict(module.named_parameters()))
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        found = derivatives(lambda o: ours(o["x"]), {"x": here} | dict(ours.named_parameters()))
        assert usage(ours) == {("radial_mlp", "cuda"): 1}
    found = Derivatives({name: t.double() for name, t in found.tensors.items()})
    of_values, of_gradients = TOLERANCE[dtype]
    values = [Derivatives({"value": d.tensors["value"]}) for d in (found, expected)]
    assert_close(*values, of_values, {})
    assert_close(found, expected, of_gradients, {})


def of_forces(module: Any, x: torch.Tensor, g: torch.Tensor, wanted: str) -> list[torch.Tensor]:
    """Gradients of a loss of the gradient by x alone, as forces are trained on."""
    leaves = {"x": x, "g": g}
    leaves |= {name.removesuffix(".weight"): p for name, p in module.named_parameters()}
    (first,) = torch.autograd.grad(module(x), x, g, create_graph=True)
    loss = (first * torch.linspace(-1, 1, first.numel()).to(first).view_as(first)).sum()
    names = wanted.split() or list(leaves)
    chosen = [leaves[name] for name in names]
    found = torch.autograd.grad(loss, chosen, allow_unused=True)  # without activation, x is unused
    return [torch.zeros_like(t) if d is None else d for t, d in zip(chosen, found, strict=True)]


def compare_of_forces(
    case: str, dtype: torch.dtype, rows: int, wanted: str = "", device: str = "cpu"
) -> None:
    """Their training's gradients with those of stock in float64."""
    module = CASES[case].build().to(device, dtype)
    x, g = (
        draw((rows, width), seed).to(device, dtype)
        for width, seed in zip(module.hs[:: len(module.hs) - 1], (3, 4), strict=True)
    )
    exact = [t.double().requires_grad_() for t in (x, g)]
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        found = of_forces(module, x.requires_grad_(), g.requires_grad_(), wanted)
    expected = of_forces(module.double(), *exact, wanted)
    _, tolerance = TOLERANCE[dtype]
    for ours, stock in zip(found, expected, strict=True):
        scale = float(stock.abs().max()) if stock.numel() else 0
        torch.testing.assert_close(
            ours.double(), stock, rtol=0, atol=tolerance * max(scale, 1e-300)
        )
