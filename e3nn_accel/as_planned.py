"""What a module's forward reads of it at every call and a plan has read once: an activation, say.

Parameters and buffers are operands, read anew each time. What else a forward looks at may be assigned
later, too; a plan of what was there before would give wrong numbers then, and stock e3nn takes the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch


class AsPlanned:
    """Of the modules of one class, what they held when they were planned first."""

    def __init__(self, read: Callable[[Any], tuple[Any, ...]]) -> None:
        self._read = read
        self._held: WeakKeyDictionary[torch.nn.Module, tuple[Any, ...]] = WeakKeyDictionary()

    def keep(self, module: torch.nn.Module) -> None:
        """Remember it at the first time.

        Raises:
            NotImplementedError: Something was assigned since.
        """
        self._held.setdefault(module, self._read(module))
        reason = self.change(module)
        if reason:
            raise NotImplementedError(reason)

    def change(self, module: torch.nn.Module) -> str:
        """What to say where something was assigned since; an empty string where nothing was."""
        held = self._held.get(module)
        if held is None or held == self._read(module):
            return ""
        return "attributes of it were assigned after it was planned"
