"""Wait for e3nn to be imported, then enable; until then, cost next to nothing.

Two copies of this file may run in one process: `_e3nn_accel_boot` at the root of site-packages,
which the start files name (outside the package, so that the package is not imported at start-up),
and `e3nn_accel._start._e3nn_accel_boot`, which `enable()` uses before e3nn is imported. They share
one waiter through an attribute of `sys`, the only module that both are sure to see: a module-level
variable would give each copy its own finder, and e3nn would be enabled twice. The attribute's name
ends in the version of the protocol, so that an older copy left at the root does no harm.

Nothing but `sys`, `os` and the built-in `_thread` is imported, since this may run in every Python
process of an environment; annotations are quoted for the same reason.
"""

import _thread
import os
import sys

TYPE_CHECKING = False  # `typing` itself would double the cost of this file
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_SHARED = "_e3nn_accel_waiter_1"
_OFF = ("", "0", "false", "no", "off")


class _Waiter:
    """A meta-path finder that runs callbacks after the body of a module has run.

    It finds nothing itself: for an awaited name it asks the finders after it, and has the loader
    they return tell it when the module's body is done. It leaves `sys.meta_path` when nothing is
    awaited. Callbacks run without the lock held.
    """

    def __init__(self) -> None:
        self.lock = _thread.RLock()
        self.awaited: dict[str, dict[Callable[[], None], bool | None]] = {}
        self.finding: set[tuple[str, int]] = set()
        self.executed: set[str] = set()  # body done, callbacks running: as good as imported
        self.withdraw: Callable[[], None] | None = None  # what `main` registered, once it has

    def add(self, name: str, callback: "Callable[[], None]", strict: "bool | None") -> None:
        """Call back after module `name` is imported; at once if it is."""
        with self.lock:
            self.awaited.setdefault(name, {})[callback] = strict
            if self not in sys.meta_path:
                sys.meta_path.insert(0, self)
        # Looked up after registering, so that an import that ends in between is not missed.
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if name not in self.executed and getattr(spec, "_initializing", False):
            self._watch_spec(spec, name)
            if getattr(spec, "_initializing", False):
                return
        self.fire(name)

    def discard(self, name: str, callback: "Callable[[], None]") -> None:
        """Forget a callback that has not run."""
        with self.lock:
            self.awaited.get(name, {}).pop(callback, None)
            self._leave_if_idle()

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The real spec of an awaited module, watched; None for all other names."""
        key = (name, _thread.get_ident())
        if name not in self.awaited or key in self.finding:
            return None
        self.finding.add(key)  # another hook after us may start over at the first finder
        try:
            spec = self._ask_the_others(name, path, target)
        finally:
            self.finding.discard(key)
        if spec is not None and not self._watch_loader(spec.loader, name):
            self._watch_spec(spec, name)
        return spec

    def fire(self, name: str) -> None:
        """Run the callbacks of a module whose body is done; each runs once."""
        with self.lock:
            if name not in sys.modules:  # not imported, or its body failed
                return
            callbacks = self.awaited.pop(name, {})
            self._leave_if_idle()
            self.executed.add(name)
        # importlib binds a submodule to its package only after this; callbacks expect `e3nn.o3`.
        package, _, child = name.rpartition(".")
        if package in sys.modules and not hasattr(sys.modules[package], child):
            setattr(sys.modules[package], child, sys.modules[name])
        try:
            for callback, strict in callbacks.items():
                call_guarded(callback, strict)
        finally:
            self.executed.discard(name)

    def _leave_if_idle(self) -> None:
        self.awaited = {name: calls for name, calls in self.awaited.items() if calls}
        if not self.awaited and self in sys.meta_path:
            sys.meta_path.remove(self)

    def _ask_the_others(
        self, name: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else finders:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec and find_spec(name, path, target)
            if spec is not None:
                return spec  # type: ignore[no-any-return]
        return None

    def _watch_loader(self, loader: "Any", name: str) -> bool:
        """Shadow `exec_module` on this one loader object; False if it can't be done.

        The loader stays the object it was (its type, get_source, get_resource_reader, is_package
        and the like), and loses the shadow when the module's body is done.
        """
        if isinstance(loader, type) or not hasattr(loader, "exec_module"):
            return False  # a loader class is shared by every module it loads
        original = loader.exec_module
        shadowed = vars(loader).get("exec_module") if hasattr(loader, "__dict__") else None

        def exec_module(module: "ModuleType") -> None:
            original(module)
            if module.__name__ != name:  # some importers share one loader among modules
                return
            if vars(loader).get("exec_module") is exec_module:
                del loader.exec_module
                if shadowed is not None:
                    loader.exec_module = shadowed
            self.fire(name)

        try:
            loader.exec_module = exec_module
        except (AttributeError, TypeError):
            return False
        return True

    def _watch_spec(self, spec: "Any", name: str) -> None:
        """For a module that is being imported already: fire when importlib marks it as done.

        Importlib clears `_initializing` when an import ends, in whichever thread that is. Waiting
        for the import's lock instead would hang, or miss, an import further up our own stack.
        """
        waiter = self
        plain: Any = type(spec)
        if plain.__module__ == __name__:
            return  # watched already

        class Watched(plain):  # type: ignore[misc]
            def __setattr__(self, attribute: str, value: object) -> None:
                object.__setattr__(self, attribute, value)
                if attribute == "_initializing" and not value:
                    object.__setattr__(self, "__class__", plain)
                    waiter.fire(name)

        Watched.__name__, Watched.__qualname__ = plain.__name__, plain.__qualname__
        spec.__class__ = Watched


def when_imported(
    callback_by_module: "Mapping[str, Callable[[], None]]", strict: "bool | None" = None
) -> "Callable[[], None]":
    """Call back after each of these modules is imported; at once for those that are.

    A module that is only partly imported (by this thread or another) is waited for. A callback
    that is already waiting for the same module is not added again.

    Args:
        callback_by_module: What to call, by the full name of the module.
        strict: Raise what a callback raises instead of warning; None: as `E3NN_ACCEL` says.

    Returns:
        A function that cancels the callbacks which have not run.
    """
    waiter = _waiter()
    for name, callback in callback_by_module.items():
        waiter.add(name, callback, strict)

    def cancel() -> None:
        for name, callback in callback_by_module.items():
            waiter.discard(name, callback)

    return cancel


def call_guarded(callback: "Callable[[], None]", strict: "bool | None" = None) -> None:
    """Call; turn an exception into a warning, so that nobody's import of e3nn fails because of us.

    Args:
        callback: What to call.
        strict: Raise instead; None: if the variable `E3NN_ACCEL` says strict.
    """
    try:
        callback()
    except Exception as error:
        if strict or (strict is None and _variable() == "strict"):
            raise
        import warnings

        errors = sys.modules.get("e3nn_accel.errors")  # absent if the package itself is broken
        category = getattr(errors, "E3nnAccelWarning", UserWarning)
        message = f"e3nn_accel stays off: {type(error).__name__}: {error}"
        warnings.warn(message, category, stacklevel=4)


def main() -> None:
    """What the start files call: if `E3NN_ACCEL` asks for it, enable once e3nn is imported."""
    if _variable() in _OFF:
        return
    waiter = _waiter()
    with waiter.lock:
        if waiter.withdraw is not None:
            return
        waiter.withdraw = lambda: None  # seen by a second `main` while the first is at work
    waiter.withdraw = when_imported({"e3nn.o3": _enable})


def withdraw() -> None:
    """Cancel what `main` has set up; for a program that calls `enable` or `disable` itself."""
    waiter: _Waiter | None = getattr(sys, _SHARED, None)
    if waiter is not None and waiter.withdraw is not None:
        waiter.withdraw()


def _enable() -> None:
    import e3nn_accel
    from e3nn_accel.config import Config

    if not e3nn_accel.is_enabled() and Config.from_env().enabled:
        e3nn_accel.enable()


def _variable() -> str:
    return os.environ.get("E3NN_ACCEL", "").strip().lower()


def _waiter() -> _Waiter:
    # dict.setdefault is atomic: two threads get the same waiter.
    waiter: _Waiter = vars(sys).setdefault(_SHARED, _Waiter())
    return waiter
