"""Wrap and unwrap classes in place: their ``__init__``, ``__setstate__`` and ``__call__``, and nothing else.

The classes stay e3nn's own, so names imported early, instances that exist already, pickles and
isinstance are all reached or untouched; ``forward`` stays as it is, since TorchScript compiles it.
What a class had before is kept, and put back object for object.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

_ABSENT = object()
_suspended: ContextVar[bool] = ContextVar("e3nn_accel_suspended", default=False)


@contextlib.contextmanager
def suspend() -> Iterator[None]:
    """Within it every call of this thread takes stock e3nn."""
    token = _suspended.set(True)
    try:
        yield
    finally:
        _suspended.reset(token)


suspended: Callable[[], bool] = _suspended.get
"""Whether calls of this thread take stock e3nn."""


def stock_call(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``module(...)`` does without us, looked up afresh: torch.fx replaces it while tracing."""
    return torch.nn.Module.__call__(module, *args, **kwargs)


@dataclass
class Interception:
    """The attributes that were changed, with what was there before."""

    changed: list[tuple[type | ModuleType, str, Any]] = field(default_factory=list)

    def set(self, cls: type | ModuleType, name: str, value: Any) -> None:
        """Put ``value`` on the class or module, remembering what its own ``__dict__`` had."""
        before = cls.__dict__.get(name, _ABSENT)
        setattr(cls, name, value)
        self.changed.append((cls, name, before))

    def wrap(
        self,
        cls: type[torch.nn.Module],
        call: Callable[..., Any],
        seen: Callable[[torch.nn.Module], None],
    ) -> None:
        """Intercept calls of ``cls`` and hear of its instances, built or unpickled."""
        if self.has(cls):
            return
        self.set(cls, "__init__", _then(cls, "__init__", seen))
        if hasattr(cls, "__setstate__"):
            self.set(cls, "__setstate__", _then(cls, "__setstate__", seen))
        self.set(cls, "__call__", call)

    def has(self, cls: type) -> bool:
        """Whether this class is wrapped."""
        return any(changed is cls for changed, _, _ in self.changed)

    def undo(self, only: type | None = None) -> None:
        """Put everything back, or one class, last change first."""
        undone = [change for change in self.changed if only in (None, change[0])]
        self.changed = [change for change in self.changed if only not in (None, change[0])]
        for cls, name, before in reversed(undone):
            if before is _ABSENT:
                delattr(cls, name)
            else:
                setattr(cls, name, before)


def _then(cls: type, name: str, seen: Callable[[torch.nn.Module], None]) -> Callable[..., None]:
    """The class's method, followed by ``seen``; found on its bases where the class has none of its own."""
    own = cls.__dict__.get(name)
    method = own if own is not None else getattr(cls, name)

    @functools.wraps(method)
    def wrapper(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        if not suspended():  # the self-check copies modules for itself
            seen(self)

    return wrapper
