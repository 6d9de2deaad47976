"""Gradients that take the place of what they are gradients of, in calls that are differentiated once.

A model that isn't trained differentiates its energy itself, for forces, and frees the graph. The radial weights,
a number for each edge, path and channel, are most of what it keeps for that, and their gradient is as large
again; the kernel that computes it is the last to read them. Where it is known that nobody differentiates a second
time, it writes over them.

torch is told that they were written to: whatever else kept them for its own gradient then raises torch's error
for that instead of reading something else (`OVERWRITTEN`), and the caller starts again without.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

OVERWRITTEN = "modified by an inplace operation"
"""In the text of torch's error."""


class _OfThread(threading.local):
    once = False


_here = _OfThread()


@contextmanager
def differentiated_once() -> Iterator[None]:
    """Around calls whose graph of autograd this thread walks through once, without a graph of that."""
    before, _here.once = _here.once, True
    try:
        yield
    finally:
        _here.once = before


def may_overwrite() -> bool:
    """Whether that is so for what is computed now; asked where forward runs, as gradients have other threads."""
    return _here.once
