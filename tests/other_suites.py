"""Other people's tests, with stock e3nn and with us: the same outcome for every test, or exit code 1.

python tests/other_suites.py e3nn/tests/o3 e3nn/tests/nn            pytest, and pytest --e3nn-accel
python tests/other_suites.py --strict mace/tests/test_modules.py    pytest, and pytest --e3nn-accel=strict
python tests/other_suites.py mace/tests -- -k "not foundations"     the rest is pytest's

`make suites` fetches the suites that fit the installed e3nn and MACE. Tests whose outcomes differ are run again
by both, twice, and those that stock e3nn itself doesn't always pass are listed but don't count. Neither do those
that fail in the same line with a stock e3nn of other rounding errors, just as small (`mirrored_rounding.py`).
Strict mode raises where something would run on stock e3nn, so tests fail in it by design: they are listed by
reason and don't count, whatever else differs does.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fresh_python

RECORDER = Path(__file__).with_name("suite_outcomes.py")
REFUSED = re.compile(r"AccelError: (?P<what>[^\n]*)\n(?:E\s*)?\s*- (?P<reason>[^\n]*)")
FAILED_AT = re.compile(r"^(?:\x1b\[[0-9;]*m)*(\S+\.py:\d+): (\w+)", re.MULTILINE)
RERUNS = 2
CONTROLS = range(6)
"""Other rounding errors: what some pass by chance another fails."""


@dataclass(frozen=True)
class Run:
    """One run of a suite: what became of each test, and the text of those that failed."""

    outcomes: dict[str, str]
    texts: dict[str, str]

    def outcome(self, test: str) -> str:
        """A test that wasn't even collected is "absent"."""
        return self.outcomes.get(test, "absent")

    def refusal(self, test: str) -> str:
        """Why strict mode raised; empty for any other failure."""
        found = REFUSED.search(self.texts.get(test, ""))
        return found["reason"].strip() if found else ""

    def failed_at(self, test: str) -> tuple[str, ...]:
        """The innermost line, and the exception's name; empty if it didn't fail."""
        found = FAILED_AT.findall(self.texts.get(test, ""))
        return found[-1] if found else ()


@dataclass(frozen=True)
class Suite:
    """Tests, the folder they are run in, and the Python that has the start files."""

    python: fresh_python.FreshPython
    root: Path
    arguments: tuple[str, ...]

    def run(self, tests: Sequence[str], *flags: str, mirrored: int | None = None) -> Run:
        """Run tests in a process of their own, which says on this terminal how it goes."""
        program = [RECORDER] if mirrored is None else [RECORDER, "--mirrored", str(mirrored)]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "outcomes.json"
            (empty := Path(folder) / "pytest.ini").write_text("[pytest]\n")
            # of its own, or none: not that of a project it lies in, by whose folder tests would be named, too
            settings = ["--rootdir", self.root, "-c", settings_of(self.root) or empty]
            done = subprocess.run(
                [self.python.executable, *program, out, "-q", "-p", "no:cacheprovider", *settings,
                 "--continue-on-collection-errors", *flags, *self.arguments, *tests],
                cwd=self.root,
                env=fresh_python.environment(),
            )  # fmt: skip
            if not out.exists():
                raise SystemExit(f"pytest ended with exit code {done.returncode} and no outcomes")
            return Run(**json.loads(out.read_text()))


def differences(stock: Run, ours: Run) -> list[str]:
    """The tests that became something else, by name."""
    tests = sorted(stock.outcomes.keys() | ours.outcomes.keys())
    return [test for test in tests if stock.outcome(test) != ours.outcome(test)]


def refusals(tests: Sequence[str], ours: Run) -> dict[str, list[str]]:
    """Those that failed because strict mode raised, by its reason."""
    found: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        if reason := ours.refusal(test):
            found[reason].append(test)
    return dict(found)


def unsteady(suite: Suite, tests: Sequence[str], first: Run, flag: str) -> set[str]:
    """Those that stock doesn't always end in the same way, or that we don't always end in another.

    What isn't run when it is asked for by name says nothing.
    """
    excused: set[str] = set()
    # a test that only one run has can't be run again by name, and is no matter of chance
    names = [test for test in tests if test in first.outcomes and "::" in test]
    for _ in range(RERUNS if names else 0):
        stock, ours = suite.run(names), suite.run(names, flag)
        excused |= {
            test
            for test in names
            if test in stock.outcomes
            and test in ours.outcomes
            and (
                stock.outcome(test) != first.outcome(test)
                or stock.outcome(test) == ours.outcome(test)
            )
        }
    return excused


def asking_for_rounding_errors(suite: Suite, tests: Sequence[str], ours: Run) -> set[str]:
    """Those that fail just so where stock e3nn has other errors."""
    left = {test for test in tests if ours.failed_at(test)}
    found: set[str] = set()
    for seed in CONTROLS:
        if left:
            control = suite.run(sorted(left), mirrored=seed)
            found |= {test for test in left if control.failed_at(test) == ours.failed_at(test)}
            left -= found
    return found


def root_of(tests: Sequence[Path]) -> Path:
    """The folder that holds ``tests``, where such suites expect to be run."""
    for folder in [tests[0], *tests[0].parents]:
        if folder.name == "tests":
            return folder.parent
    return tests[0].parent


def settings_of(root: Path) -> Path | None:
    """The file with the suite's own settings of pytest, in the order that pytest looks for it."""
    sections = {
        "pytest.ini": "", ".pytest.ini": "", "pyproject.toml": "[tool.pytest", "tox.ini": "[pytest]",
        "setup.cfg": "[tool:pytest]",
    }  # fmt: skip
    for name, section in sections.items():
        if (root / name).is_file() and section in (root / name).read_text():
            return root / name
    return None


def main(arguments: Sequence[str]) -> int:
    """Run, compare and print."""
    own, rest = list(arguments), list[str]()
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tests", nargs="+", type=lambda name: Path(name).resolve())
    parser.add_argument("--strict", action="store_true", help="raise instead of falling back")
    chosen = parser.parse_args(own)
    flag = "--e3nn-accel=strict" if chosen.strict else "--e3nn-accel"
    with tempfile.TemporaryDirectory() as folder:
        python = fresh_python.make(Path(folder) / "python", start_files=True)
        suite = Suite(python, root_of(chosen.tests), tuple(rest))
        names = [str(test.relative_to(suite.root)) for test in chosen.tests]
        stock, ours = suite.run(names), suite.run(names, flag)
        differing = differences(stock, ours)
        refused = refusals(differing, ours) if chosen.strict else {}
        left = [test for test in differing if not any(test in group for group in refused.values())]
        excused = dict.fromkeys(unsteady(suite, left, stock, flag), "not always")
        steady = [test for test in left if test not in excused]
        rounding = asking_for_rounding_errors(suite, steady, ours)
        excused |= dict.fromkeys(rounding, "so with stock e3nn that rounds in another way")
    for reason, tests in sorted(refused.items()):
        print(f"{len(tests)} refused by strict mode: {reason}", *tests, sep="\n    ")
    for test in left:
        note = f" ({excused[test]})" if test in excused else ""
        print(f"{test}: {stock.outcome(test)} -> {ours.outcome(test)}{note}")
    wrong = [test for test in left if test not in excused]
    print(f"{len(stock.outcomes)} tests, {len(differing)} differ, {len(wrong)} by our fault")
    return int(bool(wrong) or not stock.outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
