"""`pytest --e3nn-accel`: on from the first conftest, a header, a summary; nothing without it."""

from __future__ import annotations

from importlib.metadata import entry_points

import fresh_python
import pytest

pytestmark = pytest.mark.once

pytest_plugins = "pytester"

CONFTEST = """
import os, sys
early = "e3nn_accel" in sys.modules and sys.modules["e3nn_accel"].is_enabled()
variable = os.environ.get("E3NN_ACCEL")
"""

TEST = """
import conftest, os, torch
from e3nn import o3
linear = o3.Linear("2x0e", "2x0e")

def test_enabled():
    linear(torch.ones(3, 2))
    import e3nn_accel
    assert e3nn_accel.is_enabled()
    assert conftest.early
    assert conftest.variable == {variable!r}
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest in a process of its own, with the plugin loaded as an installed one is."""
    for name in ("E3NN_ACCEL", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(fresh_python.SOURCE))
    pytester.makeconftest(CONFTEST)
    installed = entry_points(group="pytest11", name="e3nn_accel")
    plugin = () if installed else ("-p", "e3nn_accel.pytest_plugin")

    def run(*arguments):
        return pytester.runpytest_subprocess(*plugin, "-p", "no:cacheprovider", *arguments)

    return run


@pytest.mark.parametrize(
    ("flag", "variable", "header"),
    [("--e3nn-accel", "1", "enabled"), ("--e3nn-accel=strict", "strict", "strict")],
)
def test_flag(run, pytester, flag, variable, header):
    path = pytester.makepyfile(TEST.format(variable=variable))
    result = run(flag, path)  # the path right after the flag is not its value
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"e3nn_accel: *{header}", "*= e3nn_accel =*", "*Linear*"])


def test_flag_in_the_configuration_file(run, pytester):
    pytester.makeini("[pytest]\naddopts = --e3nn-accel")
    pytester.makepyfile("import conftest\ndef test_enabled(): assert conftest.early")
    run().assert_outcomes(passed=1)


def test_unknown_value(run, pytester):
    pytester.makepyfile("def test_nothing(): pass")
    assert run("--e3nn-accel=fast").ret == pytest.ExitCode.USAGE_ERROR


def test_nothing_without_the_flag(run, pytester):
    pytester.makepyfile(
        """
        import conftest, sys

        def test_nothing():
            assert not conftest.early
            assert conftest.variable is None
            heavy = {"torch", "e3nn", "e3nn_accel.cli"} & set(sys.modules)
            assert not heavy
        """
    )
    result = run()
    result.assert_outcomes(passed=1)
    assert "e3nn_accel" not in result.stdout.str().replace("e3nn_accel-", "").split("collected")[1]


def test_workers_hand_their_report_over(run, pytester):
    pytest.importorskip("xdist")
    pytester.makepyfile(TEST.format(variable="1"))
    result = run("--e3nn-accel", "-n", "1")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*= e3nn_accel =*", "[[]gw0[]]*", "*Linear*"])


def test_process_is_left_as_it_was(pytester, monkeypatch):
    """In-process runs (pytest.main) don't leave the accelerator on."""
    import e3nn_accel

    monkeypatch.setenv("E3NN_ACCEL", "0")
    was_enabled = e3nn_accel.is_enabled()
    pytester.makepyfile(
        """
        import os

        def test_on():
            import e3nn_accel
            assert e3nn_accel.is_enabled()
            assert os.environ["E3NN_ACCEL"] == "1"
        """
    )
    installed = entry_points(group="pytest11", name="e3nn_accel")
    plugin = () if installed else ("-p", "e3nn_accel.pytest_plugin")
    pytester.runpytest_inprocess(*plugin, "--e3nn-accel").assert_outcomes(passed=1)
    import os

    assert os.environ["E3NN_ACCEL"] == "0"
    assert e3nn_accel.is_enabled() == was_enabled
