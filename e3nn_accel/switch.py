"""On and off: for the whole process, for a block of code, or for one model."""

from __future__ import annotations

import atexit
import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from e3nn_accel import generation
from e3nn_accel._start._e3nn_accel_boot import when_imported, withdraw
from e3nn_accel.active import active
from e3nn_accel.config import Config
from e3nn_accel.errors import AccelError, E3nnAccelWarning, FallbackWarning
from e3nn_accel.forks import ForkSafeLock
from e3nn_accel.installation import install, remove

if TYPE_CHECKING:
    import torch


log = logging.getLogger("e3nn_accel")
log.addHandler(logging.NullHandler())
Model = TypeVar("Model", bound="torch.nn.Module")

_lock = ForkSafeLock()


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
        remove()
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
                remove()
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
                install(settings, registry)
    except Exception as error:
        with _lock:
            remove()
            active.config = None
            active.models.clear()
        if config is not None and config.strict:
            raise
        log.info("enabling failed", exc_info=True)
        message = f"e3nn_accel stays off: {type(error).__name__}: {error}"
        warnings.warn(message, E3nnAccelWarning, stacklevel=2)


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
