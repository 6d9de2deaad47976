#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["ase>=3.23", "numpy", "tblite>=0.8"]
# ///
"""Make the water/ethanol data: short GFN2-xTB trajectories of small H/C/O systems.

The point is a data set that anybody can regenerate in minutes on one core, with
no licence attached to it, and that is still real chemistry: every frame is taken
from a Langevin trajectory run on the GFN2-xTB surface (through tblite), and a
third of the frames get an extra random displacement so that the model also sees
steep, off-equilibrium walls.  Training, validation and test frames come from
separate trajectories (different seeds), so the test error is not measured on
near-copies of training frames.

Writes train.xyz, valid.xyz, test.xyz (energies in eV as REF_energy, forces in
eV/A as REF_forces) and structures.xyz (demo frames with the same labels, the last
one a periodic box of water, a kind of system that the model is not trained on).

    OMP_NUM_THREADS=1 uv run make_data.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import BFGS, FIRE
from tblite.ase import TBLite

WATER, METHANOL, ETHANOL = "H2O", "CH3OH", "CH3CH2OH"

# Molecules of each system.  At most 15 atoms, which keeps training quick.
SYSTEMS: dict[str, list[str]] = {
    "water": [WATER],
    "water2": [WATER] * 2,
    "water3": [WATER] * 3,
    "water4": [WATER] * 4,
    "water5": [WATER] * 5,
    "methanol": [METHANOL],
    "ethanol": [ETHANOL],
    "formaldehyde": ["H2CO"],
    "acetic_acid": ["CH3COOH"],
    "dimethyl_ether": ["CH3OCH3"],
    "methanol_water": [METHANOL, WATER],
    "ethanol_water": [ETHANOL, WATER],
    "ethanol_water2": [ETHANOL, WATER, WATER],
}

# Clusters would fly apart at 800 K, so only single molecules are heated that far.
MOLECULE_TEMPERATURES = (300.0, 500.0, 800.0)
CLUSTER_TEMPERATURES = (200.0, 300.0, 450.0)

# Trajectories per system and frames per trajectory, for each split.
SPLITS: dict[str, tuple[int, int]] = {"train": (6, 4), "valid": (2, 2), "test": (2, 2)}

TIMESTEP_FS = 0.5
EQUILIBRATION_STEPS = 200
STEPS_BETWEEN_FRAMES = 100
BOX_STEPS = 200
DISPLACED_FRACTION = 1 / 3
DISPLACEMENT_A = 0.06
WATER_VOLUME_A3 = 29.9  # per molecule at 300 K and 1 bar


def xtb() -> TBLite:
    """A GFN2-xTB calculator, converged tightly enough for clean forces."""
    return TBLite(method="GFN2-xTB", accuracy=0.1, verbosity=0)


def randomly_rotated(name: str, rng: np.random.Generator) -> Atoms:
    atoms = molecule(name)
    atoms.positions -= atoms.get_center_of_mass()
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    # A determinant of -1 would mirror the molecule; flipping all axes undoes it.
    atoms.positions = atoms.positions @ (rotation * np.sign(np.linalg.det(rotation)))
    return atoms


def closest_contact(one: Atoms, other: Atoms) -> float:
    gaps = one.positions[:, None, :] - other.positions[None, :, :]
    return float(np.linalg.norm(gaps, axis=-1).min())


def build(names: list[str], rng: np.random.Generator) -> Atoms:
    """The first molecule at the origin, each further one dropped next to the rest."""
    cluster = randomly_rotated(names[0], rng)
    for name in names[1:]:
        while True:
            guest = randomly_rotated(name, rng)
            direction = rng.normal(size=3)
            guest.positions += direction * rng.uniform(2.5, 4.5) / np.linalg.norm(direction)
            if 1.7 < closest_contact(cluster, guest) < 2.5:
                break
        cluster += guest
    return cluster


def langevin(atoms: Atoms, temperature: float, rng: np.random.Generator) -> Langevin:
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    return Langevin(
        atoms,
        TIMESTEP_FS * units.fs,
        temperature_K=temperature,
        friction=0.02 / units.fs,
        rng=rng,
    )


def sample(
    names: list[str], temperature: float, frames: int, rng: np.random.Generator
) -> list[Atoms]:
    """Frames of one Langevin trajectory that starts from a roughly relaxed structure."""
    atoms = build(names, rng)
    atoms.calc = xtb()
    BFGS(atoms, logfile=None).run(fmax=0.2, steps=60)
    dynamics = langevin(atoms, temperature, rng)
    dynamics.run(EQUILIBRATION_STEPS)
    kept = []
    for _ in range(frames):
        dynamics.run(STEPS_BETWEEN_FRAMES)
        kept.append(Atoms(atoms.symbols, atoms.positions))
    return kept


def label(atoms: Atoms, system: str, displaced: bool = False) -> Atoms:
    work = atoms.copy()
    work.calc = xtb()
    atoms.info.update(system=system, displaced=displaced, REF_energy=work.get_potential_energy())
    atoms.arrays["REF_forces"] = work.get_forces()
    return atoms


def make_split(trajectories: int, frames: int, rng: np.random.Generator) -> list[Atoms]:
    labelled = []
    for system, names in SYSTEMS.items():
        temperatures = MOLECULE_TEMPERATURES if len(names) == 1 else CLUSTER_TEMPERATURES
        for i in range(trajectories):
            # A split of few trajectories draws its temperatures; a larger one takes each in turn.
            turn = int(rng.integers(3)) if trajectories < 3 else 0
            temperature = temperatures[(i + turn) % 3]
            for atoms in sample(names, temperature, frames, rng):
                displaced = bool(rng.random() < DISPLACED_FRACTION)
                if displaced:
                    atoms.positions += rng.normal(scale=DISPLACEMENT_A, size=atoms.positions.shape)
                labelled.append(label(atoms, system, displaced))
        print(f"  {system}: {len(labelled)} frames so far", flush=True)
    return labelled


def water_box(per_side: int, rng: np.random.Generator) -> Atoms:
    """Liquid water: a lattice of turned molecules, relaxed, then shaken at 350 K.

    The cheaper GFN1-xTB drives it, because periodic GFN2-xTB is six times slower.
    """
    count = per_side**3
    side = (WATER_VOLUME_A3 * count) ** (1 / 3)
    box = Atoms(cell=[side] * 3, pbc=True)
    for site in np.ndindex(per_side, per_side, per_side):
        guest = randomly_rotated(WATER, rng)
        guest.positions += np.array(site) * side / per_side
        box += guest
    box.calc = TBLite(method="GFN1-xTB", verbosity=0)
    FIRE(box, logfile=None).run(fmax=0.5, steps=60)
    langevin(box, 350.0, rng).run(BOX_STEPS)
    box.wrap()
    return Atoms(box.symbols, box.positions, cell=box.cell, pbc=True)


def demo_structures(rng: np.random.Generator) -> list[Atoms]:
    """Frames to evaluate in a demo: four molecules and clusters, one periodic box."""
    frames = []
    for system in ("ethanol", "acetic_acid", "water4", "ethanol_water2"):
        (atoms,) = sample(SYSTEMS[system], 300.0, 1, rng)
        frames.append(label(atoms, system))
    return [*frames, label(water_box(3, rng), "water_box")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args()
    columns = ["symbols", "positions", "REF_forces"]
    for offset, (split, (trajectories, frames)) in enumerate(SPLITS.items()):
        print(split, flush=True)
        rng = np.random.default_rng([args.seed, offset])
        labelled = make_split(trajectories, frames, rng)
        write(args.out / f"{split}.xyz", labelled, format="extxyz", columns=columns)
    demo = demo_structures(np.random.default_rng([args.seed, len(SPLITS)]))
    write(args.out / "structures.xyz", demo, format="extxyz", columns=columns)


if __name__ == "__main__":
    main()
