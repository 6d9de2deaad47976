"""Which state of being switched on the code that torch.compile makes belongs to.

Traced calls read `current.name`, so that torch.compile guards on it: whenever what is accelerated
changes (enabled, disabled, other options, a plan given up), compiled code that holds operations of
ours is traced anew at its next call, and meets what holds then. A text, not a number: torch.compile
turns numbers that change into variables.
"""

from __future__ import annotations

import itertools


class _Generation:
    """The generation that holds now."""

    def __init__(self) -> None:
        self.name = "0"


current = _Generation()
_numbers = itertools.count(1)


def advance() -> None:
    """What was traced before is out of date."""
    current.name = str(next(_numbers))
