"""Compare results while several processes take turns on a device.

python tests/gpu/share_device.py 12 120 float64 200              processes, seconds, dtype, atoms
python tests/gpu/share_device.py 12 120 float64 linears          values and gradients of linears of many rows

A device leaves a kernel of one process for another's, between blocks or within them, and comes back. What goes wrong
then doesn't in a process by itself, as tests have it. Each process has the shipped model in a captured graph, asks for
forces of atoms moved in six ways in random order, and prints what differs from eager calls by more than rounding: by
how much, of how many atoms, and the worst of them. Or it calls linears again and again, whose bits are always the same.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from e3nn import o3
from test_model_graphs_gpu import BACKEND, TOLERANCE, call, crystal, eager, moved, shipped

import e3nn_accel
from e3nn_accel.graphs import eager as graphs_eager

WAYS, REPLAYS = 6, 40
"""Of moving atoms; between two looks at the results."""
MOST_PRINTED = 12
LINEARS = (
    (("256x0e+384x1o+384x2e+256x3o", "128x0e+128x1o+128x2e+128x3o"), 2000),
    (("128x0e+128x1o", "128x0e+128x1o"), 5000),
    (("64x0e", "1280x0e"), 20_000),
)
"""Irreps and rows: of more blocks than a device has room for at once."""
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


def replays(seconds: float, dtype: torch.dtype, atoms: int) -> bool:
    """Capture again and again, and replay; print what is wrong, and how often nothing was. Whether something was."""
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
    return bool(wrong)


def linears(seconds: float, dtype: torch.dtype) -> bool:
    """Call them by turns, and print how often values or a gradient had other bits. Whether one had."""
    modules = [o3.Linear(*irreps).to("cuda", dtype) for irreps, _ in LINEARS]
    given = [
        torch.randn(rows, module.irreps_in.dim, device="cuda", dtype=dtype).requires_grad_()
        for module, (_, rows) in zip(modules, LINEARS, strict=True)
    ]

    def results(n: int) -> list[torch.Tensor]:
        out = modules[n](given[n])
        return [out, *torch.autograd.grad(out.square().sum(), (given[n], modules[n].weight))]

    stock = [results(n) for n in range(len(modules))]
    calls, wrong = 0, torch.zeros(3, dtype=torch.long, device="cuda")
    with e3nn_accel.enabled(**BACKEND):
        exact = [results(n) for n in range(len(modules))]
        for found, right in zip(chain(*exact), chain(*stock), strict=True):
            assert (found - right).norm() <= 10 * TOLERANCE[dtype] * right.norm()
        end = time.time() + seconds
        while time.time() < end:
            for n in list(range(len(modules))) * REPLAYS:
                pairs = zip(results(n), exact[n], strict=True)
                wrong += torch.stack([(now != before).any() for now, before in pairs])
                calls += 1
            torch.cuda.synchronize()
    values, of_features, of_weights = wrong.tolist()
    print(f"wrong of {calls}: {values} values, {of_features} of features, {of_weights} of weights")
    return bool(wrong.any())


def main(processes: str, seconds: str, dtype: str, atoms: str, child: str = "") -> None:
    """Start so many processes of this file, or be one of them; fails where a result is wrong."""
    if child:
        torch.set_default_dtype(torch.float64)
        of = float(seconds), getattr(torch, dtype)
        raise SystemExit(linears(*of) if atoms == "linears" else replays(*of, int(atoms)))
    command = [sys.executable, "-W", "ignore", __file__, processes, seconds, dtype, atoms]
    running = [subprocess.Popen([*command, "child"]) for _ in range(int(processes))]
    raise SystemExit(max(process.wait() for process in running))


if __name__ == "__main__":
    main(*sys.argv[1:])
