"""torch-sim's MaceModel over several systems at once: one call, dynamics, relaxation with and without the cell.

It knows nothing of e3nn_accel. Usage: python simulate_with_torch_sim.py MODEL STRUCTURES RESULTS.npz
"""

import sys

import numpy as np
import torch
import torch_sim as ts
from ase.build import molecule
from ase.io import read
from torch_sim.integrators import nve
from torch_sim.models.mace import MaceModel
from torch_sim.optimizers import fire, frechet_cell_fire

MODEL, STRUCTURES, RESULTS = sys.argv[1:]
network = torch.load(MODEL, map_location="cpu", weights_only=False)
model = MaceModel(network, device=torch.device("cpu"), dtype=torch.float64)
systems = read(STRUCTURES, ":4")
for atoms in systems:
    atoms.set_cell([15.0, 15.0, 15.0])
    atoms.pbc = True
crystals = [molecule("H2O", cell=[size, 4.2, 4.4], pbc=True) for size in (4.0, 4.3)]
results: dict[str, np.ndarray] = {}

batch = ts.initialize_state([*systems, *crystals], model.device, model.dtype)
for name, value in model(batch).items():
    results[f"batch {name}"] = value.detach().numpy()

moved = ts.integrate(
    system=systems, model=model, integrator=nve, n_steps=5, temperature=300, timestep=0.0005, seed=1
)
results["dynamics"] = torch.cat([moved.positions, moved.momenta]).detach().numpy()

relaxed = ts.optimize(system=systems[:2], model=model, optimizer=fire, max_steps=5)
results["fire"] = relaxed.positions.detach().numpy()

relaxed = ts.optimize(system=crystals, model=model, optimizer=frechet_cell_fire, max_steps=5)
results["cells"] = relaxed.cell.detach().numpy()
np.savez(RESULTS, **results)
