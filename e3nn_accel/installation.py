"""What is changed in the classes of e3nn and MACE while something is switched on, and changed back."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from e3nn_accel._start._e3nn_accel_boot import when_imported
from e3nn_accel.active import active
from e3nn_accel.config import Config
from e3nn_accel.errors import E3nnAccelWarning

if TYPE_CHECKING:
    from e3nn_accel.hookspecs import Target
    from e3nn_accel.registry import Registry

log = logging.getLogger("e3nn_accel")


def install(config: Config, registry: Registry) -> None:
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
    for module in mace_models.PREPARING:
        _change_when_imported(f"{module}:{mace_models.PREPARES}", _gather_quickly(module))
    _change_when_imported(mace_models.EDGES, _find_edges_by_kernels)
    path = f"{mace_calculator.MODULE}:{mace_calculator.CLASS}"
    _change_when_imported(path, _reuse_neighbours)
    log.info("enabled: %s", config)


def _change_when_imported(path: str, change: Callable[[Any], None]) -> None:
    """Change a class or function ("module:Class") once its module is imported.

    Where that fails, it stays as it was, with a warning and a line in ``doctor``; strict
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


def _gather_quickly(module: str) -> Callable[[Any], None]:
    def change(prepare: Any) -> None:
        from e3nn_accel.gathers import in_preparation

        assert active.interception is not None
        active.interception.set(sys.modules[module], prepare.__name__, in_preparation(prepare))

    return change


def _find_edges_by_kernels(stock: Any) -> None:
    from e3nn_accel.edge_geometry import by_kernels

    assert active.interception is not None
    module = sys.modules[stock.__module__]
    active.interception.set(module, stock.__name__, by_kernels(stock))


def _reuse_neighbours(calculator: type) -> None:
    from e3nn_accel import compat
    from e3nn_accel.patches import mace_calculator

    assert active.dispatcher is not None
    assert active.interception is not None
    reason = compat.unknown_calculator()
    if reason:
        active.dispatcher.registry.problems[mace_calculator.CLASS] = reason
    elif not active.interception.has(calculator):
        calls = active.dispatcher.calculator_calls
        for name, method in mace_calculator.methods_for(calculator, calls).items():
            active.interception.set(calculator, name, method)


def remove() -> None:
    """Put back everything that `install` changed, and let go what was kept for it."""
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
