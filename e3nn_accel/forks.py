"""Locks that a forked child finds free.

A data loader forks its workers whenever it likes, also while another thread is planning. That thread
doesn't exist in the child, which would wait for ever for what it held.
"""

from __future__ import annotations

import os
import threading
from weakref import WeakSet


class ForkSafeLock:
    """A `threading.RLock`; in a child process it is free but for what the forking thread itself holds."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _in_child(self) -> None:
        if self._lock.acquire(blocking=False):  # free, or held by this thread
            self._lock.release()
        else:
            self._lock = threading.RLock()


_locks: WeakSet[ForkSafeLock] = WeakSet()


def _in_child() -> None:
    for lock in list(_locks):
        lock._in_child()


if hasattr(os, "register_at_fork"):  # not on Windows, which doesn't fork
    os.register_at_fork(after_in_child=_in_child)
