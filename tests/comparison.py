"""Stock e3nn and e3nn_accel on the same operands: values, first and second derivatives.

A derivative is compared in pieces: for each operand, and for weights for each path, so that a wrong
path can't hide behind the norm of the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch

import e3nn_accel
from e3nn_accel import new_memory, switch

Operands = dict[str, torch.Tensor]
Function = Callable[[Operands], torch.Tensor]
Slices = dict[str, list[slice]]

DIRECTION = "direction"
"""Name of the gradient that flows in from above, an operand of the second derivative."""


@dataclass(frozen=True)
class Derivatives:
    """What is compared: tensors by name, "value", "d x", "dd weight" and so on."""

    tensors: Operands


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random numbers of a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random numbers in every parameter that takes a gradient, biases too."""
    with torch.no_grad():
        for n, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
            parameter.copy_(draw(tuple(parameter.shape), seed + n))
    return module


def derivatives(function: Function, operands: Operands, seed: int = 0) -> Derivatives:
    """Value, first and second derivatives of a random functional, by every operand that wants one.

    The first derivative is that of ``<function(operands), direction>``; the second that of
    ``<first, random>``, also by the direction, as in training on forces.
    """
    out = function(operands)
    found = {"value": out.detach().clone()}
    wanted = {name: t for name, t in operands.items() if t.requires_grad}
    if not wanted or not out.requires_grad:
        return Derivatives(found)
    direction = draw(tuple(out.shape), seed + 100, out.dtype).to(out.device).requires_grad_()
    leaves = list(wanted.values())
    first = _gradients(out, leaves, direction, create_graph=True)
    found |= {f"d {name}": t.detach() for name, t in zip(wanted, first, strict=True)}
    pairs = [
        (t, draw(tuple(t.shape), seed + 200 + n, t.dtype).to(t.device)) for n, t in enumerate(first)
    ]
    functional = sum(((t * r).sum() for t, r in pairs if t.requires_grad), out.new_zeros(()))
    if functional.requires_grad:
        second = _gradients(functional, [*leaves, direction], None)
        names = [*wanted, DIRECTION]
        found |= {f"dd {name}": t for name, t in zip(names, second, strict=True)}
    return Derivatives(found)


def _gradients(
    out: torch.Tensor,
    leaves: list[torch.Tensor],
    direction: torch.Tensor | None,
    create_graph: bool = False,
) -> list[torch.Tensor]:
    """Gradients, zero where an operand plays no part."""
    found = torch.autograd.grad(
        out, leaves, direction, create_graph=create_graph, allow_unused=True
    )
    return [
        torch.zeros_like(leaf) if t is None else t for leaf, t in zip(leaves, found, strict=True)
    ]


def assert_close(
    found: Derivatives, expected: Derivatives, tolerance: float, slices: Slices | None = None
) -> None:
    """Every tensor, and every slice of a weight's last axis, to a relative norm-wise tolerance.

    A slice whose true size is rounding noise is measured against the whole tensor.
    """
    _same_names(found, expected)
    for name, wanted in expected.tensors.items():
        got = found.tensors.get(name, torch.zeros_like(wanted))
        assert got.shape == wanted.shape, f"{name} has shape {got.shape}, wanted {wanted.shape}"
        assert got.dtype == wanted.dtype, f"{name} is {got.dtype}, wanted {wanted.dtype}"
        floor = 1e-2 * float(wanted.norm()) + 1e-30
        for piece in [slice(None), *(slices or {}).get(name.rpartition(" ")[2], [])]:
            error = float((got[..., piece] - wanted[..., piece]).norm())
            limit = tolerance * max(float(wanted[..., piece].norm()), floor)
            assert error <= limit, f"{name} {piece}: error {error:.3e}, limit {limit:.3e}"


def _same_names(found: Derivatives, expected: Derivatives) -> None:
    """Neither side may lack a derivative that the other has, unless it is zero."""
    for name in found.tensors.keys() ^ expected.tensors.keys():
        here = found.tensors.get(name, expected.tensors.get(name))
        assert here is not None
        assert not bool(here.any()), f"only one side has {name}, and it isn't zero"


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm-wise, against a float64 truth."""
    size = float(truth.norm())
    error = float((found.to(truth.dtype) - truth).norm())
    return error / size if size else error


def assert_as_good_as(
    found: Derivatives, stock: Derivatives, truth: Derivatives, floor: float
) -> None:
    """Errors against the truth no larger than a few times stock's own, or than ``floor``."""
    for name, wanted in truth.tensors.items():
        zero = torch.zeros_like(wanted)
        ours = relative_error(found.tensors.get(name, zero), wanted)
        limit = max(floor, 3 * relative_error(stock.tensors.get(name, zero), wanted))
        assert ours <= limit, f"{name}: error {ours:.2e}, limit {limit:.2e}"


@dataclass(frozen=True)
class Behaviour:
    """What a call came to: a tensor, or an error."""

    value: torch.Tensor | None
    error: Exception | None

    @classmethod
    def of(cls, function: Callable[[], torch.Tensor]) -> Behaviour:
        try:
            return cls(function(), None)
        except Exception as error:
            return cls(None, error)

    def assert_like(self, stock: Behaviour) -> None:
        """The same type and message, or the same shape, dtype, strides and numbers."""
        assert type(self.error) is type(stock.error), f"{self.error!r}, stock {stock.error!r}"
        assert str(self.error) == str(stock.error)
        if stock.value is None or self.value is None:
            return
        assert self.value.dtype == stock.value.dtype
        assert self.value.stride() == stock.value.stride()
        assert self.value.requires_grad == stock.value.requires_grad
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(stock.value.dtype, 0.0)
        torch.testing.assert_close(self.value, stock.value, rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def accelerated(**options: object) -> Iterator[None]:
    """Switched on, strict: nothing may fall back unnoticed."""
    with e3nn_accel.enabled(**{"strict": True, **options}):
        yield


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out uninitialised is NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(1).isnan()), "this torch doesn't fill memory"
        with mock.patch.object(new_memory, "_new_memory", None):  # which doesn't
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def usage(module: torch.nn.Module) -> dict[tuple[str, str], int]:
    """Calls of one module by (operation, backend), while switched on."""
    assert switch.active.dispatcher is not None
    counts: dict[tuple[str, str], int] = {}
    for (operation, backend, _), used in switch.active.dispatcher.runners[module].usage.items():
        counts[operation, backend] = counts.get((operation, backend), 0) + used.calls
    return counts


def assert_ran_on_torch(module: torch.nn.Module, operation: str, calls: int | None = None) -> None:
    """Every call of the module ran on the torch backend's plan, none on stock e3nn."""
    counts = usage(module)
    assert set(counts) == {(operation, "torch")}, f"{counts}\n{e3nn_accel.report()}"
    assert calls in (None, counts[operation, "torch"])


def strategy(module: torch.nn.Module) -> str:
    """What ``explain`` says about how a module ran."""
    (row,) = e3nn_accel.explain(module).rows
    return row.detail
