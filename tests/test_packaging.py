"""The wheel, the sdist and the editable install hold everything, where it will be looked for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import fresh_python
import pytest

from e3nn_accel._version import __version__

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("patches", "kernels")

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs build"),
    pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="needs hatchling"),
]


def _call(*command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env=fresh_python.environment(PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel made from it (not from the checkout: both are proven)."""
    folder = tmp_path_factory.mktemp("dist")
    _call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A Python with nothing of this project but its wheel."""
    python = fresh_python.make(
        tmp_path_factory.mktemp("installed"), start_files=False, see_project=False
    )
    pip = (sys.executable, "-m", "pip", "--python", python.executable)
    _call(*pip, "install", "--no-deps", wheel)
    return python


def _sources(folder: str) -> list[str]:
    """The files of the checkout that belong to a folder, relative to the checkout."""
    return [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "site-packages"} & set(path.parts)
    ]


def test_checkout_has_relative_links():
    for name in LINKED:
        assert os.readlink(ROOT / "e3nn_accel" / name) == f"../{name}"
        assert (ROOT / name / "__init__.py").is_file()
    for name in fresh_python.START_FILES:
        link = ROOT / "e3nn_accel" / "_start" / "site-packages" / name
        assert os.readlink(link) == f"../{name}"


def test_wheel_has_every_source(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    expected = _sources("e3nn_accel")
    for folder in LINKED:  # rglob does not enter links
        expected += [f"e3nn_accel/{name}" for name in _sources(folder)]
    assert "e3nn_accel/patches/__init__.py" in expected
    assert "e3nn_accel/py.typed" in expected
    assert not set(expected) - set(names)
    assert len(names) == len(set(names))


def test_wheel_has_nothing_else(wheel):
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert top == {
        "e3nn_accel",
        f"e3nn_accel-{__version__}.dist-info",
        *fresh_python.START_FILES,
    }


def test_start_files_are_the_ones_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        for name in fresh_python.START_FILES:
            assert archive.read(name) == archive.read(f"e3nn_accel/_start/{name}")


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = f"e3nn_accel-{__version__}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert "e3nn-accel = e3nn_accel.cli:main" in entry_points
    assert "[pytest11]\ne3nn_accel = e3nn_accel.pytest_plugin" in entry_points
    assert f"\nVersion: {__version__}\n" in metadata
    for extra in ("cuda12", "cuda13", "mace", "cli", "test"):
        assert f"\nProvides-Extra: {extra}\n" in metadata


def test_sdist_can_be_worked_on(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = ["pyproject.toml", "README.md", "LICENSE", "Makefile", "CHANGELOG.md"]
    expected += ["CONTRIBUTING.md", "CITATION.cff"]
    expected += _sources("tests") + _sources("e3nn_accel")
    expected += [f"e3nn_accel/{name}" for folder in LINKED for name in _sources(folder)]
    assert not set(expected) - names


IMPORTS = """
from importlib import resources
import e3nn_accel, e3nn_accel.patches, e3nn_accel.kernels
print(e3nn_accel.__file__)
print(*sorted(entry.name for entry in resources.files("e3nn_accel.kernels").iterdir()))
"""


def test_installed_wheel_is_found_and_enabled(installed):
    file, kernels = installed.run("-c", IMPORTS).stdout.splitlines()
    assert Path(file).parent == installed.site_packages / "e3nn_accel"
    assert "__init__.py" in kernels
    code = (
        "import sys; from e3nn import o3; import e3nn_accel\n"
        "print(e3nn_accel.is_enabled(), '__call__' in vars(o3.Linear))"
    )
    assert installed.run("-c", code, E3NN_ACCEL="1").stdout == "True True\n"
    assert installed.run("-c", code).stdout == "False False\n"


def test_installed_command(installed):
    command = installed.executable.parent / "e3nn-accel"
    assert _call(command, "--version") == f"e3nn_accel {__version__}\n"
    assert str(installed.site_packages) in _call(command, "hook", "status")
    show = "import os; print(os.environ['E3NN_ACCEL'])"
    assert _call(command, "run", "--", installed.executable, "-c", show) == "1\n"


def test_uninstall_leaves_nothing(wheel, tmp_path):
    python = fresh_python.make(tmp_path / "python", start_files=False, see_project=False)
    before = sorted(python.site_packages.iterdir())
    pip = (sys.executable, "-m", "pip", "--python", python.executable)
    _call(*pip, "install", "--no-deps", "--no-compile", wheel)
    assert sorted(python.site_packages.iterdir()) != before
    _call(*pip, "uninstall", "--yes", "e3nn_accel")
    assert sorted(python.site_packages.iterdir()) == before


def test_editable_install(tmp_path):
    python = fresh_python.make(tmp_path / "python", start_files=False, see_project=False)
    pip = (sys.executable, "-m", "pip", "--python", python.executable)
    _call(*pip, "install", "--no-deps", "--no-build-isolation", "--editable", ROOT)
    file, kernels = python.run("-c", IMPORTS).stdout.splitlines()
    assert Path(file) == ROOT / "e3nn_accel" / "__init__.py"
    assert "__init__.py" in kernels
    code = "import sys, e3nn_accel; print('_e3nn_accel_boot' in sys.modules)"
    assert python.run("-c", code, E3NN_ACCEL="1").stdout == "True\n"
