"""MACE's radial embedding by the cuda backend against float64 stock MACE."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from comparison import (
    Derivatives,
    accelerated,
    assert_close,
    derivatives,
    draw,
    poisoned_memory,
    usage,
)
from product_parity import TOLERANCE

R_MAX = 4.5
CASES = {"MACE-MP-0": (10, 5), "MACE-OFF": (8, 5), "steep": (7, 12), "one function": (1, 1)}
"""Numbers of Bessel functions, and exponents of the cutoff."""


def block(basis: int = 8, p: int = 5, **given: Any) -> Any:
    """With frequencies that are no multiples of each other, as after training."""
    from mace.modules.blocks import RadialEmbeddingBlock

    module = RadialEmbeddingBlock(R_MAX, basis, p, **given)
    weights = getattr(module.bessel_fn, "bessel_weights", None)
    if weights is not None:
        weights.mul_(1 + 0.01 * draw((basis,), 7))
    return module


def lengths(edges: int, seed: int = 1) -> torch.Tensor:
    """Up to the cutoff and beyond it, both ends among them; the shortest is a bond's half."""
    spread = 0.5 + 1.2 * R_MAX * draw((edges, 1), seed).sigmoid()
    spread[-1:] = R_MAX
    spread[-2:-1] = 0.999 * R_MAX
    return spread.requires_grad_()


def embedding(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The block as a function of lengths, whose second result has nothing in it."""

    def call(x: torch.Tensor) -> torch.Tensor:
        out, cutoff = module(x, None, None, None)
        assert cutoff is None
        return out  # type: ignore[no-any-return]

    return call


def check(module: Any, x: torch.Tensor, dtype: torch.dtype, device: str = "cpu") -> None:
    """Values, first and second derivatives, each function's by itself."""
    ours = copy.deepcopy(module).to(device, dtype)
    exact_module = copy.deepcopy(ours).to("cpu", torch.float64)  # the same numbers, rounded once
    if dtype != torch.float64 or device != "cpu":
        x = x.detach().to(device, dtype).requires_grad_()
    exact = x.detach().double().cpu().requires_grad_()
    expected = derivatives(lambda o: embedding(exact_module)(o["x"]), {"x": exact})
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        found = derivatives(lambda o: embedding(ours)(o["x"]), {"x": x})
        assert usage(ours) == {("radial_embedding", "cuda"): 1}
    functions = [slice(n, n + 1) for n in range(ours.out_dim)]
    on_cpu = {name: t.double().cpu() for name, t in found.tensors.items()}
    for name, tolerance in [("value", TOLERANCE[dtype][0]), ("", TOLERANCE[dtype][1])]:
        ours_of, wanted = (
            Derivatives({n: t for n, t in of.items() if n.startswith(name)})
            for of in (on_cpu, expected.tensors)
        )
        assert_close(ours_of, wanted, tolerance, {"value": functions, "direction": functions})
