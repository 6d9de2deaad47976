"""Time training steps: energy, forces and stress, a loss of them, its gradients, Adam. Stock and ours take turns.

python tests/gpu/time_training_steps.py [64,1000] [float32] [mp0-medium]

A shape of `bench`, random weights, silicon or water. A step is from having the batch's tensors to having
updated the parameters on the device, which is waited for at the end of each; "host" is the time until the
optimiser returned. Medians with quartiles of 20 steps; "peak" is what a step takes of the device's memory
besides model, optimiser and batch. "ours" is captured at its third step and replayed; "eager" isn't; "torch's
gathers" is eager, without quick gradients of what MACE takes by an index; "torch's second derivatives" without
the kernel of the radial MLPs'.
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch

import e3nn_accel
from e3nn_accel import structures
from e3nn_accel.backends.cuda.radial_mlp_kernels import RadialMlpKernels
from e3nn_accel.cli.shapes import build, structure
from e3nn_accel.graphs import eager
from e3nn_accel.interception import suspend

STEPS, WARM_UP = 20, 5
WEIGHTS = {"energy": 1.0, "forces": 100.0, "stress": 10.0}


def by_torch(
    kernels: Any, g: Any, x: Any, h: Any, weights: Any, wanted: Any
) -> tuple[torch.Tensor | None, ...]:
    """In place of `RadialMlpKernels.second`."""
    operands = [t.detach().requires_grad_() for t in (g, x, *weights)]
    with torch.enable_grad():
        out = kernels.composed(operands[1], operands[2:])
        (first,) = torch.autograd.grad(out, operands[1], operands[0], create_graph=True)
        return torch.autograd.grad(first, operands, h)


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "stock": suspend,
    "ours": contextlib.nullcontext,
    "eager": contextlib.nullcontext,
    "torch's gathers": lambda: patch.object(eager, "ENOUGH_EDGES", 1 << 62),
    "torch's second derivatives": lambda: patch.object(RadialMlpKernels, "second", by_torch),
}


def spread(times: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, median, high = (1e3 * t for t in statistics.quantiles(times, n=4, method="inclusive"))
    return f"{median:.3f} [{low:.3f}-{high:.3f}]"


def loss_of(
    out: dict[str, Any], wanted: dict[str, torch.Tensor], atoms: torch.Tensor
) -> torch.Tensor:
    """MACE's weighted loss of energies an atom, forces and stress."""
    total = torch.zeros((), device=atoms.device)
    for name, weight in WEIGHTS.items():
        error = out[name] - wanted[name]
        total = total + weight * (error / atoms if name == "energy" else error).square().mean()
    return total


def training_step(model: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """One step, of a model and an optimiser of its own."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4, amsgrad=True)
    atoms = batch["ptr"].diff()
    fresh = lambda: {name: tensor.detach() for name, tensor in batch.items()}  # noqa: E731
    out = model(fresh(), training=True, compute_stress=True)
    wanted = {name: torch.randn_like(out[name].detach()) for name in WEIGHTS}

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss_of(model(fresh(), training=True, compute_stress=True), wanted, atoms).backward()
        optimiser.step()

    return step


def timed(step: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds of a step and of the host's part, and MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    started = time.perf_counter()
    step()
    returned = time.perf_counter()
    torch.cuda.synchronize()
    whole = time.perf_counter() - started
    return whole, returned - started, (torch.cuda.max_memory_allocated() - held) / 2**20


def measure(model: Any, batch: dict[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
    """Of each way, taking turns."""
    steps: dict[str, Callable[[], None]] = {}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    for round_ in range(-WARM_UP, STEPS):
        for name, way in WAYS.items():
            with way():
                if name not in steps:
                    own = copy.deepcopy(model)
                    if name not in ("stock", "ours"):
                        e3nn_accel.accelerate(own, graph="0")
                    steps[name] = training_step(own, batch)
                result = timed(steps[name])
            if round_ >= 0:
                found[name].append(result)
    return found


def main(atoms: str = "64,1000", dtype_name: str = "float32", shape: str = "mp0-medium") -> None:
    """Print a line for each size and way."""
    device, dtype = torch.device("cuda"), getattr(torch, dtype_name)
    torch.set_default_dtype(dtype)
    model: Any = build(shape).to(device, dtype)
    print(torch.cuda.get_device_name(), shape, dtype)
    e3nn_accel.enable()
    for number in map(int, atoms.split(",")):
        atoms_of = structure(shape, number)
        batch = structures.cast(structures.batch_of(model, atoms_of, dtype), dtype, device)
        print(f"{len(atoms_of)} atoms, {batch['edge_index'].shape[1]} edges", flush=True)
        for name, results in measure(model, batch).items():
            whole, host, peak = (list(column) for column in zip(*results, strict=True))
            line = (
                f"{spread(whole)} ms, host {spread(host)}, peak {statistics.median(peak):.0f} MiB"
            )
            print(f"  {name:27s} {line}", flush=True)
    print(e3nn_accel.report())
    e3nn_accel.disable()


if __name__ == "__main__":
    main(*sys.argv[1:])
