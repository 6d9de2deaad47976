"""Run a program in this process with e3nn accelerated, just as `python` would run it.

The program gets a `__main__` of its own that stays for the rest of the process (`runpy.run_path`
puts the old one back too early for threads, atexit functions and pickling), and the variable
`E3NN_ACCEL`, so that the processes it starts are accelerated too where the start files are
installed.
"""

from __future__ import annotations

import atexit
import io
import os
import runpy
import sys
import types
import zipfile
from collections.abc import MutableMapping
from importlib.machinery import BuiltinImporter, SourceFileLoader
from typing import Any

import e3nn_accel
from e3nn_accel._start._e3nn_accel_boot import call_guarded
from e3nn_accel.cli import CommandError


def run(program: list[str], *, strict: bool = False, profile: bool = False) -> int:
    """Enable, then run `script.py args`, `-m module args` or `-c code args`.

    Args:
        program: What would follow `python` on a command line.
        strict: Raise where a module would fall back to stock e3nn.
        profile: Time every call, and print the report when the process ends.

    Returns:
        The exit code; a program that ends with `sys.exit` or an exception ends us as well.
    """
    flag, target, arguments = _parse(program)
    if flag is None and not os.path.exists(target):
        raise CommandError(f"can't open file {os.path.abspath(target)!r}: no such file")
    set_variable(os.environ, strict=strict)
    if profile:
        os.environ["E3NN_ACCEL_PROFILE"] = "1"
        atexit.register(_print_report, os.getpid())
    call_guarded(e3nn_accel.enable, strict=strict or None)
    if flag == "-m":
        _run_module(target, arguments)
    elif flag == "-c":
        _run_code(target, arguments)
    else:
        _run_path(target, arguments)
    return 0


def set_variable(environ: MutableMapping[str, str], *, strict: bool) -> None:
    """Set `E3NN_ACCEL` for a program, unless it is on already in some way (`verify`, say)."""
    if strict:
        environ["E3NN_ACCEL"] = "strict"
    elif environ.get("E3NN_ACCEL", "").strip().lower() in ("", "0", "false", "no", "off"):
        environ["E3NN_ACCEL"] = "1"


def _parse(program: list[str]) -> tuple[str | None, str, list[str]]:
    first, rest = program[0], program[1:]
    flag = first[:2] if first[:2] in ("-m", "-c") else None
    if flag is None:
        return None, first, rest
    if first[2:]:  # python takes -mmodule, too
        return flag, first[2:], rest
    if not rest:
        raise CommandError(f"argument expected for the {flag} option")
    return flag, rest[0], rest[1:]


def _run_path(path: str, arguments: list[str]) -> None:
    sys.argv[:] = [path, *arguments]
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        # A folder or an archive with a __main__.py: python puts it first on sys.path in any case.
        if not getattr(sys.flags, "safe_path", False):
            sys.path.pop(0)
        sys.path.insert(0, _as_python_shows(path))
        _run_as_main("__main__", alter_argv=False)
        return
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    full = _as_python_shows(path)
    with io.open_code(full) as file:
        source = file.read()
    main = _new_main(__file__=full, __cached__=None, __loader__=SourceFileLoader("__main__", full))
    exec(compile(source, full, "exec", dont_inherit=True), main)


def _run_module(name: str, arguments: list[str]) -> None:
    sys.argv[:] = ["-m", *arguments]  # what python shows until it has found the module
    _set_first_path(os.getcwd())
    _run_as_main(name, alter_argv=True)


def _run_code(code: str, arguments: list[str]) -> None:
    sys.argv[:] = ["-c", *arguments]
    _set_first_path("")
    main = _new_main(__loader__=BuiltinImporter)
    exec(compile(code, "<string>", "exec", dont_inherit=True), main)


def _run_as_main(name: str, *, alter_argv: bool) -> None:
    # Private, but it is the very function that the interpreter calls by name for `-m`.
    _new_main()
    runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]


def _new_main(**attributes: Any) -> dict[str, Any]:
    """Install a fresh `__main__`; its namespace."""
    main = types.ModuleType("__main__")
    if "__annotations__" in vars(sys.modules["__main__"]):  # depends on the version of Python
        attributes["__annotations__"] = {}
    vars(main).update(__builtins__=sys.modules["builtins"], **attributes)
    sys.modules["__main__"] = main
    return vars(main)


def _set_first_path(folder: str) -> None:
    # With -P or PYTHONSAFEPATH python has put nothing there, and neither do we.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder


def _as_python_shows(path: str) -> str:
    return os.path.join(os.getcwd(), path)  # absolute, not normalised


def _print_report(pid: int) -> None:
    if os.getpid() == pid:  # not in a fork that leaves through our exit functions
        print(e3nn_accel.report(), file=sys.stderr)
