"""Run any command with e3nn accelerated in every Python process that it starts.

Sets E3NN_ACCEL=1 and hands over to the command: e3nn-accel run -- mace_run_train --config=c.yml
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping

from e3nn_accel.cli import CommandError
from e3nn_accel.cli.hook import installed_at
from e3nn_accel.cli.program import set_variable

HELP = "run a command, its child processes too, with E3NN_ACCEL=1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options and the command."""
    parser.usage = "%(prog)s [-h] [--strict] -- command ..."
    parser.add_argument(
        "--strict", action="store_true", help="raise where a module would fall back to stock e3nn"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, and its arguments")


def run(args: argparse.Namespace) -> int:
    """Replace this process by the command (Windows: start it and wait)."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise CommandError("no command given: e3nn-accel run -- command ...")
    if installed_at() is None:
        raise CommandError(
            f"the start files are not installed for {sys.executable}, so that E3NN_ACCEL=1 would "
            "have no effect. Install them ('e3nn-accel hook install'), or run a Python program "
            "with 'python -m e3nn_accel script.py', which needs none"
        )
    environ = dict(os.environ)
    set_variable(environ, strict=args.strict)
    try:
        return _hand_over(command, environ)
    except FileNotFoundError:
        raise CommandError(f"{command[0]}: command not found", code=127) from None
    except OSError as error:  # what a shell answers, too
        raise CommandError(f"{command[0]}: {error.strerror}", code=126) from None


def _hand_over(command: list[str], environ: Mapping[str, str]) -> int:
    if os.name == "nt":  # exec on Windows returns to the shell before the command has ended
        return subprocess.call(command, env=environ)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, environ)
