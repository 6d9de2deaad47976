"""Time ASE's molecular dynamics with MACECalculator, stock and accelerated in one run, and where a step goes.

python tests/gpu/time_md_steps.py [--device cuda|cpu] [--atoms 64,1000,4096] [--steps 60] [--ways stock,old,ours]
python tests/gpu/time_md_steps.py --drift 2000 [--starts 8 --at-once 8] [--device cuda|cpu] [--dtype float32]

NVE of silicon at 300 K, 1 fs, with MACE-MP-0 medium's shape (random weights, scaled down so that no atom
flies away), float32. Ways: "stock", "old" (accelerated, neighbours="0") and "ours". Each takes its turn
twice; the medians with quartiles are of all steps of both. A step is ASE's, from one set of forces to the
next; its parts are those of `e3nn-accel bench --profile`, each until the device has finished.

--drift: NVE at 300 K with the shipped checkpoint, water and ethanol, stock and ours from the same start; the
slope of the total energy by least squares, per atom, and its fluctuation; of several starts the mean slope,
with its standard error: in float32 trajectories part, and a slope by itself is partly chance. Starts that run at
once, each in a process of its own, on all devices in turn, are slower each: no time of theirs says anything.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import numpy as np
import torch

import e3nn_accel
from e3nn_accel import structures
from e3nn_accel.cli.shapes import build, silicon
from e3nn_accel.cli.step_parts import PARTS, Clock, watched

WAYS: dict[str, dict[str, Any]] = {"stock": {}, "old": {"neighbours": "0"}, "ours": {}}
WARM_UP = 10
FOLDER = Path(__file__).parent.parent.parent / "examples/water_ethanol"


def dynamics_of(atoms: Any, femtoseconds: float, seed: int = 0) -> Any:
    """NVE from 300 K, the same velocities for each seed."""
    from ase import units
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
    from ase.md.verlet import VelocityVerlet

    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(seed))
    Stationary(atoms)
    return VelocityVerlet(atoms, femtoseconds * units.fs)


def steps(model: Any, atoms: Any, way: str, device: str, number: int) -> list[dict[str, float]]:
    """Seconds of each step, whole and by part."""
    from mace.calculators import MACECalculator

    atoms = atoms.copy()
    if way != "stock":
        e3nn_accel.enable(**WAYS[way])
    atoms.calc = MACECalculator(models=model, device=device, default_dtype="float32")
    dynamics, found = dynamics_of(atoms, 1.0), []
    dynamics.run(WARM_UP)
    for _ in range(number):  # whole steps first: the clocks of parts wait for the device
        started = time.perf_counter()
        dynamics.run(1)
        found.append({"whole": time.perf_counter() - started})
    clock = Clock(torch.device(device))
    with watched(clock, type(model), way != "ours"):
        for step in found:
            before = dict(clock.seconds)
            with clock.part("rest"):
                dynamics.run(1)
            step |= {name: s - before.get(name, 0.0) for name, s in clock.seconds.items()}
    if way != "stock":
        for line in str(e3nn_accel.report()).splitlines():
            if "MACECalculator" in line or " model " in line:
                print("     ", " ".join(line.split()))
    e3nn_accel.disable()
    return found


def spread(values: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, median, high = (1e3 * t for t in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{median:.2f} [{low:.2f}-{high:.2f}]"


def time_steps(args: argparse.Namespace) -> None:
    """A block for each size."""
    model = build("mp0-medium")
    for readout in model.readouts:  # small forces: silicon stays where it is
        for parameter in readout.parameters():
            parameter.data *= 1e-3
    ways = args.ways.split(",")
    for number in map(int, args.atoms.split(",")):
        atoms = silicon(number)
        print(f"{len(atoms)} atoms")
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for way in (*ways, *reversed(ways)):
            found[way] += steps(model, atoms, way, args.device, args.steps)
        for way in ways:
            means = {p: 1e3 * statistics.mean(s.get(p, 0.0) for s in found[way]) for p in PARTS}
            print(
                f"  {way:6s} {spread([s['whole'] for s in found[way]])} ms a step;",
                "mean of parts:",
                ", ".join(f"{part} {mean:.2f}" for part, mean in means.items()),
            )
        if "stock" in ways:
            for way in ways:
                medians = [statistics.median(s["whole"] for s in found[w]) for w in ("stock", way)]
                print(f"  {way}: {medians[0] / medians[1]:.2f} times as fast as stock")


def drift(args: argparse.Namespace) -> None:
    """A line for each start and way, and the mean drift of each way."""
    import ase.io

    atoms = ase.io.read(FOLDER / "structures.xyz", index=args.index)
    atoms.info.clear()
    atoms = atoms * ((args.repeat,) * 3) if atoms.pbc.all() else atoms
    print(f"{atoms.get_chemical_formula()}, {args.drift} steps of 0.5 fs, {args.dtype}")
    started = partial(drifts_of, atoms, args)
    if args.at_once > 1:
        with ProcessPoolExecutor(args.at_once, get_context("spawn")) as processes:
            pairs = list(processes.map(started, range(args.starts)))
    else:
        pairs = [started(seed) for seed in range(args.starts)]
    slopes = dict(zip(("stock", "ours"), zip(*pairs, strict=True), strict=True))
    if args.starts > 1:
        slopes["ours - stock"] = tuple(ours - stock for stock, ours in pairs)
        for way, found in slopes.items():
            error = statistics.stdev(found) / len(found) ** 0.5
            print(
                f"  {way:12s} mean drift {statistics.mean(found):+.5f} +- {error:.5f} meV/atom/ps,",
                f"of {args.starts} starts",
            )


def drifts_of(start: Any, args: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Stock's and ours from the same start."""
    structures.import_mace()
    if args.at_once > 1 and args.device == "cuda":
        torch.cuda.set_device(seed % torch.cuda.device_count())
    return drift_of(start, "stock", seed, args), drift_of(start, "ours", seed, args)


def drift_of(start: Any, way: str, seed: int, args: argparse.Namespace) -> float:
    """The slope of the total energy, meV/atom/ps."""
    from ase import units
    from mace.calculators import MACECalculator

    if way != "stock":
        e3nn_accel.enable()
    atoms = start.copy()
    path = str(FOLDER / "water_ethanol.model")
    atoms.calc = MACECalculator(path, device=args.device, default_dtype=args.dtype)
    dynamics = dynamics_of(atoms, 0.5, seed)
    energies: list[float] = []
    dynamics.attach(lambda: energies.append(atoms.get_total_energy() / len(atoms)))
    dynamics.run(WARM_UP)  # which may compile and capture
    started = time.perf_counter()
    dynamics.run(args.drift - WARM_UP)
    seconds = time.perf_counter() - started
    times = dynamics.dt / units.fs * 1e-3 * np.arange(len(energies))
    slope = 1e3 * float(np.polyfit(times, energies, 1)[0])
    print(
        f"  {way:6s} drift {slope:+.5f} meV/atom/ps, fluctuation {1e3 * np.std(energies):.4f} meV/atom, "
        f"last energy {energies[-1]:.9f} eV/atom, {1e3 * seconds / (args.drift - WARM_UP):.2f} ms a step",
        flush=True,
    )
    if way != "stock" and seed == 0:
        print("     ", "\n      ".join(
            " ".join(line.split()) for line in str(e3nn_accel.report()).splitlines()
            if "MACECalculator" in line or " model " in line))  # fmt: skip
    e3nn_accel.disable()
    return slope


def main() -> None:
    """Read the arguments, and time."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--atoms", default="64,1000,4096")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--drift", type=int, metavar="STEPS")
    parser.add_argument(
        "--starts", type=int, default=1, help="of different velocities, for --drift"
    )
    parser.add_argument("--at-once", type=int, default=1, help="starts, in processes")
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--index", type=int, default=-1, help="of the shipped structures")
    parser.add_argument(
        "--repeat", type=int, default=1, help="of a periodic structure, along each vector"
    )
    args = parser.parse_args()
    structures.import_mace()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    (time_steps if args.drift is None else drift)(args)


if __name__ == "__main__":
    main()
