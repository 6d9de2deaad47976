"""The kernels of spherical harmonics on the CPU against float64 stock e3nn, to the third derivative."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import accelerated, usage
from e3nn import o3
from harmonics_parity import CASES, built, check, slices_of, vectors
from host_kernels import HostCompiler, race_shown
from kernel_barriers import barriers, without
from slow_cases import slow_but

import e3nn_accel

pytestmark = pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host")

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@BOTH
@pytest.mark.parametrize(
    "case", slow_but(CASES, "MACE", "polynomials", "one degree", "odd order, repeated")
)
def test_values_and_derivatives(case: str, dtype: torch.dtype) -> None:
    check(built(case), vectors(70), dtype)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("degree", range(1, 12))
def test_each_degree(degree: int, dtype: torch.dtype) -> None:
    """By itself: a plan has nothing else to be right about."""
    check(o3.SphericalHarmonics([degree], True, "component"), vectors(33, seed=degree), dtype)


@pytest.mark.parametrize("shape", [(0,), (1,), (64,), (65,), (2, 3), ()], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    check(built("MACE"), vectors(*shape), torch.float64)


def test_components_of_every_row_by_itself() -> None:
    """A norm over rows would hide a wrong small one."""
    module, x = built("up to 6"), vectors(200).detach()
    expected = module(x)
    with accelerated(self_check=False, backend="cuda"):
        torch.testing.assert_close(copy.deepcopy(module)(x), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", ["columns of wider rows", "transposed", "expanded"])
def test_vectors_that_are_not_contiguous(layout: str) -> None:
    x = {
        "columns of wider rows": lambda: vectors(9).detach().repeat(1, 2)[:, 1:4],
        "transposed": lambda: vectors(9).detach().T.contiguous().T,
        "expanded": lambda: vectors(1).detach().expand(9, 3),
    }[layout]()
    assert not x.is_contiguous()
    check(built("MACE"), x.requires_grad_(), torch.float64)


def test_a_gradient_without_memory_of_its_own() -> None:
    """That of a sum is one number, expanded."""
    module, x = built("odd order, repeated"), vectors(9)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    with accelerated(self_check=False, backend="cuda"):
        (found,) = torch.autograd.grad(copy.deepcopy(module)(x).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("case", ["MACE", "polynomials"])
def test_vectors_without_a_direction(case: str, dtype: torch.dtype) -> None:
    """Of length zero, and just below and above the length that torch divides by at least.

    Against float64: second derivatives of stock's float32 are NaN for the shortest that aren't zero. By a vector
    that is zero they are NaN in float64, too, and here those of the polynomials, which its direction is.
    """
    lengths = torch.tensor([0.0, 1e-13, 0.9e-12, 1.1e-12, 1e-9, 1.0])
    direction = torch.tensor([[2.0, -1.0, 2.0]]) / 3
    x = (lengths[:, None] * direction).to(dtype)
    module = built(case)

    def found(of: Any, x: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        out = of(leaf)
        g = torch.ones_like(out).requires_grad_()
        (dx,) = torch.autograd.grad(out, leaf, g, create_graph=True)
        return [out.detach(), dx.detach(), *torch.autograd.grad(dx.sum(), (g, leaf))]

    expected = found(module, x.double())
    if CASES[case][1]:
        assert expected[-1][0].isnan().all()
        polynomials = o3.SphericalHarmonics(CASES[case][0], False, CASES[case][2])
        expected[-1][0] = found(polynomials, torch.zeros(1, 3))[-1][0] / 1e-12**2
    with accelerated(self_check=False, backend="cuda"):
        ours = found(copy.deepcopy(module), x)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    for a, b in zip(ours, expected, strict=True):
        for row, wanted in zip(a, b, strict=True):  # they differ by a factor 1e24
            size = float(wanted.abs().max())
            torch.testing.assert_close(row.double(), wanted, rtol=rtol, atol=rtol * size)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_where_stock_has_nan(which: int, normalize: bool) -> None:
    """Neither hidden nor spread to other rows."""
    module = o3.SphericalHarmonics("0e+1o+2e+3o", normalize, "component")
    x = vectors(5).detach()
    x[2, which] = float("nan")
    expected = module(x)
    with accelerated(self_check=False, backend="cuda"):
        found = copy.deepcopy(module)(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert expected.isnan().any()


def test_degree_zero_is_constant() -> None:
    """Also in that it requires no gradient."""
    module, x = o3.SphericalHarmonics([0, 0], True, "integral"), vectors(4)
    with accelerated(backend="cuda"):
        found = copy.deepcopy(module)(x)
    torch.testing.assert_close(found, module(x))
    assert not found.requires_grad


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_by_finite_differences(normalize: bool) -> None:
    module = o3.SphericalHarmonics([2, 0, 1], normalize, "integral")
    with accelerated(self_check=False, backend="cuda"):
        assert torch.autograd.gradcheck(module, vectors(3))
        assert torch.autograd.gradgradcheck(module, vectors(3))


def test_third_derivatives() -> None:
    """Composed of torch operations."""
    module, x = built("MACE"), vectors(5)

    def third(of: Any) -> torch.Tensor:
        level = (of(x) ** 3).sum()
        for order in range(3):
            (found,) = torch.autograd.grad(level, x, create_graph=order < 2)
            level = (found**3).sum()
        return found

    expected = third(module)
    with accelerated(self_check=False, backend="cuda"):
        found = third(copy.deepcopy(module))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_self_check_passes() -> None:
    module = built("odd order, repeated")
    with e3nn_accel.enabled(strict=True, self_check=True, backend="cuda"):
        module(vectors(5))
        assert usage(module) == {("spherical_harmonics", "cuda"): 1}


def test_the_function_goes_through_a_module() -> None:
    x = vectors(6).detach()
    expected = o3.spherical_harmonics("1o+2e", x, True, "norm")
    with accelerated(backend="cuda"):
        found = o3.spherical_harmonics("1o+2e", x, True, "norm")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_degrees_are_where_their_irreps_are() -> None:
    """`slices_of` here and e3nn's own, where nothing is merged."""
    module = built("MACE")
    assert slices_of(module) == list(module.irreps_out.slices())


FILE = "spherical_harmonics.cu"


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("case", ["MACE", "odd order, repeated"])
def test_sanitizers_find_nothing(case: str, sanitizer: str, kernels_on_host: HostCompiler) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    check(built(case), vectors(70), torch.float64)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("barrier", barriers(FILE))
def test_a_missing_barrier_is_a_race(barrier: int, kernels_on_host: HostCompiler) -> None:
    kernels_on_host.sanitizer, kernels_on_host.change = "thread", without(FILE, barrier)
    with race_shown():
        check(built("MACE"), vectors(70), torch.float64)
