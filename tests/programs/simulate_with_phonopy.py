"""phonopy's finite displacements, forces by MACECalculator.

It knows nothing of e3nn_accel. Usage: python simulate_with_phonopy.py MODEL RESULTS.npz
"""

import sys

import numpy as np
from ase import Atoms
from ase.build import molecule
from mace.calculators import MACECalculator
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

MODEL, RESULTS = sys.argv[1:]
water = molecule("H2O", cell=[4.0, 4.2, 4.4], pbc=True)
cell = PhonopyAtoms(
    symbols=water.get_chemical_symbols(), cell=water.cell.array, positions=water.positions
)
phonons = Phonopy(cell, supercell_matrix=[2, 1, 1])
phonons.generate_displacements(distance=0.02)
calculator = MACECalculator(model_paths=MODEL, device="cpu", default_dtype="float64")
forces = []
for displaced in phonons.supercells_with_displacements:
    atoms = Atoms(displaced.symbols, cell=displaced.cell, positions=displaced.positions, pbc=True)
    atoms.calc = calculator
    forces.append(atoms.get_forces())
phonons.forces = forces
phonons.produce_force_constants()
phonons.run_mesh([4, 2, 2])
np.savez(
    RESULTS, constants=phonons.force_constants, frequencies=phonons.get_mesh_dict()["frequencies"]
)
