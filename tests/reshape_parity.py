"""MACE's reshape_irreps by the cuda backend against stock MACE: the same numbers, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from comparison import accelerated, derivatives, draw, poisoned_memory, usage

CASES = {
    "MACE": "128x0e+128x1o+128x2e+128x3o",
    "chunks that aren't full": "300x0e+300x1o+300x2e",
    "odd": "7x0e+7x1o",
    "one irrep": "16x2e",
    "scalars": "5x0e",
    "in another order": "6x3o+6x0e+6x1o+6x1e",
    "wide": "3x5e+3x9o+3x0e",
}


def built(case: str) -> Any:
    from mace.modules.irreps_tools import reshape_irreps

    return reshape_irreps(CASES[case])


def rows(module: Any, nodes: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return draw((nodes, module.irreps.dim), 1, dtype).requires_grad_()


def check(module: Any, x: torch.Tensor, device: str = "cpu") -> None:
    """Values, first and second derivatives."""
    ours, x = copy.deepcopy(module), x.detach().to(device).requires_grad_()
    cubed = lambda m: lambda o: m(o["x"]) ** 3  # noqa: E731
    expected = derivatives(cubed(module), {"x": x}).tensors
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        found = derivatives(cubed(ours), {"x": x}).tensors
        assert usage(ours) == {("reshape_irreps", "cuda"): 1}
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted), name
