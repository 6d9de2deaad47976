# /// script
# requires-python = ">=3.10"
# dependencies = ["e3nn_accel[mace]", "ase"]
# ///
"""One energy and force call of a trained MACE model, on stock e3nn and accelerated.

The model and the calculator are MACE's own, unmodified; `enable` and `disable` switch what runs
inside them. Run it with `python examples/1_enable.py`.
"""

from __future__ import annotations

import time
from pathlib import Path

import ase.io
from mace.calculators import MACECalculator

import e3nn_accel

HERE = Path(__file__).parent / "water_ethanol"


def timed(atoms: ase.Atoms) -> tuple[float, float]:
    """Energy in eV, and the seconds of one call on fresh positions (the first call plans)."""
    atoms.get_potential_energy()
    atoms.positions += 1e-9  # or ASE would answer from its cache
    started = time.perf_counter()
    energy = atoms.get_potential_energy()
    return float(energy), time.perf_counter() - started


def main() -> None:
    """Print both energies, both times, and what ran where."""
    atoms = ase.io.read(HERE / "structures.xyz", index=-1)
    model = HERE / "water_ethanol.model"
    atoms.calc = MACECalculator(model_paths=str(model), device="cpu", default_dtype="float64")

    stock, stock_seconds = timed(atoms)
    e3nn_accel.enable()
    ours, our_seconds = timed(atoms)
    report = e3nn_accel.report()
    e3nn_accel.disable()

    print(f"stock e3nn  {stock:.9f} eV  {stock_seconds * 1e3:8.1f} ms")
    print(f"e3nn_accel  {ours:.9f} eV  {our_seconds * 1e3:8.1f} ms")
    print(report)


if __name__ == "__main__":
    main()
