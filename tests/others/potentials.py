"""Interatomic potentials of other packages, stock and accelerated: predictions, gradients, a training."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comparison import Operands, accelerated, draw

import e3nn_accel

pytest.importorskip("ase", reason="ASE isn't installed")
from ase import Atoms
from ase.build import bulk, molecule

ELEMENTS = ["H", "C", "O"]
CUTOFF = 4.0
STEPS = 3

FLOAT64 = 1e-10
FLOAT32 = 5e-5
"""Where a package computes in float32 alone, stock's own roundings are all there is to compare with."""


@dataclass(frozen=True)
class Potential:
    """A model and the way its package calls it.

    Attributes:
        model: The package's own module.
        predict: Energies and forces of `structures` by the model.
        tolerance: Of a difference, relative to what is compared.
    """

    model: torch.nn.Module
    predict: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
    tolerance: float = FLOAT64

    def results(self, model: torch.nn.Module) -> Operands:
        """Energies, forces, and each parameter's gradient of a loss of both."""
        model.zero_grad()
        energies, forces = self.predict(model)
        loss(energies, forces).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found = {"energies": energies, "forces": forces} | gradients
        return {name: t.detach().clone() for name, t in found.items()}

    def training(self, model: torch.nn.Module) -> list[float]:
        """Losses of a few steps of it."""
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        found = []
        for _ in range(STEPS):
            value = loss(*self.predict(model))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            found.append(value.item())
        return found


def structures() -> list[Atoms]:
    """Two molecules and a crystal with more than one image of a neighbour, none at rest."""
    found = [molecule("H2O"), molecule("CH3CH2OH"), bulk("CO", "rocksalt", a=4.0)]
    for seed, atoms in enumerate(found):
        if not atoms.pbc.any():
            atoms.set_cell([12.0, 12.0, 12.0])
        atoms.rattle(0.05, seed=seed)
    return found


def perturb(model: torch.nn.Module) -> None:
    """Away from initial values, many of which are zero or one."""
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.2 * draw(tuple(parameter.shape), seed, parameter.dtype))


def loss(energies: torch.Tensor, forces: torch.Tensor) -> torch.Tensor:
    """Of energies and forces, so that its gradients take second derivatives."""
    return (energies - 0.3).square().mean() + (forces - 0.1).square().mean()


def assert_like_stock(potential: Potential) -> e3nn_accel.reporting.Report:
    """Predictions, gradients and a training are stock's, all of it through plans; what ran where."""
    perturb(potential.model)
    ours = copy.deepcopy(potential.model)
    stock = copy.deepcopy(potential.model)
    expected = potential.results(stock)
    losses = potential.training(stock)
    assert losses[-1] != losses[0]
    with accelerated():
        found = potential.results(ours)
        assert_close(found, expected, potential.tolerance)
        trained = potential.training(ours)
        assert not e3nn_accel.report().fallbacks
        explained = e3nn_accel.explain(ours)
        assert b"e3nn_accel" not in written(ours)
    assert_close(
        {"losses": torch.tensor(trained)},
        {"losses": torch.tensor(losses)},
        10 * potential.tolerance,
    )
    return explained


def assert_close(found: Operands, expected: Operands, tolerance: float) -> None:
    """Each tensor by its norm; gradients that nearly vanish by a hundredth of the largest."""
    assert found.keys() == expected.keys()
    results = ("energies", "forces", "losses")
    largest = max((float(t.norm()) for n, t in expected.items() if n not in results), default=0.0)
    for name, wanted in expected.items():
        size = float(wanted.norm())
        assert name not in results or size > 1e-3, f"{name} vanish: nothing is compared"
        error = float((found[name] - wanted).norm())
        limit = tolerance * (size if name in results else max(size, 1e-2 * largest))
        assert error <= limit, f"{name}: error {error:.2e}, limit {limit:.2e}"


def written(model: torch.nn.Module) -> bytes:
    """What torch.save writes of the model's state."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


def operations(report: e3nn_accel.reporting.Report) -> set[tuple[str, str]]:
    """Classes of the modules that ran, and their operations."""
    return {(row.cls, row.operation) for row in report.rows if row.calls}
