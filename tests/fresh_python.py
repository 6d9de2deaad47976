"""Throwaway Python environments that see this project, with or without the start files.

An environment is a venv without pip whose site-packages names the folders of the Python that runs
the tests. It takes a tenth of a second to make, and is exact about start files: those of the
Python that runs the tests are not read: a folder named in a .pth file is only put on the path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import e3nn_accel

SOURCE = Path(e3nn_accel.__file__).resolve().parents[1]
START_FILES = ("_e3nn_accel_boot.py", "e3nn_accel.pth", "e3nn_accel.start")


@dataclass(frozen=True)
class FreshPython:
    """An environment: its folder, its interpreter, and its site-packages."""

    folder: Path
    executable: Path
    site_packages: Path

    def run(
        self, *args: object, check: bool = True, **variables: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Run it with these arguments; variables that are None are unset."""
        done = subprocess.run(
            [str(self.executable), *map(str, args)],
            env=environment(**variables),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=240,
        )
        if check and done.returncode:
            raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def add_start_files(self) -> None:
        for name in START_FILES:
            shutil.copy(SOURCE / "e3nn_accel" / "_start" / name, self.site_packages / name)


def environment(**variables: str | None) -> dict[str, str]:
    """The environment variables of a plain shell, without ours."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("E3NN_ACCEL", "PYTHON", "PYTEST", "COV_"))
    }
    env["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn 0.4.4 reads a pickle when it is imported
    for name, value in variables.items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = value
    return env


def make(folder: Path, *, start_files: bool, see_project: bool = True) -> FreshPython:
    """Make an environment in `folder`."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    scheme = "nt" if os.name == "nt" else "posix_prefix"
    paths = sysconfig.get_paths(scheme, {"base": str(folder), "platbase": str(folder)})
    fresh = FreshPython(folder, Path(paths["scripts"]) / "python", Path(paths["purelib"]))
    seen = [str(SOURCE)] if see_project else []
    seen += [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (fresh.site_packages / "a_seen.pth").write_text("\n".join(seen) + "\n")
    if start_files:
        fresh.add_start_files()
    return fresh
