# /// script
# requires-python = ">=3.10"
# dependencies = ["e3nn_accel[mace]", "ase"]
# ///
"""Molecular dynamics through ASE and `MACECalculator`, accelerated by one line.

Water and ethanol move at constant energy (NVE); kinetic and potential energy are printed, whose sum
stays, then what ran where. The line `e3nn_accel.enable()` may as well be left out of the script:

    python examples/2_md.py [--steps 20] [--device cuda]
    E3NN_ACCEL=1 python your_own_md.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from mace.calculators import MACECalculator

import e3nn_accel

HERE = Path(__file__).parent / "water_ethanol"


def main() -> None:
    """Run a few steps and print energies and the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    e3nn_accel.enable()  # the one line; before or after the calculator is made

    atoms = ase.io.read(HERE / "structures.xyz", index=3)  # ethanol and two water molecules
    atoms.calc = MACECalculator(
        model_paths=str(HERE / "water_ethanol.model"),
        device=options.device,
        default_dtype="float64",
    )
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.RandomState(0))
    dynamics = VelocityVerlet(atoms, timestep=0.5 * units.fs)

    print("step  potential, eV  kinetic, eV     total, eV")
    for _ in dynamics.irun(options.steps):
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        total = potential + kinetic
        print(f"{dynamics.nsteps:4d}  {potential:13.6f}  {kinetic:11.6f}  {total:12.6f}")
    print(e3nn_accel.report())


if __name__ == "__main__":
    main()
