"""Third-party plugins that are installed, as far as the registry looks at them."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

from e3nn_accel.registry import GROUP


class EntryPoint:
    """What a distribution names in the entry-point group."""

    name = "meddling"

    def __init__(self, plugin: object) -> None:
        self.load = lambda: plugin


def install(plugin: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone: other plugins of this environment aren't seen."""
    found = importlib.metadata.entry_points

    def entry_points(**query: Any) -> Any:
        return [EntryPoint(plugin)] if query.get("group") == GROUP else found(**query)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
