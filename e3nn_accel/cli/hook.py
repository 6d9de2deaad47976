"""Show, install or remove the start files that make `E3NN_ACCEL=1 python anything.py` work.

They are three small files at the root of site-packages, which pip puts there with the package. The
one line that Python reads when it starts does nothing unless the variable E3NN_ACCEL is set.
`status` ends with exit code 1 where they are missing.
"""

from __future__ import annotations

import argparse
import site
import sys
import sysconfig
from importlib import resources
from pathlib import Path

from e3nn_accel.cli import CommandError

HELP = "show, install or remove the start files behind E3NN_ACCEL=1"

START_FILES = ("_e3nn_accel_boot.py", "e3nn_accel.pth", "e3nn_accel.start")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action."""
    parser.add_argument("action", choices=("status", "install", "remove"))


def run(args: argparse.Namespace) -> int:
    """Do it, for the Python that runs this command."""
    print(f"python        {sys.executable} ({sys.version.split()[0]})")
    found = installed_at()
    if args.action == "status":
        return _status(found)
    if args.action == "install":
        return _install(found or Path(sysconfig.get_path("purelib")))
    return _remove(found)


def installed_at() -> Path | None:
    """The folder whose start files this Python reads, or None."""
    folders = [*site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    needed = ("_e3nn_accel_boot.py", _read_by_this_python())
    for folder in map(Path, folders):
        if all((folder / name).is_file() for name in needed):
            return folder
    return None


def _read_by_this_python() -> str:
    return "e3nn_accel.start" if sys.version_info >= (3, 15) else "e3nn_accel.pth"


def _source(name: str) -> str:
    return (resources.files("e3nn_accel") / "_start" / name).read_text(encoding="utf-8")


def _status(found: Path | None) -> int:
    if found is None:
        print("start files   not installed: E3NN_ACCEL=1 has no effect on this Python")
        print("              'e3nn-accel hook install' installs them")
        return 1
    print(f"start files   {found}")
    for name in START_FILES:
        print(f"  {name:<20} {_state(found / name)}")
    return 0


def _state(path: Path) -> str:
    if not path.is_file():
        return "missing ('e3nn-accel hook install' writes it)"
    if path.read_text(encoding="utf-8") != _source(path.name):
        return "of another version ('e3nn-accel hook install' updates it)"
    return "installed"


def _install(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in START_FILES:  # the module before the line that names it
            (folder / name).write_text(_source(name), encoding="utf-8")
    except OSError as error:
        raise CommandError(
            f"can't write to {folder}: {error.strerror}. Use a virtual environment, or put "
            "'import e3nn_accel.auto' in the program, which needs no start files",
            code=1,
        ) from error
    print(f"installed     {folder}")
    print("              E3NN_ACCEL=1 now accelerates every program of this Python")
    return 0


def _remove(folder: Path | None) -> int:
    if folder is None:
        print("start files   not installed: nothing to remove")
        return 0
    try:
        for name in reversed(START_FILES):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"can't delete from {folder}: {error.strerror}", code=1) from error
    print(f"removed       {folder}")
    print("              E3NN_ACCEL=1 has no effect on this Python any more")
    return 0
