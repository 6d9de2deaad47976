"""The command line: `e3nn-accel`, the same as `python -m e3nn_accel`.

Its first argument is a command of the table below, or else a program to run accelerated, given as
`python` takes it. A command is a module with `HELP` (one line), `add_arguments(parser)` and
`run(args) -> exit code`, imported only when it is used.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from e3nn_accel._version import __version__

COMMANDS = {
    "info": "e3nn_accel.cli.info",
    "doctor": "e3nn_accel.cli.doctor",
    "explain": "e3nn_accel.cli.explain",
    "verify": "e3nn_accel.cli.verify",
    "bench": "e3nn_accel.cli.bench",
    "kernels": "e3nn_accel.cli.kernels",
    "run": "e3nn_accel.cli.run",
    "hook": "e3nn_accel.cli.hook",
}

_USAGE = """%(prog)s COMMAND ...
       %(prog)s [--strict] [--profile] script.py [args]
       %(prog)s [--strict] [--profile] -m module [args]
       %(prog)s [--strict] [--profile] -c code [args]"""

_EPILOG = """A script whose name is a command's is given with its folder: %(prog)s ./info
'%(prog)s COMMAND --help' describes a command."""


class CommandError(Exception):
    """A command can't do what was asked: the message for the user, and the exit code.

    Attributes:
        code: The exit code; 2 for arguments that make no sense, 1 for what failed.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or a program.

    Args:
        argv: The arguments; None: those of this process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    prog = _prog()
    try:
        if arguments and arguments[0] in COMMANDS:
            return _run_command(prog, *arguments)
        return _run_program(prog, arguments)
    except CommandError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.code


def _run_command(prog: str, name: str, *arguments: str) -> int:
    module = importlib.import_module(COMMANDS[name])
    parser = argparse.ArgumentParser(
        prog=f"{prog} {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    code: int = module.run(parser.parse_args(arguments))
    return code


def _run_program(prog: str, arguments: list[str]) -> int:
    options, program = _split(arguments)
    shows_help = bool({"-h", "--help"} & {*options}) or not arguments
    parser = _program_parser(prog, with_commands=shows_help)
    parsed = parser.parse_args(options)
    if not program:
        parser.print_help()
        return 0
    if program[0] in COMMANDS:
        parser.error(f"--strict and --profile are for programs; a script's name: ./{program[0]}")

    from e3nn_accel.cli import program as runner

    return runner.run(program, strict=parsed.strict, profile=parsed.profile)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, and the program: all that follows belongs to it."""
    for i, argument in enumerate(arguments):
        if not argument.startswith("-") or argument[:2] in ("-m", "-c"):
            return arguments[:i], arguments[i:]
    return arguments, []


def _program_parser(prog: str, with_commands: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=_USAGE,
        description=_describe_commands() if with_commands else None,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"e3nn_accel {__version__}")
    parser.add_argument(
        "--strict", action="store_true", help="raise where a module would fall back to stock e3nn"
    )
    parser.add_argument(
        "--profile", action="store_true", help="time every call and print the report at the end"
    )
    return parser


def _describe_commands() -> str:
    lines = ["Run a program with e3nn accelerated, or one of the commands", ""]
    for name, module in COMMANDS.items():
        lines.append(f"  {name:<9} {importlib.import_module(module).HELP}")
    return "\n".join(lines)


def _prog() -> str:
    is_module = Path(sys.argv[0]).parts[-2:] == ("e3nn_accel", "__main__.py")
    return "python -m e3nn_accel" if is_module else "e3nn-accel"
