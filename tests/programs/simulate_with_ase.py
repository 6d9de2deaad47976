"""What people do with MACECalculator: one program after another, all results to a file.

It knows nothing of e3nn_accel. Usage: python simulate_with_ase.py MODEL STRUCTURES RESULTS.npz
"""

import sys

import numpy as np
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.filters import FrechetCellFilter
from ase.io import read
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from ase.phonons import Phonons
from ase.vibrations import Vibrations
from mace.calculators import MACECalculator

MODEL, STRUCTURES, RESULTS = sys.argv[1:]
results: dict[str, np.ndarray] = {}


def calculator(**options: object) -> MACECalculator:
    return MACECalculator(device="cpu", default_dtype="float64", **options)


def perturbed(seed: int) -> torch.nn.Module:
    """The model with other weights: another member of a committee."""
    model = torch.load(MODEL, map_location="cpu", weights_only=False).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def liquid() -> Atoms:
    return read(STRUCTURES, 4)


def cluster() -> Atoms:
    return read(STRUCTURES, 3)


def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=3)
    return atoms


def crystal() -> Atoms:
    """Water molecules, one in each small cell."""
    atoms = molecule("H2O", cell=[4.0, 4.2, 4.4], pbc=True)
    atoms.rattle(0.02, seed=4)
    return atoms


def properties() -> None:
    atoms = liquid()
    atoms.calc = calculator(model_paths=MODEL, compute_atomic_stresses=True)
    for name in ("energy", "energies", "forces", "stress", "stresses"):
        results[f"properties {name}"] = atoms.calc.get_property(name, atoms)
    results["properties descriptors"] = atoms.calc.get_descriptors(atoms)


def committee() -> None:
    """Several models: from files, by a pattern, and as modules."""
    for seed in (1, 2):
        torch.save(perturbed(seed), f"member_{seed}.model")
    calculators = {
        "files": calculator(model_paths=[MODEL, "member_1.model", "member_2.model"]),
        "glob": calculator(model_paths="member_*.model"),
        "modules": calculator(models=[perturbed(3), perturbed(4)]),
    }
    for name, calc in calculators.items():
        atoms = cluster()
        atoms.calc = calc
        atoms.get_potential_energy()
        for key in ("energies", "energy_var", "forces_comm", "forces", "stress", "stress_var"):
            if key in calc.results:
                results[f"committee {name} {key}"] = calc.results[key]
        assert f"committee {name} forces_comm" in results


def hessians() -> None:
    """Of few atoms, which MACE takes one by one, and of more, in chunks; of a committee, one each."""
    calc, several = calculator(model_paths=MODEL), calculator(models=[perturbed(1), perturbed(2)])
    results["hessian"] = calc.get_hessian(ethanol())
    results["hessian of more atoms"] = calc.get_hessian(crystal() * (2, 2, 2))
    results["hessians of a committee"] = np.array(several.get_hessian(ethanol()))
    atoms = ethanol()
    atoms.calc = calc
    vibrations = Vibrations(atoms, name="vibrations")
    vibrations.run()
    results["vibrations"] = vibrations.get_vibrations().get_hessian_2d()


def optimisers() -> None:
    atoms = ethanol()
    atoms.calc = calculator(model_paths=MODEL)
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=12)
    results["bfgs"] = atoms.positions
    atoms = liquid()
    atoms.calc = calculator(model_paths=MODEL)
    FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-3, steps=4)
    results["fire positions"], results["fire cell"] = atoms.positions, atoms.cell.array


def path() -> None:
    """A nudged elastic band, all of whose images share one calculator."""
    first, last = ethanol(), ethanol()
    last.rattle(0.1, seed=9)
    images = [first, *(first.copy() for _ in range(2)), last]
    band = NEB(images, allow_shared_calculator=True)
    band.interpolate()
    calc = calculator(model_paths=MODEL)
    for image in images:
        image.calc = calc
    results["path"] = band.get_forces()


def dynamics() -> None:
    atoms = cluster()
    atoms.calc = calculator(model_paths=MODEL)
    atoms.set_momenta(0.5 * np.random.default_rng(0).normal(size=(len(atoms), 3)))
    VelocityVerlet(atoms, 0.5 * units.fs).run(10)
    results["dynamics"] = np.concatenate([atoms.positions, atoms.get_momenta()])


def phonons() -> None:
    found = Phonons(crystal(), calculator(model_paths=MODEL), supercell=(2, 1, 1), delta=0.02)
    found.run()
    found.read(acoustic=True)
    results["phonons force constants"] = found.get_force_constant()
    results["phonons"] = np.array(found.band_structure([[0, 0, 0], [0.25, 0, 0], [0.5, 0, 0]]))


for program in (properties, committee, hessians, optimisers, path, dynamics, phonons):
    program()
np.savez(RESULTS, **results)
