"""``o3.SphericalHarmonics`` by the cuda backend against float64 stock e3nn, degree by degree."""

from __future__ import annotations

import copy
from typing import Any

import torch
from comparison import (
    DIRECTION,
    Derivatives,
    accelerated,
    assert_close,
    derivatives,
    draw,
    poisoned_memory,
    usage,
)
from e3nn import o3
from product_parity import TOLERANCE

CASES: dict[str, tuple[Any, bool, str]] = {
    "MACE": ("0e+1o+2e+3o", True, "component"),
    "polynomials": ("0e+1o+2e+3o", False, "integral"),
    "norm": ("0e+1o+2e", True, "norm"),
    "pseudovectors": ("0e+1e+2e+3e", True, "component"),
    "one degree": (4, True, "component"),
    "odd order, repeated": ([3, 1, 3, 0, 2, 1, 3], True, "integral"),
    "repeated": ("2x0e+3x2e", False, "component"),
    "vectors alone": ("1o", False, "component"),
    "up to 6": ("0e+1o+2e+3o+4e+5o+6e", True, "integral"),
    "up to 11": (list(range(12)), True, "component"),
    "11 alone, a polynomial": ([11], False, "norm"),
}


def built(case: str) -> Any:
    return o3.SphericalHarmonics(CASES[case][0], CASES[case][1], CASES[case][2])


def vectors(*shape: int, seed: int = 1) -> torch.Tensor:
    """Of lengths around one."""
    return draw((*shape, 3), seed).requires_grad_()


def slices_of(module: Any) -> list[slice]:
    """Each degree's components."""
    found, start = [], 0
    for degree in module._ls_list:
        found.append(slice(start, start + 2 * degree + 1))
        start += 2 * degree + 1
    return found


def check(module: Any, x: torch.Tensor, dtype: torch.dtype, device: str = "cpu") -> None:
    """Values, first and second derivatives, each degree's and each coordinate's by itself.

    In float32 a single vector has its coordinates together: one may be all but cancelled, for stock as well.
    """
    if dtype != torch.float64 or device != "cpu":
        x = x.detach().to(device, dtype).requires_grad_()
    exact = x.detach().double().cpu().requires_grad_()
    expected = derivatives(lambda o: module(o["x"]), {"x": exact})
    ours = copy.deepcopy(module)
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        found = derivatives(lambda o: ours(o["x"]), {"x": x})
        assert usage(ours) == {("spherical_harmonics", "cuda"): 1}
    out = slices_of(module)
    alone = dtype == torch.float64 or len(x) > 1
    coordinates = [slice(n, n + 1) for n in range(3)] if alone else []
    slices = {"value": out, DIRECTION: out, "x": coordinates}
    on_cpu = {name: t.double().cpu() for name, t in found.tensors.items()}
    for name, tolerance in [("value", TOLERANCE[dtype][0]), ("", TOLERANCE[dtype][1])]:
        ours_of, wanted = (
            Derivatives({n: t for n, t in of.items() if n.startswith(name)})
            for of in (on_cpu, expected.tensors)
        )
        assert_close(ours_of, wanted, tolerance, slices)
