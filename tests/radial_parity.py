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
