"""The pytest plugin: `pytest --e3nn-accel` runs a project's own tests with e3nn accelerated.

`--e3nn-accel=strict` raises where something would fall back to stock e3nn. Without the flag the
plugin does nothing and imports nothing: it is loaded by every pytest run of the environment.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

_PREVIOUS = pytest.StashKey["str | None"]()
_WORKER_REPORTS: pytest.StashKey[dict[str, str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag."""
    group = parser.getgroup("e3nn_accel")
    # Two options rather than one with an optional value, which would swallow the next argument:
    # `pytest --e3nn-accel tests/` has to collect tests/.
    for flag, value, text in (
        ("--e3nn-accel", "1", "accelerate e3nn in these tests"),
        ("--e3nn-accel=strict", "strict", "the same, and raise instead of falling back to e3nn"),
    ):
        group.addoption(flag, dest="e3nn_accel", action="store_const", const=value, help=text)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Enable before any conftest is imported, here and (by the variable) in child processes."""
    mode = early_config.known_args_namespace.e3nn_accel
    if mode is None:
        return
    import e3nn_accel
    from e3nn_accel.cli.program import set_variable

    early_config.stash[_PREVIOUS] = os.environ.get("E3NN_ACCEL")
    set_variable(os.environ, strict=mode == "strict")
    e3nn_accel.enable()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say that the flag is on, since it changes what is tested."""
    if _PREVIOUS not in config.stash:
        return []
    import e3nn_accel

    return [f"e3nn_accel: {e3nn_accel.__version__}, {_mode(config)}"]


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    """Show what was accelerated and what was not."""
    if _PREVIOUS not in config.stash:
        return
    import e3nn_accel

    terminalreporter.section("e3nn_accel")
    workers = config.stash.get(_WORKER_REPORTS, {})
    if not workers:
        terminalreporter.write_line(str(e3nn_accel.report()))
    for worker, text in sorted(workers.items()):
        terminalreporter.write_line(f"[{worker}]\n{text}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist: hand the report to the process that prints it."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None and _PREVIOUS in session.config.stash:
        import e3nn_accel

        output["e3nn_accel"] = str(e3nn_accel.report())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the process that started the workers: keep a worker's report for the summary."""
    text = getattr(node, "workeroutput", {}).get("e3nn_accel")
    if text is not None:
        node.config.stash.setdefault(_WORKER_REPORTS, {})[node.gateway.id] = text


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave the process as it was found."""
    if _PREVIOUS not in config.stash:
        return
    import e3nn_accel

    e3nn_accel.disable()
    previous = config.stash[_PREVIOUS]
    if previous is None:
        os.environ.pop("E3NN_ACCEL", None)
    else:
        os.environ["E3NN_ACCEL"] = previous


def _mode(config: pytest.Config) -> str:
    return "strict" if config.getoption("e3nn_accel") == "strict" else "enabled"
