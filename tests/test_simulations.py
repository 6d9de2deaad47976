"""MACECalculator in ASE's programs, unmodified, by the environment variable alone."""

from __future__ import annotations

import pytest
from both_ways import MODEL, PROGRAMS, STRUCTURES, BothWays, run_both

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [pytest.mark.slow, pytest.mark.once]

TOLERANCE = {
    "properties energy": 1e-12, "properties energies": 1e-11, "properties forces": 1e-10,
    "properties stress": 1e-10, "properties stresses": 1e-10, "properties descriptors": 1e-10,
    "committee files energies": 1e-12, "committee files energy_var": 1e-9, "committee files forces_comm": 1e-10,
    "committee glob forces_comm": 1e-10, "committee modules forces_comm": 1e-10,
    "hessian": 1e-9, "hessian of more atoms": 1e-9, "hessians of a committee": 1e-9, "vibrations": 1e-8,
    "bfgs": 1e-8, "fire positions": 1e-9, "fire cell": 1e-9, "path": 1e-9, "dynamics": 1e-10,
    "phonons force constants": 1e-8, "phonons": 1e-7,
}  # fmt: skip
"""In float64, of the largest entry. Differences of forces at close points lose digits, and steps of
an optimiser add up."""


@pytest.fixture(scope="module")
def simulations(tmp_path_factory: pytest.TempPathFactory) -> BothWays:
    folder = tmp_path_factory.mktemp("simulations")
    program = PROGRAMS / "simulate_with_ase.py"
    return run_both(folder, [program, MODEL, STRUCTURES, "results.npz"])


@pytest.mark.parametrize("name", TOLERANCE)
def test_like_stock(simulations: BothWays, name: str) -> None:
    """What each program computes."""
    simulations.assert_same(name, TOLERANCE[name])


def test_all_in_plans(simulations: BothWays) -> None:
    """Nothing fell back, Hessians by vmap included."""
    simulations.assert_planned("linear", "convolution", "contraction", "tensor_product")
