"""Check the installation, line by line; plugins add their own lines.

Each line is ok, warn or fail, with advice where it isn't ok. Ends with exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from e3nn_accel.cli.arguments import add_json, without_warnings
from e3nn_accel.cli.tables import Table, progress, show, show_json

if TYPE_CHECKING:
    from e3nn_accel.hookspecs import HealthCheck

HELP = "check the installation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only ``--json``."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run every check."""
    from e3nn_accel.health import CHECKS, registry

    with without_warnings(), progress("checking", quiet=args.json) as step:
        # The built-in checks even if their plugin is blocked: doctor is what tells that.
        checks = list(dict.fromkeys([*CHECKS, *registry().health_checks()]))
        results = []
        for check in checks:
            step(check.name)
            results.append(_result(check))
    failed = sum(result["status"] == "fail" for result in results)
    if args.json:
        show_json({"ok": not failed, "checks": results})
        return int(failed > 0)
    rows = [(r["status"], r["check"], r["found"]) for r in results]
    show(Table(("", "check", "found"), rows))
    for result in results:
        if result["advice"]:
            show(f"{result['check']}: {result['advice']}")
    show(f"{failed} of {len(results)} checks failed" if failed else "nothing failed")
    return int(failed > 0)


def _result(check: HealthCheck) -> dict[str, str]:
    """One check; one that raises has failed."""
    status: str
    try:
        status, found = check.run()
    except Exception as error:
        status, found = "fail", f"{type(error).__name__}: {error}"
    advice = "" if status == "ok" else check.advice
    return {"check": check.name, "status": status, "found": found, "advice": advice}
