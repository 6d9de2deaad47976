r"""How close to stock e3nn is close enough: each criterion as a row with its numbers.

float64 is compared with stock float64. float32 is compared with stock float64 on the very same
float32-rounded inputs and weights, and may be as wrong as stock float32 is itself, or as a few
roundings explain:

=================  ===============================================  ==============================
quantity           float64: at most                                 float32: at most
=================  ===============================================  ==============================
energy             1e-9 eV/atom                                     2e-6 of the atoms' mean
                                                                    interaction energy *
forces             1e-8 eV/A, largest component                     2e-6 of their norm *
stress             1e-9 eV/A^3, largest component                   2e-6 of its norm *
gradients          1e-9 of each parameter's norm                    5e-6 of each parameter's norm *
rotated energy     1e-9 eV/atom *                                   5e-6 of the interaction energy *
rotated forces     1e-8 eV/A, largest component *                   5e-6 of their norm *
=================  ===============================================  ==============================

\* or 1.2 times stock's own error, where that is more.

In float32 the error of a small structure is one throw of the dice: the rounding in a few atoms may
favour either side by a third. So it is the root mean square over several views of it, turned and
displaced by a thousandth of an A, of ours and stock's alike (`VIEWED_ATOMS`); large structures
average over their atoms. A stress, and the factor that all gradients of a loss share, are single
numbers however large the structure: in eight views of 160 atoms stock's own was off by 1.3e-6 to
2.4e-6. What is too far off by less than `NEAR` is measured again, in `MOST_VIEWS` views.

Energies in float32 are those without the isolated atoms' constants, which are hundreds of eV in
many models, so that their rounding would hide any error of the rest. "Rotated" rows compare a
structure with itself turned, in float32 in as many ways as it is viewed; what stock misses there (it
may hold coefficients in float32) is its own error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import NamedTuple

import torch

from e3nn_accel.quantities import Quantities

OF_STOCK = 1.2
"""How much larger than stock's own error ours may be."""

VIEWED_ATOMS, MOST_VIEWS = 200, 16
"""A structure is viewed so many times that the views have 200 atoms together, up to 16 times."""

NEAR = 4
"""How many times its tolerance an error may be for its measurement to be doubted."""

SMALL_FORCES = 1e-3
"""eV/A: forces of a smaller norm are compared absolutely, in float32."""

SMALL_ENERGY, SMALL_STRESS, SMALL_GRADIENT = 1e-3, 1e-6, 1e-6
"""Sizes (in eV/atom, in eV/A^3, and of the largest gradient) below which errors are relative to
these instead: what is zero but for rounding has no digits to compare."""


@dataclass(frozen=True)
class Row:
    """One number, compared.

    Attributes:
        quantity: A name of the module's table.
        subject: The structure; for gradients, with the parameter.
        unit: Of all the numbers; "relative" is without one.
        error: Of the accelerated model.
        stock_error: Stock's own error in the same dtype; None where stock is the reference.
        tolerance: What ``error`` may be at most.
        size: What a relative error is relative to, or the reference's largest value.
    """

    quantity: str
    subject: str
    unit: str
    error: float
    stock_error: float | None
    tolerance: float
    size: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number, and small enough."""
        return isfinite(self.error) and self.error <= self.tolerance

    @property
    def margin(self) -> float:
        """The error in units of the tolerance."""
        return self.error / self.tolerance


class Triple(NamedTuple):
    """Results for one view of a structure."""

    ours: Quantities
    stock: Quantities
    reference: Quantities

    @property
    def tested(self) -> tuple[Quantities, Quantities]:
        """Those whose errors are told."""
        return self.ours, self.stock


def exact_rows(subject: str, ours: Quantities, stock: Quantities) -> Iterator[Row]:
    """float64 against stock float64, in absolute numbers."""
    yield _exact("energy", subject, "eV/atom", abs(ours.energy - stock.energy), 1e-9, stock.energy)
    pairs = [("forces", "eV/A", ours.forces, stock.forces, 1e-8)]
    if ours.stress is not None and stock.stress is not None:
        pairs.append(("stress", "eV/A^3", ours.stress, stock.stress, 1e-9))
    for quantity, unit, found, expected, limit in pairs:
        yield _exact(quantity, subject, unit, _largest(found - expected), limit, _largest(expected))


def rounded_rows(subject: str, views: Sequence[Triple]) -> Iterator[Row]:
    """float32 against stock float64 on the same rounded inputs, relative to its size."""
    reference = views[0].reference
    size = max(reference.scale, SMALL_ENERGY)
    errors = [[(q.interaction - v.reference.interaction) / size for q in v.tested] for v in views]
    yield _limited("energy", subject, "relative", _pooled(errors), 2e-6, size)

    size = _norm(reference.forces)
    unit, divisor = ("relative", size) if size >= SMALL_FORCES else ("eV/A", 1.0)
    errors = [[_norm(q.forces - v.reference.forces) / divisor for q in v.tested] for v in views]
    yield _limited("forces", subject, unit, _pooled(errors), 2e-6, size)

    if reference.stress is not None:
        size = max(_norm(reference.stress), SMALL_STRESS)
        errors = [
            [_norm(_stress(q) - _stress(v.reference)) / size for q in v.tested] for v in views
        ]
        yield _limited("stress", subject, "relative", _pooled(errors), 2e-6, size)


def gradient_rows(subject: str, views: Sequence[Triple], rounded: bool) -> Iterator[Row]:
    """Each parameter's gradient; in float64 the reference is stock itself."""
    against = views[0].reference.gradients
    largest = max((_norm(g) for g in against.values()), default=0.0)
    for name, expected in against.items():
        size = max(_norm(expected), SMALL_GRADIENT * largest) or 1.0
        errors = _pooled(
            [
                [_norm(q.gradients[name] - v.reference.gradients[name]) / size for q in v.tested]
                for v in views
            ]
        )
        where = f"{subject}: {name}"
        if rounded:
            yield _limited("gradients", where, "relative", errors, 5e-6, size)
        else:
            yield _exact("gradients", where, "relative", errors[0], 1e-9, size)


def rotated_rows(
    subject: str,
    as_is: tuple[Quantities, Quantities],
    rotations: Sequence[torch.Tensor],
    turned: Sequence[tuple[Quantities, Quantities]],
    rounded: bool,
) -> Iterator[Row]:
    """Energy is to stay, forces are to turn, in each rotation; tuples are (ours, stock)."""
    size, norm = max(as_is[1].scale, SMALL_ENERGY), _norm(as_is[1].forces)
    small = norm < SMALL_FORCES
    pairs = [list(zip(as_is, both, strict=True)) for both in turned]
    energies = [[abs(b.interaction - a.interaction) for a, b in both] for both in pairs]
    forces = [
        [b.forces - a.forces @ rotation.T for a, b in both]
        for rotation, both in zip(rotations, pairs, strict=True)
    ]
    if not rounded:
        yield _limited("rotated energy", subject, "eV/atom", energies[0], 1e-9, size)
        errors = [_largest(difference) for difference in forces[0]]
        yield _limited("rotated forces", subject, "eV/A", errors, 1e-8, _largest(as_is[1].forces))
        return
    errors = _pooled([[e / size for e in both] for both in energies])
    yield _limited("rotated energy", subject, "relative", errors, 5e-6, size)
    errors = _pooled([[_norm(d) / (1.0 if small else norm) for d in both] for both in forces])
    yield _limited("rotated forces", subject, "eV/A" if small else "relative", errors, 5e-6, norm)


def _pooled(errors: Sequence[Sequence[float]]) -> list[float]:
    """Root mean square over views, of ours and of stock."""
    return [sqrt(sum(e * e for e in one) / len(errors)) for one in zip(*errors, strict=True)]


def _stress(quantities: Quantities) -> torch.Tensor:
    assert quantities.stress is not None
    return quantities.stress


def _exact(
    quantity: str, subject: str, unit: str, error: float, tolerance: float, size: float
) -> Row:
    return Row(quantity, subject, unit, error, None, tolerance, size)


def _limited(
    quantity: str, subject: str, unit: str, errors: list[float], tolerance: float, size: float
) -> Row:
    ours, stock = errors
    limit = max(tolerance, OF_STOCK * stock) if isfinite(stock) else tolerance
    return Row(quantity, subject, unit, ours, stock, limit, size)


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
