"""Versions are known in one place, and what old torch lacks has a way on."""

from __future__ import annotations

import re
import threading
import types
from pathlib import Path

import pytest
import torch

import e3nn_accel
from e3nn_accel import compat

pytestmark = pytest.mark.once

PACKAGE = Path(e3nn_accel.__file__).parent
PRIVATE = re.compile(r"\btorch(\.\w+)*\._[a-zA-Z]|__version__\s*[<>]")


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
