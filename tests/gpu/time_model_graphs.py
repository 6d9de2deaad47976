"""Time whole calls of a model, eager and as a CUDA graph, with fresh inputs for every call.

python tests/gpu/time_model_graphs.py [MODEL or SHAPE] [64,512,1000] [float32|float64]
python tests/gpu/time_model_graphs.py off-large 648
python tests/gpu/time_model_graphs.py mp0-medium 1000 float64

Without a model: a shape of `bench`, MACE-MP-0 medium's if none is named, random weights, silicon or water.
float32 unless a model's file says otherwise. A call is from having the batch's tensors to having its results
on the device, which is waited for at the end of each call. "host" is the time until the call returns, with the
device still at work. Medians with quartiles of 30 calls.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch

import e3nn_accel
from e3nn_accel import structures
from e3nn_accel.cli.shapes import SHAPES, build, structure
from e3nn_accel.quantities import dtype_of

CALLS, WARM_UP = 30, 8
WAYS: dict[str, dict[str, Any]] = {
    "stock": {},
    "eager": {"graph": "0"},
    "graph": {"graph": "auto"},
}


def spread(times: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, median, high = (1e3 * t for t in statistics.quantiles(times, n=4, method="inclusive"))
    return f"{median:.3f} [{low:.3f}-{high:.3f}]"


def timed(model: Any, prepare: Callable[[], dict[str, Any]], stress: bool) -> tuple[str, str]:
    """Of whole calls, and of the host's part."""
    whole, host = [], []
    for n in range(WARM_UP + CALLS):
        batch = prepare()
        torch.cuda.synchronize()
        started = time.perf_counter()
        out = model(batch, compute_stress=stress)
        returned = time.perf_counter()
        torch.cuda.synchronize()
        if n >= WARM_UP:
            whole.append(time.perf_counter() - started)
            host.append(returned - started)
        del out
    return spread(whole), spread(host)


def main(path: str = "", atoms: str = "64,1000", precision: str = "") -> None:
    """Print a line for each size and way."""
    device = torch.device("cuda")
    shape = path if path in SHAPES else "" if path else "mp0-medium"
    model: Any = build(shape) if shape else structures.load_mace(path)
    model = model.to(device).requires_grad_(False).eval()
    dtype = getattr(torch, precision) if precision else dtype_of(model)
    model = model.to(dtype)
    torch.set_default_dtype(dtype)
    print(torch.cuda.get_device_name(), shape or path, dtype)
    for number in map(int, atoms.split(",")):
        atoms_of = structure(shape, number) if shape else structures.random_crystal(model, number)
        batch = structures.batch_of(model, atoms_of, dtype)
        edges = batch["edge_index"].shape[1]
        print(f"{len(atoms_of)} atoms, {edges} edges")
        prepare = lambda: structures.cast(batch, dtype, device)  # noqa: B023, E731
        for stress in (False, True):
            for name, options in WAYS.items():
                if options:
                    e3nn_accel.enable(**options)
                whole, host = timed(model, prepare, stress)
                print(f"  {'stress' if stress else 'forces':7s} {name:22s} {whole} ms, host {host}")
                if "graph" in name:
                    lines = str(e3nn_accel.report()).splitlines()
                    print(*[f"      {' '.join(line.split())}" for line in lines if " model " in line],
                          sep="\n")  # fmt: skip
                e3nn_accel.disable()


if __name__ == "__main__":
    main(*sys.argv[1:])
