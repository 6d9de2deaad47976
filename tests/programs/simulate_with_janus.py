"""janus-core's commands: single point, molecular dynamics, relaxation and phonons.

It knows nothing of e3nn_accel. Usage: python simulate_with_janus.py MODEL STRUCTURES RESULTS.npz
"""

import sys
from pathlib import Path

import numpy as np
from ase.build import molecule
from ase.io import read, write
from janus_core.cli.janus import app
from phonopy import load

MODEL, STRUCTURES, RESULTS = sys.argv[1:]
COMMON = ["--arch", "mace", "--model", MODEL, "--device", "cpu", "--no-tracker"]
results: dict[str, np.ndarray] = {}


def janus(command: str, structure: str, *options: str) -> None:
    """One command, as its entry point calls it."""
    app([command, "--struct", structure, *COMMON, *options], standalone_mode=False)


write("cluster.xyz", read(STRUCTURES, 3))
write("crystal.xyz", molecule("H2O", cell=[4.0, 4.2, 4.4], pbc=True))

properties = ("energy", "forces", "stress", "hessian")
janus(
    "singlepoint",
    "crystal.xyz",
    *(x for p in properties for x in ("--properties", p)),
    "--out",
    "single.xyz",
)
single = read("single.xyz")
results["single energy"] = np.array(single.info["mace_energy"])
results["single forces"] = single.arrays["mace_forces"]
results["single stress"] = np.array(single.info["mace_stress"])
results["single hessian"] = np.array(single.info["mace_hessian"])

janus("md", "cluster.xyz", "--ensemble", "nve", "--steps", "5", "--temp", "300", "--seed", "1",
      "--traj-every", "1", "--file-prefix", "dynamics")  # fmt: skip
(trajectory,) = Path().glob("dynamics*-traj.extxyz")
frames = read(trajectory, ":")
results["dynamics"] = np.array([frame.positions for frame in frames])

janus("geomopt", "crystal.xyz", "--steps", "5", "--out", "relaxed.xyz")
results["relaxed"] = read("relaxed.xyz").positions

janus("phonons", "crystal.xyz", "--supercell", "2 1 1", "--file-prefix", "phonons", "--no-hdf5")
(found,) = Path().glob("phonons*-phonopy.yml")
results["phonons"] = load(found, force_constants_filename=None).force_constants
np.savez(RESULTS, **results)
