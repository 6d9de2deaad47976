"""A program in two processes that differ in the variable E3NN_ACCEL alone, and the arrays that it wrote."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fresh_python
import numpy as np

from e3nn_accel.reporting import AROUND_OPERATIONS

PROGRAMS = Path(__file__).parent / "programs"
EXAMPLE = fresh_python.SOURCE / "examples" / "water_ethanol"
MODEL, STRUCTURES = EXAMPLE / "water_ethanol.model", EXAMPLE / "structures.xyz"


@dataclass(frozen=True)
class BothWays:
    """What a program came to.

    Attributes:
        stock: Its arrays by name, without us.
        ours: The same, with us.
        rows: Of our report of the process.
    """

    stock: dict[str, Any]
    ours: dict[str, Any]
    rows: list[dict[str, Any]]

    def assert_same(self, name: str, tolerance: float) -> None:
        """An array to a fraction of its largest entry, which isn't zero."""
        stock, ours = self.stock[name], self.ours[name]
        assert stock.shape == ours.shape
        largest = np.abs(stock).max()
        assert largest > 0
        error = np.abs(ours - stock).max() / largest
        assert error <= tolerance, f"{name}: {error:.1e} of {largest:.3g}, limit {tolerance:.0e}"

    def assert_planned(self, *operations: str) -> None:
        """Every call ran in a plan of ours, these operations among them."""
        rows = [row for row in self.rows if row["operation"] not in AROUND_OPERATIONS]
        assert {row["operation"] for row in rows} >= set(operations)
        assert all(row["backend"] == "torch" for row in rows), rows


def run_both(folder: Path, command: list[str | Path], written: str = "results.npz") -> BothWays:
    """Run ``python command..`` twice, each in a folder of its own.

    Args:
        folder: An empty one.
        command: Arguments of the interpreter; ``{results}`` is where arrays are to be written.
        written: Name of that file.
    """
    python = fresh_python.make(folder / "python", start_files=True)
    found = {}
    for name in ("stock", "ours"):
        place = folder / name
        place.mkdir()
        on = {"E3NN_ACCEL": "1", "E3NN_ACCEL_REPORT": str(place / "report.json")}
        done = subprocess.run(
            [str(python.executable), "-W", "ignore", *map(str, command)],
            cwd=place,
            env=fresh_python.environment(
                OMP_NUM_THREADS="1", PATH=os.environ["PATH"], **(on if name == "ours" else {})
            ),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        with np.load(place / written) as arrays:
            found[name] = dict(arrays)
    report = json.loads((folder / "ours" / "report.json").read_text())
    return BothWays(found["stock"], found["ours"], report["rows"])
