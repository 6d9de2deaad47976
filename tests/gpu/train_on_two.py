"""Train a MACE on several devices of one host: the losses are those of stock MACE on one.

torchrun --standalone --nproc_per_node=2 tests/gpu/train_on_two.py            on GPUs, by NCCL
torchrun --standalone --nproc_per_node=2 tests/gpu/train_on_two.py cpu        on CPUs, by gloo

Every process trains stock MACE on the whole batch, and, accelerated and in DistributedDataParallel, on its
share of it. Prints both losses of each step and fails where they differ by more than rounding.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import e3nn_accel
from e3nn_accel import structures
from e3nn_accel.cli.shapes import build, silicon

STRUCTURES, ATOMS, STEPS = 4, 8, 10
TOLERANCE = 1e-8
"""Of losses, relative, in float64 over these steps."""


def batch_for(model: Any, device: torch.device, numbers: Sequence[int]) -> dict[str, Any]:
    """These of the structures in one batch, and forces that no model has.

    One, since DistributedDataParallel writes the buffers anew at each call of the model: a second call
    before the backward pass would spoil the first's, of stock MACE, too.
    """
    found = []
    for number in numbers:
        atoms = silicon(ATOMS)
        atoms.rattle(0.1, seed=number)
        found.append(atoms)
    batch = structures.cast(structures.batch_of(model, found, torch.float64), torch.float64, device)
    seeds = [torch.Generator().manual_seed(number) for number in numbers]
    wanted = [torch.randn(ATOMS, 3, dtype=torch.float64, generator=seed) for seed in seeds]
    return {**batch, "wanted": torch.cat(wanted).to(device)}


def step(
    model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any], scale: float
) -> float:
    """One step, of energies and forces: parameters' gradients are second derivatives."""
    optimizer.zero_grad()
    out = model(dict(batch), training=True, compute_force=True)
    errors = out["energy"].square().sum() + (out["forces"] - batch["wanted"]).square().sum()
    loss = scale * errors
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def main(device_type: str = "cuda") -> None:
    """One of the processes that torchrun starts."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    alone = build("mp0-medium" if device_type == "cuda" else "tiny").double().to(device)
    ours = copy.deepcopy(alone)
    everything = range(STRUCTURES)
    whole = batch_for(alone, device, everything)
    share = batch_for(alone, device, everything[rank::world])
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (alone, ours)]
    stock = [step(alone, optimizers[0], whole, 1 / STRUCTURES) for _ in range(STEPS)]
    with e3nn_accel.enabled(strict=True):
        parallel = DistributedDataParallel(
            ours, [rank] if device_type == "cuda" else None, find_unused_parameters=True
        )
        for number in range(STEPS):
            # gradients are averaged over processes, so each has its share of the sum times their number
            part = step(parallel, optimizers[1], share, world / STRUCTURES)
            total = torch.tensor(part / world, dtype=torch.float64, device=device)
            dist.all_reduce(total)
            error = abs(float(total) - stock[number]) / abs(stock[number])
            if rank == 0:
                print(
                    f"step {number}: stock, alone {stock[number]:.12g}; ours, {world} processes "
                    f"{float(total):.12g}; differs by {error:.1e}"
                )
            assert error < TOLERANCE
        if rank == 0:
            backends = {(row.operation, row.backend) for row in e3nn_accel.report().rows}
            print(*sorted(backends))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
