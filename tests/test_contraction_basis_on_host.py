"""MACE's weights in the reduced basis by a kernel on the CPU, against matrix products, to any order."""

from __future__ import annotations

import pytest
import torch
from comparison import draw, poisoned_memory

from e3nn_accel.backends.cuda.contraction_basis import ChangeOfBasis
from e3nn_accel.config import Config
from e3nn_accel.layout import reduce_weights
from e3nn_accel.ops.change_of_basis import change_of_basis
from e3nn_accel.plan import PlanContext

SIZES = ((1, 1), (4, 3), (23, 8), (5, 5), (2, 1))
"""Paths, and reduced ones, of each block."""
SPECIES, CHANNELS = 3, 50

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64", "kernels_on_host")]


def projections() -> list[torch.Tensor]:
    return [draw(size, n, torch.float64) for n, size in enumerate(SIZES)]


def kernels(dtype: torch.dtype = torch.float64) -> ChangeOfBasis:
    context = PlanContext(dtype, torch.device("cpu"), Config())
    return ChangeOfBasis([p.numpy() for p in projections()], CHANNELS, context, "")


def weights(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(SPECIES, paths, CHANNELS) for paths, _ in SIZES]
    return [draw(shape, 10 + n, dtype).requires_grad_() for n, shape in enumerate(shapes)]


def in_torch(given: list[torch.Tensor]) -> torch.Tensor:
    matrices = projections()
    return torch.cat([reduce_weights(w, p.to(w)) for w, p in zip(given, matrices, strict=True)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_value_and_gradients(dtype: torch.dtype) -> None:
    given = weights(dtype)
    exact = [w.detach().double().requires_grad_() for w in given]
    expected = in_torch(exact)
    g = draw(tuple(expected.shape), 3, dtype)
    with poisoned_memory():
        found = change_of_basis(given, kernels(dtype))
        gradients = torch.autograd.grad(found, given, g)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 1e-5}
    if dtype == torch.float64:
        tolerance["atol"] = 1e-12
    torch.testing.assert_close(found.double(), expected, **tolerance)
    exact_gradients = torch.autograd.grad(expected, exact, g.double())
    for a, b in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


def test_higher_derivatives() -> None:
    """Of a function of the result that isn't linear; some weights are held fixed in each."""
    for wanted in ([0, 1, 2, 3, 4], [2], [0, 4]):
        given = weights()
        leaves = [given[n] for n in wanted]
        found = third(change_of_basis(given, kernels()), leaves)
        for a, b in zip(found, third(in_torch(given), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def third(value: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    found = torch.autograd.grad(value.sin().sum(), leaves, create_graph=True)
    for _ in range(2):
        loss = sum((t * t.detach().cos()).sum() for t in found[:2])  # of some of them alone
        found = torch.autograd.grad(loss, leaves, create_graph=True)
    return found


def test_nothing_is_recorded_of_frozen_weights() -> None:
    given = [w.detach() for w in weights()]
    found = change_of_basis(given, kernels())
    assert not found.requires_grad
    torch.testing.assert_close(found, in_torch(given))


def test_weights_that_are_not_contiguous() -> None:
    given = [w.detach().transpose(1, 2).contiguous().transpose(1, 2) for w in weights()]
    torch.testing.assert_close(change_of_basis(given, kernels()), in_torch(given))
