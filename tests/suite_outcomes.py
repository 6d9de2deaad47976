"""Run pytest and write what became of each test: python tests/suite_outcomes.py [--mirrored N] OUT.json [pytest's].

A program of its own, for `other_suites.py`: it runs in the process of the suite, and imports nothing of ours.
With ``--mirrored`` stock e3nn has other rounding errors (`mirrored_rounding.py`).
"""

from __future__ import annotations

import json
import random
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

SEVERITY = ("passed", "skipped", "xfailed", "xpassed", "failed", "error")
"""The outcome of a test is the worst of its setup, its call and its teardown."""


class Outcomes:
    """A pytest plugin that remembers the outcome of each test, and the text of what failed."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.texts: dict[str, str] = {}

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        """Parameters that are drawn at random, as e3nn's tests do, are the same in every run."""
        random.seed(collector.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of the setup, the call or the teardown of a test."""
        outcome: str = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        elif report.failed and report.when != "call":
            outcome = "error"
        known = self.outcomes.get(report.nodeid, "passed")
        self.outcomes[report.nodeid] = max(known, outcome, key=SEVERITY.index)
        if report.failed:
            self.texts[report.nodeid] = _text(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that can't be imported, or skips itself as a whole."""
        if not report.passed:
            self.outcomes[report.nodeid] = "error" if report.failed else "skipped"
        if report.failed:
            self.texts[report.nodeid] = _text(report)


def _text(report: Any) -> str:
    captured = (f"{title}\n{content}" for title, content in report.sections)
    return "\n".join([report.longreprtext, *captured])


def main(out: str, *given: str) -> int:
    """Run pytest with these arguments, and write outcomes and texts to ``out``."""
    arguments = list(given)
    plugins: list[object] = [found := Outcomes()]
    if out == "--mirrored":
        from mirrored_rounding import MirroredRounding

        seed, out, *arguments = arguments
        plugins.append(MirroredRounding(int(seed)))
    del sys.path[0]  # the folder of our own tests, of which the suite is to see nothing
    if not entry_points(group="pytest11", name="e3nn_accel"):
        arguments = ["-p", "e3nn_accel.pytest_plugin", *arguments]
    code = pytest.main(arguments, plugins=plugins)
    Path(out).write_text(json.dumps(vars(found)))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
