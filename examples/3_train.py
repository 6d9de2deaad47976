# /// script
# requires-python = ">=3.10"
# dependencies = ["e3nn_accel[mace]", "ase"]
# ///
"""Training on forces: a small MACE takes the same steps with stock e3nn and accelerated.

A loss of forces is differentiated twice, and weights change at every step; e3nn_accel reads them
where they are, so optimisers need nothing of it. Losses of both runs are printed side by side.

    python examples/3_train.py [--steps 5] [--device cuda]
"""

from __future__ import annotations

import argparse
import copy

import ase.build
import numpy as np
import torch
from mace import data, modules, tools  # before e3nn 0.4, whose constants it lets torch load
from mace.tools.torch_geometric.batch import Batch

from e3nn import o3  # isort: skip

import e3nn_accel

CUTOFF = 4.0


def tiny_mace() -> modules.MACE:
    """Two layers of 8 channels for H and O, with the weights of seed 0."""
    torch.manual_seed(0)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    return modules.ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=4,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=2,
        hidden_irreps=o3.Irreps("8x0e+8x1o"),
        MLP_irreps=o3.Irreps("8x0e"),
        atomic_energies=np.array([-1.0, -2.0]),
        avg_num_neighbors=2.0,
        atomic_numbers=[1, 8],
        correlation=2,
        gate=torch.nn.functional.silu,
        radial_MLP=[16],
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )


def water(copies: int) -> dict[str, torch.Tensor]:
    """A batch of distorted water molecules, each pulled back to where it was by springs."""
    table = tools.AtomicNumberTable([1, 8])
    items, forces = [], []
    for seed in range(copies):
        atoms = ase.build.molecule("H2O")
        before = atoms.positions.copy()
        atoms.rattle(0.1, seed=seed)
        forces.append(torch.as_tensor(before - atoms.positions))
        config = data.config_from_atoms(atoms)
        items.append(data.AtomicData.from_config(config, z_table=table, cutoff=CUTOFF))
    batch: dict[str, torch.Tensor] = Batch.from_data_list(items).to_dict()
    return batch | {"forces": torch.cat(forces)}


def train(model: modules.MACE, batch: dict[str, torch.Tensor], steps: int) -> list[float]:
    """The losses of a few steps of Adam."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        forces = model(batch, training=True)["forces"]  # training: forces can be differentiated
        loss = (forces - batch["forces"]).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train twice and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)

    model = tiny_mace().to(options.device)
    twin = copy.deepcopy(model)
    batch = {k: v.to(options.device) if torch.is_tensor(v) else v for k, v in water(4).items()}

    stock = train(model, batch, options.steps)
    with e3nn_accel.enabled():
        ours = train(twin, batch, options.steps)

    print("step    loss, stock e3nn    loss, e3nn_accel")
    for step, losses in enumerate(zip(stock, ours, strict=True)):
        print(f"{step:4d}  {losses[0]:18.12f}  {losses[1]:18.12f}")
    np.testing.assert_allclose(ours, stock, rtol=1e-9)
    print(e3nn_accel.report())  # of modules that still exist


if __name__ == "__main__":
    main()
