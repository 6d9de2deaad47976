"""Show where every module of a saved model would run, and why not elsewhere.

The file is a pickle, which runs code when it is loaded: open only files that you trust.
"""

from __future__ import annotations

import argparse

from e3nn_accel.cli.arguments import add_device, add_json, readable, without_warnings
from e3nn_accel.cli.tables import Table, progress, show

HELP = "which modules of a model are accelerated, and why others are not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model."""
    parser.add_argument("model", metavar="MODEL", help="a model saved by torch.save")
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Plan every module, each checked against stock e3nn, without running the model."""
    from e3nn_accel.reporting import explain
    from e3nn_accel.structures import load_module

    with readable(), progress("planning", quiet=args.json), without_warnings():
        report = explain(load_module(args.model).to(args.device))
    if args.json:
        show(report.to_json())
        return 0
    rows = [(row.path, row.cls, row.operation, row.backend, row.detail) for row in report.rows]
    table = Table(("path", "class", "operation", "backend", "how, or why not"), rows)
    show(report.heading, table, *report.by_choice)
    return 0
