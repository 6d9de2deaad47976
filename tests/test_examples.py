"""Every example script runs as its first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.mace
def test_enable() -> None:
    """The two energies it prints agree, and every module was accelerated."""
    pytest.importorskip("mace")
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "1_enable.py"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if " eV " in line}
    energies = [
        float(line[next(n for n, word in enumerate(line) if word == "eV") - 1])
        for line in lines.values()
    ]
    assert len(energies) == 2
    assert abs(energies[0] - energies[1]) < 81 * 1e-8
    assert "convolution     torch" in done.stdout
    assert " e3nn " not in done.stdout.partition("detail")[2]
