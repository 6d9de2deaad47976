"""Time what finds the pairs of a structure, and what a step pays between two lists instead.

python tests/time_neighbours.py [64,1000,4096] [cpu|cuda]

Pairs of silicon, a little rattled, within cutoff and skin (6 + 1 angstrom), by matscipy as MACE calls it, vesin and
nvalchemi-toolkit-ops, on the CPU and, with cuda, on the device. A way that is absent or fails says so. "search" ends
with the way's own arrays, sender, receiver and cell of each pair; "list" with what `Pairs` keeps: int64 indices,
float64 cells and shifts as tensors on the device. Beside them "between": the edges within the cutoff found among
the listed pairs, as every step does that makes no list, where stock MACE searches within the cutoff. Milliseconds,
medians with quartiles, all ways taking turns: with cpu processor time of all threads, so that neighbours on the
machine don't count, with cuda the clock's, the device waited for. Every way has to find matscipy's pairs. vesin has
as many threads as torch (OMP_NUM_THREADS).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import numpy as np
import torch

from e3nn_accel.cli.machine import this_machine
from e3nn_accel.cli.shapes import silicon
from e3nn_accel.cli.timing import Spread, milliseconds
from e3nn_accel.neighbours.frame import snapshot
from e3nn_accel.neighbours.pairs import SKIN, Pairs, Snapshot

CUTOFF = 6.0
ROUNDS, WARM_UP = 15, 2
AT_CUTOFF = 1e-9
"""Pairs so near to it may be there or not."""
Search = Callable[[], tuple[Any, Any, Any]]
"""Sender, receiver, cell of each pair, in arrays of its own."""


def matscipy(now: Snapshot, device: torch.device, within: float = CUTOFF + SKIN) -> Search:
    """Which MACE takes, and so do we."""
    from mace.data.neighborhood import get_neighborhood

    def search() -> tuple[Any, Any, Any]:
        index, _, units, _ = get_neighborhood(now.positions, within, now.pbc, now.cell.copy())
        return index[0], index[1], units

    return search


def vesin(now: Snapshot, device: torch.device) -> Search:
    """On the CPU by its threads, on a device by its kernels, from and to torch's tensors."""
    from vesin import NeighborList

    threads = {} if device.type == "cuda" else {"n_threads": torch.get_num_threads()}
    finder = NeighborList(cutoff=CUTOFF + SKIN, full_list=True, sorted=True, **threads)
    if device.type != "cuda":
        return lambda: tuple(finder.compute(now.positions, now.cell, True, "ijS"))
    points, box = (torch.from_numpy(a).to(device) for a in (now.positions, now.cell))
    return lambda: tuple(finder.compute(points, box, True, "ijS"))


def nvalchemi(now: Snapshot, device: torch.device) -> Search:
    """The list, of the method that it chooses; positions are on the device already."""
    from nvalchemiops.torch.neighbors import neighbor_list

    positions, cell = (torch.from_numpy(a).to(device) for a in (now.positions, now.cell[None]))
    pbc = torch.ones((1, 3), dtype=torch.bool, device=device)
    atoms = len(now.positions)
    most = 2 * int(np.ceil(atoms * 4.19 * (CUTOFF + SKIN) ** 3 / np.linalg.det(now.cell)))

    def search() -> tuple[Any, Any, Any]:
        index, _, units = neighbor_list(
            positions, CUTOFF + SKIN, cell=cell, pbc=pbc,
            return_neighbor_list=True, max_neighbors=most,
        )  # fmt: skip
        return index[0], index[1], units

    return search


WAYS: dict[str, tuple[Callable[[Snapshot, torch.device], Search], str, str]] = {
    "matscipy": (matscipy, "cpu", "matscipy"),
    "vesin": (vesin, "cpu", "vesin"),
    "vesin, device": (vesin, "cuda", "vesin"),
    "nvalchemi": (nvalchemi, "cpu", "nvalchemi-toolkit-ops"),
    "nvalchemi, device": (nvalchemi, "cuda", "nvalchemi-toolkit-ops"),
}
"""By name: what makes it, where it searches, its distribution."""


def tensor(array: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """On the model's device."""
    found = array if torch.is_tensor(array) else torch.from_numpy(np.ascontiguousarray(array))
    if found.dtype == torch.uint64:  # vesin's, for which torch has next to nothing
        found = found.view(torch.int64)
    return found.to(device, dtype)


def listed(search: Search, now: Snapshot, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What a list keeps of a search, as `Pairs` does."""
    sender, receiver, units = search()
    index = torch.stack([tensor(x, device, torch.int64) for x in (sender, receiver)])
    cells = tensor(units, device, torch.float64)
    return index, cells, cells @ tensor(now.cell, device, torch.float64)


def pairs_of(search: Search, now: Snapshot) -> Any:
    """[pairs, 5], sorted; without those at the cutoff."""
    cpu = torch.device("cpu")
    sender, receiver, units = (tensor(x, cpu, torch.int64).numpy() for x in search())
    between = now.positions[receiver] - now.positions[sender] + units @ now.cell
    inside = np.linalg.norm(between, axis=1) < CUTOFF + SKIN - AT_CUTOFF
    rows = np.column_stack([sender, receiver, units])[inside]
    return rows[np.lexsort(rows.T[::-1])]


def searches(now: Snapshot, device: torch.device) -> dict[str, Search]:
    """Those that are there and find what matscipy finds."""
    found, expected = {}, pairs_of(matscipy(now, device), now)
    for name, (make, where, distribution) in WAYS.items():
        if where == "cuda" and device.type != "cuda":
            continue
        try:
            search = make(now, torch.device(where))
            same = np.array_equal(pairs_of(search, now), expected)
        except Exception as error:  # a reason is a result, too
            reason = str(error).strip().partition("\n")[0]
            print(f"  {name:18} -: {type(error).__name__}: {reason[:160]}")
            continue
        if not same:
            print(f"  {name:18} -: it finds other pairs")
            continue
        found[f"{name} {version(distribution)}"] = search
    return found


def timed(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, Spread]:
    """Seconds of each, in turns."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    clock = time.perf_counter if on_gpu else time.process_time
    times: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(WARM_UP + ROUNDS):
        for name in list(calls) if n % 2 == 0 else reversed(list(calls)):
            wait()
            started = clock()
            calls[name]()
            wait()
            if n >= WARM_UP:
                times[name].append(clock() - started)
    return {name: Spread.of(found) for name, found in times.items()}


def main(sizes: str = "64,1000,4096", place: str = "cpu") -> None:
    """Print a table for each size."""
    device = torch.device(place)
    print(this_machine(place).heading)
    for number in map(int, sizes.split(",")):
        atoms = silicon(number)
        atoms.rattle(0.05, seed=0)
        now = snapshot(atoms)
        pairs = Pairs(now, CUTOFF, torch.float32, device)
        positions = torch.from_numpy(now.positions).to(device)
        edges = pairs.edges(now, positions).edge_index.shape[1]
        print(f"{len(atoms)} atoms, {pairs.number} pairs, {edges} edges; ms")
        calls: dict[str, Callable[[], object]] = {}
        for name, search in searches(now, device).items():
            calls[f"search, {name}"] = search
            calls[f"list, {name}"] = lambda search=search: listed(search, now, device)  # noqa: B023
        calls["list, ours (Pairs)"] = lambda: Pairs(now, CUTOFF, torch.float32, device)  # noqa: B023
        calls["stock MACE, every step"] = matscipy(now, device, CUTOFF)
        calls["between, ours"] = lambda: pairs.edges(now, positions)  # noqa: B023
        for name, spread in timed(calls, device).items():
            print(f"  {name:34} {milliseconds(spread)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
