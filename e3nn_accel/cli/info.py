"""Show versions, the device, plugins, and the environment variables with where they come from."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Any

from e3nn_accel.cli.arguments import add_json, without_warnings
from e3nn_accel.cli.machine import this_machine
from e3nn_accel.cli.tables import Table, show, show_json
from e3nn_accel.config import VARIABLES

HELP = "versions, device, plugins and environment variables"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only ``--json``."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Show it."""
    with without_warnings():
        document = _document()
    if args.json:
        show_json(document)
        return 0
    machine = document["machine"]
    threads = f"{machine['threads']} of {machine['cores']} cores used by torch"
    facts = [
        *machine["versions"].items(),
        ("python", machine["python"]),
        ("system", machine["system"]),
        ("cpu", f"{machine['cpu']}, {threads}"),
        ("gpu", machine["gpu"] or "none"),
        ("plugins", ", ".join(document["plugins"])),
        ("blocked", ", ".join(document["blocked"]) or "none"),
        *[(f"problem in {name}", why) for name, why in document["problems"].items()],
        *[(f"backend {name}", found) for name, found in document["backends"].items()],
    ]
    width = max(len(name) for name, _ in facts)
    rows = [[v["name"], v["value"], v["source"], v["values"]] for v in document["variables"]]
    show(*[f"{name:<{width}}  {value}" for name, value in facts], "")
    show(Table(("variable", "value", "from", "possible values"), rows))
    return 0


def _document() -> dict[str, Any]:
    from e3nn_accel.health import registry

    plugins = registry()
    backends = {b.name: "available" if a.ok else a.reason for b, a in plugins.backends()}
    return {
        "machine": asdict(this_machine()),
        "plugins": plugins.plugins(),
        "blocked": list(plugins.blocked),
        "problems": plugins.problems,
        "backends": backends,
        "variables": [
            {
                "name": variable.name,
                "value": os.environ.get(variable.name) or variable.default,
                "source": "environment" if os.environ.get(variable.name) else "default",
                "values": variable.values,
                "meaning": variable.meaning,
            }
            for variable in VARIABLES
        ],
    }
