"""MACE's ML-IAP object for LAMMPS, evaluated on data as LAMMPS hands it over: periodic images are ghost atoms."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from comparison import accelerated

import e3nn_accel

pytest.importorskip("mace", reason="MACE isn't installed")

from fresh_python import SOURCE

EXAMPLE = SOURCE / "examples" / "water_ethanol"
pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eager_e3nn", "float64")]


class Domain:
    """What LAMMPS gives to the object: pairs, displacements, and exchanges between ghosts and their owners."""

    def __init__(self, atoms: Any, numbers: list[int], cutoff: float) -> None:
        from matscipy.neighbours import neighbour_list

        center, other, shift, self.rij = neighbour_list("ijSD", atoms, cutoff)
        ghosts: dict[tuple[int, ...], int] = {}
        for image in {
            (a, *s) for a, s in zip(other.tolist(), shift.tolist(), strict=True) if any(s)
        }:
            ghosts[image] = len(atoms) + len(ghosts)
        self.owners = np.array([image[0] for image in ghosts])
        pairs = zip(other.tolist(), shift.tolist(), strict=True)
        self.pair_i = center
        self.pair_j = np.array([ghosts[(a, *s)] if any(s) else a for a, s in pairs])
        self.nlocal, self.ntotal = len(atoms), len(atoms) + len(ghosts)
        self.npairs = len(center)
        species = [numbers.index(n) for n in atoms.numbers]
        self.elems = np.array([*species, *(species[owner] for owner in self.owners)])
        self.eatoms, self.energy = np.zeros(len(atoms)), None
        self.forces = torch.empty(0)

    def update_pair_forces_gpu(self, forces: torch.Tensor) -> None:
        """Of each pair."""
        self.forces = forces.detach().clone()

    def forward_exchange(self, source: torch.Tensor, to: torch.Tensor, width: int) -> None:
        """Ghosts have their owners' rows."""
        to.copy_(source)
        to[self.nlocal :] = source[self.owners]

    def reverse_exchange(self, source: torch.Tensor, to: torch.Tensor, width: int) -> None:
        """Owners have the sum of their ghosts' gradients, too."""
        to.copy_(source)
        to[self.nlocal :] = 0
        to.index_add_(0, torch.as_tensor(self.owners), source[self.nlocal :])


def built() -> Any:
    """Of the shipped model."""
    from mace.calculators.lammps_mliap_mace import LAMMPS_MLIAP_MACE

    path = EXAMPLE / "water_ethanol.model"
    model = torch.load(path, map_location="cpu", weights_only=False).double()
    model.lammps_mliap = True
    return LAMMPS_MLIAP_MACE(model)


def evaluated(mliap: Any) -> Domain:
    """A periodic structure in which most neighbours are ghosts."""
    from ase.io import read

    model = mliap.model.model
    numbers = [int(n) for n in model.atomic_numbers]
    domain = Domain(read(EXAMPLE / "structures.xyz", 4), numbers, float(model.r_max))
    assert domain.ntotal > 2 * domain.nlocal
    mliap.compute_forces(domain)
    return domain


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACE_ALLOW_CPU", "true")


def backends() -> set[str]:
    """Of all modules that ran, whose convolutions are fused, with ghosts that nothing is sent to."""
    report = e3nn_accel.report()
    assert "convolution" in {row.operation for row in report.rows}, report
    return {
        row.backend
        for row in report.rows
        if row.operation in ("linear", "convolution", "contraction")
    }


@pytest.mark.usefixtures("on_the_cpu")
def test_energies_and_forces() -> None:
    """As stock's, of every pair and atom, every module in a plan."""
    check_plans("torch")


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu", "kernels_on_host")
def test_on_the_kernels() -> None:
    check_plans("cuda")


def check_plans(backend: str) -> None:
    """Stock and ours, each a new object."""
    stock = evaluated(built())
    with accelerated(self_check=False, backend=backend):
        ours = evaluated(built())
        assert backends() == {backend}
    torch.testing.assert_close(ours.forces, stock.forces, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(ours.eatoms, stock.eatoms, rtol=1e-12)
    assert float(stock.forces.abs().max()) > 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
def test_written_while_enabled() -> None:
    """As `torch.save` writes it for LAMMPS: nothing of us, and it runs without us."""
    file = io.BytesIO()
    with accelerated():
        mliap = built()
        evaluated(mliap)
        torch.save(mliap, file)
    assert b"e3nn_accel" not in file.getvalue()
    file.seek(0)
    read = evaluated(torch.load(file, weights_only=False))
    torch.testing.assert_close(read.forces, evaluated(built()).forces, rtol=0, atol=0)
