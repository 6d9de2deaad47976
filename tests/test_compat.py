"""Versions are known in one place, and what old torch lacks has a way on."""

from __future__ import annotations

import ast
import re
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import e3nn_accel
from e3nn_accel import compat

pytestmark = pytest.mark.once

TESTS = Path(__file__).parent
PACKAGE = Path(e3nn_accel.__file__).parent
PRIVATE = re.compile(r"\btorch(\.\w+)*\._[a-zA-Z]|__version__\s*[<>]")
VERSIONS = re.compile(r"\s*([<>]=?|[=!~]=)\s*\d+\.\d.*|\d+\.\d+\.\d+.*|\d+(\.\d+)*\.\*")
"""A specifier, a release, or a range of releases."""
ASKED = ("__version__", "version_of")


def sources() -> list[Path]:
    """Of the package with its patches, but for the place that may know."""
    return [path for path in PACKAGE.rglob("*.py") if path.name != "compat.py"]


def test_private_names_of_torch_are_in_compat() -> None:
    """Elsewhere neither torch's private functions nor comparisons of versions."""
    assert len(sources()) > 50
    assert PRIVATE.search((PACKAGE / "compat.py").read_text())
    found = [
        f"{path.name}: {line.strip()}"
        for path in sources()
        for line in path.read_text().splitlines()
        if PRIVATE.search(line.partition("#")[0])
    ]
    assert not found


def test_what_depends_on_versions_is_run_with_each() -> None:
    """noxfile.py names every file of tests, but for those that are the same with every e3nn."""
    text = (TESTS.parent / "noxfile.py").read_text()
    listed = set(
        re.findall(r'"(\w+)"', text.partition("VERSION_DEPENDENT = [")[2].partition("]")[0])
    )
    files = {path.stem.removeprefix("test_"): path.read_text() for path in TESTS.glob("test_*.py")}
    once = re.compile(r"^pytestmark = (\[[^]]*)?pytest\.mark\.once\b", re.M)
    assert len(listed) > 30
    assert listed <= set(files)
    assert {name for name, source in files.items() if not once.search(source)} <= listed


def versions_in(source: str) -> Iterator[str]:
    """What in a module's code says or compares versions; texts for readers may."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        imported = {
            *([alias.name for alias in node.names] if isinstance(node, ast.Import) else []),
            *([node.module or ""] if isinstance(node, ast.ImportFrom) else []),
        }
        if any(name.partition(".")[0] == "packaging" for name in imported):
            yield ast.unparse(node)
        if isinstance(node, ast.Constant) and VERSIONS.fullmatch(str(node.value)):
            yield repr(node.value)
        if isinstance(node, ast.Compare) and any(map(_asks_versions, ast.walk(node))):
            yield ast.unparse(node)


def _asks_versions(node: ast.AST) -> bool:
    """Whether this is a package's version; Python's own is asked for by other names."""
    if isinstance(node, ast.Attribute):
        return node.attr in ASKED
    return isinstance(node, ast.Name) and node.id in ASKED


def test_versions_are_in_compat() -> None:
    """Neither numbers of releases nor comparisons with them are elsewhere; our own version has its place."""
    assert set(versions_in((PACKAGE / "compat.py").read_text())) >= {"'>=2.4'", "'0.3.16'"}
    found = {
        f"{path.relative_to(PACKAGE)}: {said}"
        for path in sources()
        if path.name != "_version.py"
        for said in versions_in(path.read_text())
    }
    assert found == set()


@pytest.mark.parametrize(
    "code",
    [
        'Target(CLASS, bind, "linear", "mace-torch", ">=0.3.6,<0.4")',
        'KNOWN = ("0.3.16",)',
        "if mace.__version__ < known: pass",
        'if compat.version_of("e3nn") in known: pass',
        "def f():\n    from packaging.specifiers import SpecifierSet",
    ],
)
def test_a_version_would_be_noticed(code: str) -> None:
    """In the forms in which it could be said."""
    assert len(list(versions_in(code))) == 1


@pytest.mark.parametrize("imported", [False, True])
def test_exporting_before_torch_knew(imported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until torch 2.6 the question goes to torch._dynamo, which says nothing in a thread that never compiled."""
    monkeypatch.delattr(torch.compiler, "is_exporting", raising=False)
    state = threading.local()

    class Translator:
        @staticmethod
        def current_tx() -> object:
            return state.current_tx  # an AttributeError, as torch has it

    dynamo = (
        types.SimpleNamespace(tls=state, InstructionTranslator=Translator) if imported else None
    )
    monkeypatch.setitem(compat.sys.modules, "torch._dynamo.symbolic_convert", dynamo)
    assert compat.exporting() is False
    if imported:
        state.current_tx = types.SimpleNamespace(export=True)
        assert compat.exporting() is True
        state.current_tx = types.SimpleNamespace(export=False)
        assert compat.exporting() is False
