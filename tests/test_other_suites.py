"""A suite's outcomes with and without us: what differs is found, what is unsteady or refused is told apart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fresh_python
import pytest
import torch
from e3nn import o3
from mirrored_rounding import call_of_last_bits, mirrored_call
from other_suites import Run, Suite, differences, refusals, root_of, settings_of, unsteady
from suite_outcomes import SEVERITY

pytestmark = pytest.mark.once

SUITE = """
import os
import pytest, torch
from e3nn import o3

def test_same():
    assert o3.Linear("2x0e", "2x0e")(torch.ones(3, 2)).shape == (3, 2)

def test_half():
    o3.Linear("2x0e", "2x0e").bfloat16()(torch.ones(3, 2, dtype=torch.bfloat16))

@pytest.mark.xfail
def test_expected():
    assert False
"""
DIFFERENT = """
def test_notices():
    assert os.environ.get("E3NN_ACCEL") is None
"""
BITWISE = """
def test_bitwise():
    torch.manual_seed(0)
    linear, x = o3.Linear("60x0e", "60x0e"), torch.randn(50, 60)
    assert torch.equal(linear(x), linear.forward(x))
"""


def test_differences() -> None:
    """By test, also of those that only one of the runs has."""
    stock = Run({"a": "passed", "b": "failed", "c": "xfailed", "d": "passed"}, {})
    ours = Run({"a": "passed", "b": "passed", "c": "xpassed", "e": "passed"}, {})
    assert differences(stock, ours) == ["b", "c", "d", "e"]
    assert [ours.outcome(test) for test in "bcde"] == ["passed", "xpassed", "absent", "passed"]
    assert set(SEVERITY) >= {"passed", "failed", "xfailed", "xpassed"}


def test_refusals() -> None:
    """Strict mode's errors by reason; no other error is one."""
    text = "E   e3nn_accel.errors.AccelError: Linear can't be accelerated\nE     - torch: needs float32"
    found = refusals(["a", "b", "c"], Run({}, {"a": text, "b": "E   AssertionError", "c": text}))
    assert found == {"torch: needs float32": ["a", "c"]}


def test_where_it_failed() -> None:
    """The innermost line, in colours or not; nothing for what passed."""
    text = "e3nn/util.py:7: in f\ntests/a_test.py:12: AssertionError\n\x1b[1mtests/b_test.py:3: ValueError"
    assert Run({}, {"a": text}).failed_at("a") == ("tests/b_test.py:3", "ValueError")
    assert not Run({}, {"a": text}).failed_at("b")


def test_mirrored_rounding() -> None:
    """As far from float64's result as stock e3nn, on the other side; stock's gradients; float64 untouched."""
    torch.manual_seed(0)
    linear = o3.Linear("60x0e", "60x0e").float()
    x = torch.randn(50, 60, dtype=torch.float32, requires_grad=True)
    stock, mirrored = linear(x), mirrored_call(linear, x)
    exact = linear.double()(x.double())
    error = stock - exact
    assert error.abs().max() > 0
    assert bool(((exact - mirrored - error).abs() <= 2**-23 * (exact.abs() + 1e-6)).all())
    assert not torch.equal(mirrored, stock)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (stock, mirrored)]
    assert torch.equal(*gradients)
    assert torch.equal(mirrored_call(linear, x.double()), exact)


def test_inputs_of_other_last_bits() -> None:
    """Another result for each seed, the same each time, no further from stock's than rounding; float64 untouched."""
    torch.manual_seed(0)
    linear = o3.Linear("60x0e", "60x0e").float()
    x = torch.randn(50, 60, dtype=torch.float32)
    stock = linear(x)
    found = [call_of_last_bits(seed, linear, x) for seed in (1, 2, 1)]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    for other in found:
        assert 0 < (other - stock).norm() <= 2**-22 * stock.norm()
    assert torch.equal(call_of_last_bits(1, linear.double(), x.double()), linear(x.double()))


def test_root(tmp_path: Path) -> None:
    """The folder that has ``tests``."""
    assert root_of([tmp_path / "tests" / "o3" / "linear_test.py"]) == tmp_path
    assert root_of([tmp_path / "tests"]) == tmp_path


def test_settings(tmp_path: Path) -> None:
    """The suite's own, in the order of pytest; no file without a section for it."""
    (tmp_path / "setup.cfg").write_text("[metadata]\n")
    assert settings_of(tmp_path) is None
    for name, text in (
        ("setup.cfg", "[tool:pytest]"),
        ("pyproject.toml", "[tool.pytest.ini_options]"),
    ):
        (tmp_path / name).write_text(text)
        assert settings_of(tmp_path) == tmp_path / name


def test_what_cannot_be_run_again_is_not_excused() -> None:
    """By name, from where the suite is run."""

    class Gone(Suite):
        def run(self, tests: Sequence[str], *flags: str, mirrored: int | None = None) -> Run:
            return Run({}, {})

    suite = Gone(None, Path(), ())  # type: ignore[arg-type]
    assert not unsteady(suite, ["a::b"], Run({"a::b": "passed"}, {}), "--e3nn-accel")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "flags", "code", "said"),
    [
        (SUITE, (), 0, "3 tests, 0 differ"),
        (SUITE + DIFFERENT, (), 1, "test_notices: passed -> failed"),
        (SUITE, ("--strict",), 0, "1 refused by strict mode: "),
        (
            SUITE + BITWISE,
            (),
            0,
            "passed -> failed (so with stock e3nn that rounds in another way)",
        ),
    ],
    ids=["same", "different", "strict", "rounding"],
)
def test_whole(tmp_path: Path, body: str, flags: tuple[str, ...], code: int, said: str) -> None:
    """A suite of a few tests, as from a shell, within a project whose settings aren't the suite's."""
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--unknown"\n')
    tests = tmp_path / "suite" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_it.py").write_text(body)
    program = Path(__file__).with_name("other_suites.py")
    done = subprocess.run(
        [sys.executable, program, *flags, tests],
        env={**fresh_python.environment(), "PYTHONPATH": str(fresh_python.SOURCE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout
