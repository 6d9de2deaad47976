"""Faster e3nn and MACE, switched on with one line.

    import e3nn_accel.auto        # or E3NN_ACCEL=1 in the environment, or e3nn_accel.enable()

Importing this package imports neither torch nor e3nn nor CuPy, and touches no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from e3nn_accel._version import __version__

if TYPE_CHECKING:
    from e3nn_accel.config import Config as Config
    from e3nn_accel.errors import AccelError as AccelError
    from e3nn_accel.errors import E3nnAccelWarning as E3nnAccelWarning
    from e3nn_accel.errors import FallbackWarning as FallbackWarning
    from e3nn_accel.hookspecs import hookimpl as hookimpl
    from e3nn_accel.ipython import load_ipython_extension as load_ipython_extension
    from e3nn_accel.ipython import unload_ipython_extension as unload_ipython_extension
    from e3nn_accel.reporting import explain as explain
    from e3nn_accel.reporting import report as report
    from e3nn_accel.switch import accelerate as accelerate
    from e3nn_accel.switch import disable as disable
    from e3nn_accel.switch import enable as enable
    from e3nn_accel.switch import enabled as enabled
    from e3nn_accel.switch import is_enabled as is_enabled

_HOMES = {
    "Config": "config",
    "AccelError": "errors",
    "E3nnAccelWarning": "errors",
    "FallbackWarning": "errors",
    "hookimpl": "hookspecs",
    "load_ipython_extension": "ipython",
    "unload_ipython_extension": "ipython",
    "explain": "reporting",
    "report": "reporting",
    "accelerate": "switch",
    "disable": "switch",
    "enable": "switch",
    "enabled": "switch",
    "is_enabled": "switch",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
