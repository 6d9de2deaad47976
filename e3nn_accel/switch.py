"""On and off: for the whole process, for a block of code, or for one model."""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from e3nn_accel import generation
from e3nn_accel._start._e3nn_accel_boot import when_imported, withdraw
from e3nn_accel.config import Config
from e3nn_accel.errors import AccelError, E3nnAccelWarning, FallbackWarning
from e3nn_accel.forks import ForkSafeLock

if TYPE_CHECKING:
    import torch

    from e3nn_accel.dispatch import Dispatcher
    from e3nn_accel.hookspecs import Target
    from e3nn_accel.interception import Interception
    from e3nn_accel.registry import Registry

log = logging.getLogger("e3nn_accel")
log.addHandler(logging.NullHandler())
Model = TypeVar("Model", bound="torch.nn.Module")

_lock = ForkSafeLock()


class _Active:
    """What is switched on: the global configuration, single models, and what was changed for them."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.models: WeakKeyDictionary[torch.nn.Module, tuple[Config, str]] = WeakKeyDictionary()
        self.seen: WeakSet[torch.nn.Module] = WeakSet()
        self.dispatcher: Dispatcher | None = None
        self.previous: Dispatcher | None = None
        self.interception: Interception | None = None
        self.cancel: list[Callable[[], None]] = []
        self.last: Config | None = None  # of what was switched on last, for the report at exit

    def settings_of(self, module: torch.nn.Module) -> tuple[Config | None, str]:
        """The configuration that applies to a module, its model's own before the global one."""
        return self.models.get(module) or (self.config, "")


active = _Active()


def enable(**options: Any) -> None:
    """Accelerate every supported module of this process, built, loaded or yet to come.

    May be called before e3nn is imported; nothing is imported for it. A second call replaces the
    options of the first.

    Args:
        **options: Fields of `e3nn_accel.config.Config` that overrule the environment variables, for
            example ``strict=True``, ``backend="torch"``, ``skip=("Linear",)``.

    Raises:
        TypeError: An unknown option.
        ValueError: An option's value that isn't understood.
    """
    _switch(Config.from_env().replace(**{**options, "enabled": True}))


def disable() -> None:
    """Put stock e3nn back everywhere, also for models given to `accelerate`."""
    with _lock:
        active.config = None
        active.models.clear()
        generation.advance()
        _remove()
    withdraw()  # what the variable E3NN_ACCEL has set up, if e3nn isn't imported yet


def is_enabled() -> bool:
    """Whether modules are accelerated globally."""
    return active.config is not None


@contextlib.contextmanager
def enabled(**options: Any) -> Iterator[None]:
    """`enable` for a block of code; afterwards everything is as it was before."""
    before = active.config
    enable(**options)
    try:
        yield
    finally:
        if before is not None or active.models:
            _switch(before)
        else:
            disable()


def accelerate(model: Model, **options: Any) -> Model:
    """Accelerate the modules of one model, in place; needs no `enable`.

    Args:
        model: Any module; its type, parameters and forward stay as they are. Copies and pickles of
            it are stock unless e3nn_accel is enabled globally.
        **options: As for `enable`.

    Returns:
        The model itself.

    Raises:
        AccelError: In strict mode, where nothing of it is supported.
    """
    config = Config.from_env().replace(**{**options, "enabled": True})
    with _lock:
        _report_at_exit(config)
        for path, module in model.named_modules():
            active.models[module] = (config, path)
            if active.dispatcher is not None:
                active.dispatcher.runners.pop(module, None)
        generation.advance()
    _install_or_warn(config)
    interception = active.interception
    if interception is None:  # warned already
        return model
    if not any(interception.has(cls) for module in model.modules() for cls in type(module).__mro__):
        reason = f"{type(model).__name__} has no module of a supported class"
        if config.strict:
            raise AccelError("nothing to accelerate", [reason])
        warnings.warn(f"e3nn_accel: nothing to accelerate, {reason}", FallbackWarning, stacklevel=2)
    return model


def _switch(config: Config | None) -> None:
    with _lock:
        active.config = config
        generation.advance()
        if config is not None:
            _set_log_level(config)
            _report_at_exit(config)
        if active.dispatcher is not None:
            active.dispatcher.runners.clear()  # every module is planned anew at its next call
            active.dispatcher.forget_calls()
            if config is not None and config.blocked_plugins != active.dispatcher.registry.blocked:
                _remove()
        wait = active.interception is None
    if wait:  # at once where e3nn is imported
        cancel = when_imported({"e3nn.o3": _install_or_warn}, strict=True)
        with _lock:
            active.cancel.append(cancel)


def _install_or_warn(config: Config | None = None) -> None:
    """Install for this configuration, by default the global one; strict mode raises errors.

    Plugins are loaded without holding the lock: one may import what another thread is importing,
    which may be waiting here to be told that its import of e3nn is done.
    """
    config = active.config or config
    if active.interception is not None or (config is None and not active.models):
        return
    try:
        from e3nn_accel.registry import load

        settings = config or Config.from_env()
        registry = load(settings)
        with _lock:
            if active.interception is None:
                _install(settings, registry)
    except Exception as error:
        with _lock:
            _remove()
            active.config = None
            active.models.clear()
        if config is not None and config.strict:
            raise
        log.info("enabling failed", exc_info=True)
        message = f"e3nn_accel stays off: {type(error).__name__}: {error}"
        warnings.warn(message, E3nnAccelWarning, stacklevel=2)


def _install(config: Config, registry: Registry) -> None:
    """Wrap what is imported; the rest is wrapped when its module is imported."""
    from e3nn_accel.dispatch import Dispatcher
    from e3nn_accel.interception import Interception
    from e3nn_accel.patches import mace, mace_calculator, mace_models

    active.dispatcher = Dispatcher(registry, active.settings_of)
    active.interception = Interception()
    active.seen.clear()
    for target in registry.targets():
        _change_when_imported(target.path, _wrapping(target))
    _change_when_imported(f"{mace.MODULE}:{mace.CLASS}", _fuse_blocks)
    for name in mace_models.CLASSES:
        _change_when_imported(f"{mace_models.MODULE}:{name}", _replay_calls)
    path = f"{mace_calculator.MODULE}:{mace_calculator.CLASS}"
    _change_when_imported(path, _reuse_neighbours)
    log.info("enabled: %s", config)


def _change_when_imported(path: str, change: Callable[[type], None]) -> None:
    """Change a class ("module:Class") once its module is imported.

    Where that fails, the class stays as it was, with a warning and a line in ``doctor``; strict
    mode raises.
    """
    module_name, _, class_name = path.partition(":")

    def attempt() -> None:
        if active.dispatcher is None or active.interception is None:
            return
        problems = active.dispatcher.registry.problems
        cls = getattr(sys.modules[module_name], class_name, None)
        if cls is None:
            problems[path] = "there is no such class in the installed version"
            return
        try:
            change(cls)
        except Exception as error:
            active.interception.undo(cls)
            active.dispatcher.targets.pop(cls, None)
            problems[path] = f"{type(error).__name__}: {error}"
            if active.config is not None and active.config.strict:
                raise
            message = f"e3nn_accel leaves {path} as it is: {problems[path]}"
            warnings.warn(message, E3nnAccelWarning, stacklevel=2)

    active.cancel.append(when_imported({module_name: attempt}, strict=True))


def _wrapping(target: Target) -> Callable[[type], None]:
    def wrap(cls: type) -> None:
        assert active.dispatcher is not None
        assert active.interception is not None
        # one that stock e3nn may have by choice is seen when a plan has it
        seen = (lambda module: None) if target.backend else active.seen.add
        active.interception.wrap(cls, active.dispatcher.call_for(cls, target), seen)

    return wrap


def _fuse_blocks(block: type) -> None:
    from e3nn_accel.patches import mace

    assert active.dispatcher is not None
    assert active.interception is not None
    if mace.NAME in block.__dict__:
        return
    active.interception.set(block, mace.NAME, mace.fusion_property(active.dispatcher))
    unused = [*getattr(block, mace.UNUSED, []), mace.NAME]
    active.interception.set(block, mace.UNUSED, unused)


def _replay_calls(model: type) -> None:
    from e3nn_accel.patches import mace_models

    assert active.dispatcher is not None
    assert active.interception is not None
    if not active.interception.has(model):
        call = mace_models.call_for(model, active.dispatcher.model_calls)
        active.interception.set(model, "__call__", call)


def _reuse_neighbours(calculator: type) -> None:
    from e3nn_accel.patches import mace_calculator

    assert active.dispatcher is not None
    assert active.interception is not None
    reason = mace_calculator.unknown()
    if reason:
        active.dispatcher.registry.problems[mace_calculator.CLASS] = reason
    elif not active.interception.has(calculator):
        calls = active.dispatcher.calculator_calls
        for name, method in mace_calculator.methods_for(calculator, calls).items():
            active.interception.set(calculator, name, method)


def _remove() -> None:
    for cancel in active.cancel:
        cancel()
    active.cancel.clear()
    if active.interception is not None:
        active.interception.undo()
    dispatcher = active.dispatcher
    if dispatcher is not None:
        dispatcher.forget_calls()
    if dispatcher is not None and any(r.usage for r in list(dispatcher.runners.values())):
        active.previous = dispatcher
    active.interception = active.dispatcher = None


def _set_log_level(config: Config) -> None:
    if config.log is None:
        return
    log.setLevel(config.log)
    if not any(isinstance(h, logging.StreamHandler) for h in log.handlers):
        log.addHandler(logging.StreamHandler())


def _report_at_exit(config: Config) -> None:
    if active.last is None:
        atexit.register(_finish)
    active.last = config


def _finish() -> None:
    if active.last is not None:
        from e3nn_accel.reporting import at_exit

        at_exit(active.last)
