"""Time what a step of MACECalculator takes besides its model: processor time of one core, stock and accelerated.

python tests/time_calculator.py [--atoms 64,1000,4096] [--rounds 5] [--steps 12]

Silicon whose atoms swing as at room temperature, cutoff 6 Å, float32; a narrow model, since its calls, gradients
included, are left out. The list of pairs is made in the first steps, which aren't timed. Both take turns; milliseconds,
median with quartiles.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch

import e3nn_accel
from e3nn_accel import switch
from e3nn_accel.cli.bench_profile import WARM_UP, Steps
from e3nn_accel.cli.shapes import SHAPES, build, silicon
from e3nn_accel.interception import suspend

CUTOFF = 6.0


class Besides:
    """Seconds of a call, without those of the model within it."""

    def __init__(self, model: type) -> None:
        self._within = 0.0
        stock = model.__call__

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return stock(*args, **kwargs)
            finally:
                self._within += time.process_time() - started

        self.watching = patch.object(model, "__call__", timed)

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        self._within, started = 0.0, time.process_time()
        call()
        return time.process_time() - started - self._within


def steps_of(model: Any, atoms: Any) -> Steps:
    """A structure with a calculator of its own."""
    from mace.calculators import MACECalculator

    return Steps(MACECalculator(models=model, device="cpu", default_dtype="float32"), atoms)


def spread(seconds: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, median, high = (1e3 * t for t in statistics.quantiles(seconds, n=4, method="inclusive"))
    return f"{median:.2f} [{low:.2f}-{high:.2f}]"


def main() -> None:
    """A line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--atoms", default="64,1000,4096")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with patch.dict(SHAPES, tiny=SHAPES["tiny"]._replace(r_max=CUTOFF)):
        stock = build("tiny").requires_grad_(False).eval()
    ours = copy.deepcopy(stock)
    switch.accelerate(ours)
    for number in map(int, args.atoms.split(",")):
        atoms = silicon(number)
        ways = {"stock": steps_of(stock, atoms), "ours": steps_of(ours, atoms)}
        clock = Besides(type(stock))
        found: dict[str, list[float]] = {way: [] for way in ways}
        with clock.watching:
            for round_ in range(args.rounds + 1):
                for way, step in ways.items():
                    with suspend() if way == "stock" else nullcontext():
                        seconds = [
                            clock.seconds(step) for _ in range(args.steps if round_ else WARM_UP)
                        ]
                    found[way] += seconds if round_ else []
        print(
            f"{len(atoms)} atoms: stock {spread(found['stock'])}, ours {spread(found['ours'])} ms",
            flush=True,
        )
    for line in str(e3nn_accel.report()).splitlines():
        if "MACECalculator" in line:
            print(" ".join(line.split()))


if __name__ == "__main__":
    main()
