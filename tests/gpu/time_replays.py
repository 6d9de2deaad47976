"""Time replays of captured calls by themselves, and how many blocks should share a receiver's edges forward.

python tests/gpu/time_replays.py 64,1000,4096
python tests/gpu/time_replays.py 64,216,512 1,2,4,8     with so many shares instead, whatever the rule is

MACE-MP-0 medium's shape, energy and forces, float32. Milliseconds of the device for one of 20 replays in a row,
median with quartiles: what a call takes besides is the host's.
"""

from __future__ import annotations

import os
import statistics
import sys
from typing import Any
from unittest import mock

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch

import e3nn_accel
from e3nn_accel import structures
from e3nn_accel.backends.cuda import convolution_kernels
from e3nn_accel.cli.shapes import build, structure
from e3nn_accel.graphs import capture

SHAPE, CALLS, REPLAYS, ROUNDS = "mp0-medium", 8, 20, 10


def captured(model: Any, batch: dict[str, Any]) -> Any:
    """The graph of a call, replayed a few times already."""
    graphs: list[Any] = []
    replay = capture.CudaRecording.replay

    def noted(self: Any) -> None:
        graphs.append(self.graph)
        replay(self)

    with mock.patch.object(capture.CudaRecording, "replay", noted):
        for _ in range(CALLS):
            fresh = {k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}
            model(fresh, compute_force=True)
    return graphs[-1]


def milliseconds(graph: Any) -> tuple[float, float, float]:
    """Quartiles of one replay's."""
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPLAYS)
    low, median, high = statistics.quantiles(times, n=4)
    return low, median, high


def main(atoms: str = "64,1000,4096", shares: str = "") -> None:
    """Print a row for each size and number of shares."""
    device, rule = torch.device("cuda"), convolution_kernels.sums_of_shares
    print(torch.cuda.get_device_name(), SHAPE, flush=True)
    model = build(SHAPE).to(device).requires_grad_(False).eval()
    for count in map(int, atoms.split(",")):
        batch = structures.batch_of(model, structure(SHAPE, count), torch.float32)
        batch = structures.cast(batch, torch.float32, device)
        for number in [int(n) for n in shares.split(",") if n] or [0]:
            chosen = (lambda *of, n=number: n) if number else rule
            with (
                mock.patch.object(convolution_kernels, "sums_of_shares", chosen),
                e3nn_accel.enabled(),
            ):
                low, median, high = milliseconds(captured(model, batch))
            said = f"{number} shares" if number else "the rule's shares"
            print(f"{count:5} atoms, {said}: {median:.4f} [{low:.4f}-{high:.4f}]", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
