"""o3.Linear's kernels on the CPU against float64 stock e3nn, to the second derivative."""

from __future__ import annotations

import copy
from typing import Any

import pytest
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

from e3nn_accel.backends.cuda import CudaBackend
from e3nn_accel.config import Config
from e3nn_accel.patches.linear import e3nn_accel_describe
from e3nn_accel.plan import PlanContext, Refusal

pytestmark = pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host")

CASES = {
    "MACE": ("33x0e+33x1o", "33x0e+33x1o"),
    "wide": ("70x0e+128x1o", "65x1o+3x0e"),
    "several paths, unreachable": ("2x0e+3x2e+2x0e+1x1e", "3x0e+2x2e+1x0e+2x1o"),
    "no channels": ("2x0e+0x1o", "3x0e+2x1o+0x0e"),
}


def check(module: Any, x: torch.Tensor, dtype: torch.dtype, **given: torch.Tensor) -> None:
    """Values, first and second derivatives, each block's and path's by itself."""
    ours = copy.deepcopy(module).to(dtype)
    with torch.no_grad():
        module.weight.copy_(ours.weight)  # the same numbers, rounded once
    here = {"x": x, **given}
    if dtype != torch.float64:
        here = {name: t.detach().to(dtype).requires_grad_() for name, t in here.items()}
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


def built(*irreps: str, **given: bool) -> Any:
    """With random weights."""
    return randomise(o3.Linear(*irreps, **given), 1)


@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case: str) -> None:
    module = built(*CASES[case])
    check(module, draw((70, module.irreps_in.dim), 3).requires_grad_(), torch.float64)


def test_single_precision() -> None:
    module = built(*CASES["MACE"])
    check(module, draw((300, module.irreps_in.dim), 3).requires_grad_(), torch.float32)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), ()])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    module = built(*CASES["MACE"])
    check(module, draw((*shape, module.irreps_in.dim), 3).requires_grad_(), torch.float64)


def test_weights_from_outside_and_columns_of_wider_rows() -> None:
    module = built(*CASES["MACE"], shared_weights=True, internal_weights=False)
    x = draw((module.irreps_in.dim, 5), 1).T.requires_grad_()
    w = draw((module.weight_numel, 2), 2)[:, 0].requires_grad_()
    check(module, x, torch.float64, w=w)


@pytest.mark.parametrize(
    ("module", "backend", "reason"),
    [
        (("2x0e", "2x0e", {}), "auto", "until the kernels are measured"),
        (("2x0e", "2x0e", {"biases": True}), "cuda", "biases"),
        (("2x0e", "2x1o", {}), "cuda", "no path"),
    ],
    ids=["default", "biases", "no path"],
)
def test_refusals(module: tuple[str, str, dict[str, bool]], backend: str, reason: str) -> None:
    irreps_in, irreps_out, given = module
    descriptor = e3nn_accel_describe(o3.Linear(irreps_in, irreps_out, **given), "linear")
    assert descriptor is not None
    context = PlanContext(torch.float64, torch.device("cpu"), Config(backend=backend))
    refused = CudaBackend().plan(descriptor, context)
    assert isinstance(refused, Refusal)
    assert reason in refused.reason
