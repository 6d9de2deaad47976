"""The kernels of MACE's radial embedding on the CPU against float64 stock MACE, to the third derivative."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import accelerated, usage
from host_kernels import HostCompiler
from radial_embedding_parity import CASES, R_MAX, block, check, embedding, lengths

import e3nn_accel

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [pytest.mark.mace, pytest.mark.usefixtures("float64", "kernels_on_host")]

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case: str, dtype: torch.dtype) -> None:
    check(block(*CASES[case]), lengths(300), dtype)


@pytest.mark.parametrize("edges", [0, 1, 64, 65])
def test_numbers_of_edges(edges: int) -> None:
    check(block(), lengths(edges), torch.float64)


@pytest.mark.parametrize("layout", ["a column", "expanded"])
def test_lengths_that_are_not_contiguous(layout: str) -> None:
    x = lengths(5).detach()
    x = x.repeat(1, 2)[:, :1] if layout == "a column" else x[:1].expand(5, 1)
    check(block(), x.requires_grad_(), torch.float64)


def test_a_gradient_without_memory_of_its_own() -> None:
    """That of a sum is one number, expanded."""
    module, x = block(), lengths(9)
    (expected,) = torch.autograd.grad(embedding(module)(x).sum(), x)
    with accelerated(self_check=False, backend="cuda"):
        (found,) = torch.autograd.grad(embedding(copy.deepcopy(module))(x).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@BOTH
def test_close_to_the_cutoff_it_is_better_than_stock(dtype: torch.dtype) -> None:
    """Where MACE's sum cancels: ours is right to the last digits, number by number."""
    ratio = 1 - torch.logspace(-1, -4, 40)[:, None]
    module = block(8, 6).to(dtype)
    x = (R_MAX * ratio).to(dtype)
    bessel = copy.deepcopy(module.bessel_fn).double()(x.double())
    rest, ratio = 1 - x.double() / R_MAX, x.double() / R_MAX
    cutoff = rest**3 * sum((k + 1) * (k + 2) / 2 * ratio**k for k in range(6))
    with accelerated(self_check=False, backend="cuda"):
        found = embedding(module)(x).double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        found, bessel * cutoff, rtol=100 * eps, atol=eps * float(bessel.abs().max()) * 1e-3
    )


@BOTH
def test_beyond_the_cutoff_all_is_zero(dtype: torch.dtype) -> None:
    """Exactly, with derivatives: padded edges are there. At the cutoff, too."""
    x = torch.tensor([[R_MAX], [R_MAX * 1.0001], [2 * R_MAX], [1e3]], dtype=dtype)
    module, x = block().to(dtype), x.requires_grad_()
    with accelerated(self_check=False, backend="cuda"):
        out = embedding(module)(x)
        g = torch.ones_like(out).requires_grad_()
        (dx,) = torch.autograd.grad(out, x, g, create_graph=True)
        found = [out, dx, *torch.autograd.grad(dx.sum(), (g, x))]
    assert all(bool((t == 0).all()) for t in found)


def test_nan_and_zero_are_as_in_stock() -> None:
    x = torch.tensor([[1.0], [float("nan")], [0.0], [2.0], [float("inf")]])
    module = block()
    expected = embedding(module)(x)
    with accelerated(self_check=False, backend="cuda"):
        found = embedding(copy.deepcopy(module))(x)
    assert expected.isnan().any(1).tolist() == [False, True, True, False, True]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_gradients_by_finite_differences() -> None:
    with accelerated(self_check=False, backend="cuda"):
        function = embedding(block(3))
        x = torch.tensor([[0.7], [2.0], [4.2], [5.0]]).requires_grad_()
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_third_derivatives() -> None:
    """Composed of torch operations."""
    module, x = block(), lengths(5)

    def third(of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        level = (of(x) ** 3).sum()
        for order in range(3):
            (found,) = torch.autograd.grad(level, x, create_graph=order < 2)
            level = (found**3).sum()
        return found

    expected = third(embedding(module))
    with accelerated(self_check=False, backend="cuda"):
        found = third(embedding(copy.deepcopy(module)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_an_exponent_of_an_old_file() -> None:
    """MACE kept it in the dtype of the model once."""
    module = block(8, 6)
    module.cutoff_fn.p = module.cutoff_fn.p.double()
    check(module, lengths(20), torch.float64)
    check(module, lengths(20), torch.float32)


def test_buffers_are_read_at_each_call() -> None:
    """All four, as `load_state_dict` writes them."""
    module, other = block(8, 6), block(8, 3)
    other.bessel_fn.prefactor.mul_(2)
    other.cutoff_fn.r_max.mul_(0.9)
    x = lengths(20).detach()
    expected = embedding(other)(x)
    with accelerated(self_check=False, backend="cuda"):
        ours = embedding(module)
        ours(x)
        module.load_state_dict(other.state_dict())
        found = ours(x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_self_check_passes() -> None:
    module = block()
    with e3nn_accel.enabled(strict=True, self_check=True, backend="cuda"):
        embedding(module)(lengths(5))
        assert usage(module) == {("radial_embedding", "cuda"): 1}


def test_verify_compares_what_the_block_returns() -> None:
    module = block()
    with e3nn_accel.enabled(strict=True, verify=True, backend="cuda"):
        embedding(module)(lengths(5))
        assert usage(module) == {("radial_embedding", "cuda"): 1}


def _trained(module: Any) -> Any:
    weights = module.bessel_fn.bessel_weights
    del module.bessel_fn.bessel_weights
    module.bessel_fn.bessel_weights = torch.nn.Parameter(weights)
    return module


def _hooked(module: Any) -> Any:
    module.cutoff_fn.register_forward_hook(lambda *_: None)
    return module


STOCK = {
    "Gaussians": (lambda: block(radial_type="gaussian"), "it has a GaussianBasis"),
    "Chebyshev": (lambda: block(radial_type="chebyshev"), "it has a ChebychevBasis"),
    "Agnesi": (lambda: block(distance_transform="Agnesi"), "go through AgnesiTransform"),
    "Soft": (lambda: block(distance_transform="Soft"), "go through SoftTransform"),
    "cutoff later": (lambda: block(apply_cutoff=False), "the cutoff is applied later"),
    "trained": (lambda: _trained(block()), "Bessel functions are trained"),
    "hooks": (lambda: _hooked(block()), "its PolynomialCutoff: it has hooks"),
}


@pytest.mark.parametrize("case", STOCK)
def test_what_stays_with_stock_mace(case: str) -> None:
    """The very same results, whatever they are, and the reason."""
    build, reason = STOCK[case]
    module, x = build(), lengths(6).detach()
    attrs, ends = torch.eye(2)[[0, 1, 0]], torch.tensor([[0, 1, 2, 0, 1, 2], [1, 0, 1, 2, 2, 0]])
    arguments = (x, attrs, ends, torch.tensor([1, 8]))
    expected = module(*arguments)
    with e3nn_accel.enabled():
        found = module(*arguments)
        assert set(usage(module).values()) == {1}
        assert reason in str(e3nn_accel.report())
    for ours, stock in zip(found, expected, strict=True):
        assert stock is None if ours is None else torch.equal(ours, stock)


def test_trained_frequencies_have_a_plan_where_nothing_is_differentiated() -> None:
    module = _trained(block())
    expected = embedding(module)(lengths(6)).detach()
    with torch.no_grad(), accelerated(backend="cuda"):
        found = embedding(module)(lengths(6))
        assert usage(module) == {("radial_embedding", "cuda"): 1}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_sanitizers_find_nothing(kernels_on_host: HostCompiler) -> None:
    """Reads and writes beyond the end, undefined arithmetic."""
    kernels_on_host.sanitizer = "address"
    check(block(), lengths(70), torch.float64)
