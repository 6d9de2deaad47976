"""Every example script runs as its first lines say; the plugin has tests of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBERED = sorted(EXAMPLES.glob("[0-9]*_*"))


def output_of(name: str, *arguments: str) -> str:
    """What a script prints, in a process of its own without our variables."""
    if "from mace" in (EXAMPLES / name).read_text():
        pytest.importorskip("mace")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("E3NN_ACCEL")}
    environment |= {"PYTHONPATH": str(EXAMPLES.parent), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers_of(text: str, columns: int) -> list[list[float]]:
    """The lines that are so many numbers."""
    rows = [line.split() for line in text.splitlines()]
    number = re.compile(r"-?\d+(\.\d+)?")
    return [
        [float(word) for word in row]
        for row in rows
        if len(row) == columns and all(map(number.fullmatch, row))
    ]


def fallbacks_in(report: str) -> list[str]:
    """Lines of a report about stock e3nn."""
    return [line for line in report.partition("detail")[2].splitlines() if " e3nn " in line]


def test_they_are_numbered_and_say_how_they_are_run() -> None:
    """From 1, without a gap; each script's docstring has its command, each has a test."""
    assert [path.name.partition("_")[0] for path in NUMBERED] == list("123456")
    tests = Path(__file__).read_text()
    for path in NUMBERED:
        if path.suffix == ".py":
            assert f"python examples/{path.name}" in path.read_text()
            assert f'output_of("{path.name}"' in tests


@pytest.mark.mace
def test_enable() -> None:
    """The two energies it prints agree, and every module was accelerated."""
    out = output_of("1_enable.py")
    lines = {line.split()[0]: line.split() for line in out.splitlines() if " eV " in line}
    energies = [
        float(line[next(n for n, word in enumerate(line) if word == "eV") - 1])
        for line in lines.values()
    ]
    assert len(energies) == 2
    assert abs(energies[0] - energies[1]) < 81 * 1e-8
    assert "convolution     torch" in out
    assert fallbacks_in(out) == []


@pytest.mark.mace
def test_md() -> None:
    """Energy is conserved while atoms move, and every module was accelerated."""
    out = output_of("2_md.py", "--steps", "6")
    steps = numbers_of(out, 4)
    assert [step[0] for step in steps] == [0, 1, 2, 3, 4, 5, 6]
    potential, total = ([step[n] for step in steps] for n in (1, 3))
    assert max(total) - min(total) < 0.05 * (max(potential) - min(potential))
    assert "convolution     torch" in out
    assert fallbacks_in(out) == []


@pytest.mark.slow
@pytest.mark.mace
def test_train() -> None:
    """Losses fall, and are the same with and without us (the script compares more digits)."""
    out = output_of("3_train.py", "--steps", "3")
    steps = numbers_of(out, 3)
    assert len(steps) == 3
    assert steps[-1][1] < steps[0][1]
    for _, stock, ours in steps:
        assert ours == pytest.approx(stock, rel=1e-8)
    assert "SymmetricContraction         contraction     torch" in out
    assert fallbacks_in(out) == []


def test_explain_fallbacks() -> None:
    """One layer runs by a plan, each of the others names its reason, strict names every backend's."""
    out = output_of("4_explain_fallbacks.py")
    before, after, reasons, strict = out.split("\n\n")
    assert "4 operations, 1 accelerated, 3 on e3nn" in before
    assert "1 of 4 calls accelerated" in after
    why = ("it has a forward of its own", "it has hooks", "left out by E3NN_ACCEL_SKIP or skip=")
    for part in (before, after, reasons):
        assert [reason for reason in why if reason not in part] == []
    assert "can't be accelerated" in strict
    assert "torch: needs float32 or float64, got bfloat16" in strict


@pytest.mark.slow
@pytest.mark.mace
def test_tutorial() -> None:
    """Four operations, equal to stock (the script compares them) and timed both ways."""
    out = output_of("6_tutorial.py", "--repetitions", "1")
    rows = [line.split() for line in out.splitlines()[-4:]]
    assert [row[0] for row in rows] == ["convolution", "contraction", "linear", "indexed_linear"]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 and float(row[4]) < 1e-5 for row in rows)
