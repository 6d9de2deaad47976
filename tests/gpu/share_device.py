"""Compare replays with eager calls while several processes take turns on a device.

python tests/gpu/share_device.py 12 120 float64 200              processes, seconds, dtype, atoms

A device leaves a kernel of one process for another's, between blocks or within them, and comes back. What goes wrong
then doesn't in a process by itself, as tests have it. Each process has the shipped model in a captured graph, asks for
forces of atoms moved in six ways in random order, and prints what differs from eager calls by more than rounding: by
how much, of how many atoms, and the worst of them.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from test_model_graphs_gpu import BACKEND, TOLERANCE, call, crystal, eager, moved, shipped

import e3nn_accel
from e3nn_accel.graphs import eager as graphs_eager

WAYS, REPLAYS = 6, 40
"""Of moving atoms; between two looks at the results."""
MOST_PRINTED = 12
Results = dict[str, Any]


def differences(
    found: list[tuple[int, Results]], expected: list[Results], most: float
) -> list[str]:
    """A line for each call whose atoms' energies or forces differ by more, relative to the norm of those of its way."""
    lines = []
    for way, results in found:
        for name in ("node_energy", "forces"):
            difference, right = results[name].detach() - expected[way][name], expected[way][name]
            allowed = most * right.detach().norm()
            if bool(~(difference.norm() <= allowed)):
                each = difference.detach().abs().reshape(len(right), -1).amax(1)
                wrong = ~(each <= allowed)
                worst = each.argsort(descending=True)[:8].tolist()
                lines.append(f"{name}: {float(each.max()):.1e}, {int(wrong.sum())} atoms, {worst}")
    return lines


def one_process(seconds: float, dtype: torch.dtype, atoms: int) -> None:
    """Capture again and again, and replay; print what is wrong, and how often nothing was."""
    graphs_eager.ENOUGH_EDGES = 0
    model = shipped(dtype)
    batches = [moved(crystal(model, atoms), way) for way in range(WAYS)]
    expected = [eager(model, batch) for batch in batches]
    calls = {"eager": 0, "replayed": 0}
    wrong: list[str] = []
    end = time.time() + seconds
    while time.time() < end:
        of_eager = [(way, eager(model, batches[way])) for way in range(WAYS)]
        calls["eager"] += WAYS
        wrong += [f"eager, {line}" for line in differences(of_eager, expected, TOLERANCE[dtype])]
        with e3nn_accel.enabled(**BACKEND):
            for _ in range(8):
                ways = [random.randrange(WAYS) for _ in range(REPLAYS)]
                found = [(way, call(model, batches[way])) for way in ways]
                calls["replayed"] += REPLAYS
                wrong += [
                    f"replayed, {line}" for line in differences(found, expected, TOLERANCE[dtype])
                ]
    print(*wrong[:MOST_PRINTED], sep="\n", end="\n" if wrong else "")
    print(f"{len(wrong)} results wrong of {calls}", flush=True)
    raise SystemExit(bool(wrong))


def main(processes: str, seconds: str, dtype: str, atoms: str, child: str = "") -> None:
    """Start so many processes of this file, or be one of them; fails where a result is wrong."""
    if child:
        torch.set_default_dtype(torch.float64)
        one_process(float(seconds), getattr(torch, dtype), int(atoms))
        return
    command = [sys.executable, "-W", "ignore", __file__, processes, seconds, dtype, atoms]
    running = [subprocess.Popen([*command, "child"]) for _ in range(int(processes))]
    raise SystemExit(max(process.wait() for process in running))


if __name__ == "__main__":
    main(*sys.argv[1:])
