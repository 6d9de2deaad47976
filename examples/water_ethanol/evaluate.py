#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["mace-torch==0.3.16"]
# ///
"""Measure the errors of water_ethanol.model on frames that it was not trained on.

Prints the errors quoted in README.md: on test.xyz, all of it and by system, and
on structures.xyz, whose periodic box also shows that stress is available.

    uv run evaluate.py
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read
from mace.calculators import MACECalculator

HERE = Path(__file__).resolve().parent


def frame_errors(atoms: Atoms, calculator: MACECalculator) -> tuple[float, np.ndarray]:
    """Energy error per atom (eV) and force component errors (eV/A) of one frame."""
    work = atoms.copy()
    work.calc = calculator
    energy = (work.get_potential_energy() - atoms.info["REF_energy"]) / len(atoms)
    return energy, (work.get_forces() - atoms.arrays["REF_forces"]).ravel()


def report(name: str, errors: Iterable[tuple[float, np.ndarray]]) -> None:
    energies, forces = zip(*errors, strict=True)
    energy, force = 1e3 * np.array(energies), 1e3 * np.concatenate(forces)
    print(
        f"{name:16s} {len(energy):3d} frames"
        f"  energy MAE {np.abs(energy).mean():7.2f} RMSE {np.sqrt((energy**2).mean()):7.2f} meV/atom"
        f"  force MAE {np.abs(force).mean():7.1f} RMSE {np.sqrt((force**2).mean()):7.1f} meV/A"
    )


def report_test_set(calculator: MACECalculator) -> None:
    by_system: dict[str, list[tuple[float, np.ndarray]]] = defaultdict(list)
    for atoms in read(HERE / "test.xyz", ":"):
        by_system[atoms.info["system"]].append(frame_errors(atoms, calculator))
    for system, errors in by_system.items():
        report(system, errors)
    report("test.xyz, all", [error for errors in by_system.values() for error in errors])


def report_structures(calculator: MACECalculator) -> None:
    for atoms in read(HERE / "structures.xyz", ":"):
        report(atoms.info["system"], [frame_errors(atoms, calculator)])
        if atoms.pbc.all():
            atoms.calc = calculator
            print("  stress (eV/A^3):", np.array2string(atoms.get_stress(), precision=5))


def main() -> None:
    calculator = MACECalculator(
        model_paths=str(HERE / "water_ethanol.model"), device="cpu", default_dtype="float64"
    )
    print("== test.xyz")
    report_test_set(calculator)
    print("== structures.xyz")
    report_structures(calculator)


if __name__ == "__main__":
    main()
