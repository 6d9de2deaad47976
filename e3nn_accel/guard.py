"""When a call must stay with stock e3nn whatever the plans: each guard answers with its reason, or nothing."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch

from e3nn_accel.compat import (
    forward_mode_active,
    functorch_transform,
    global_module_hooks,
    jit_tracing_state,
    module_hooks,
    symbolically_tracing,
)
from e3nn_accel.config import Config


def program_transform() -> str:
    """Why this call belongs to a transformation of the program, which must see stock e3nn; or an empty string."""
    if jit_tracing_state() is not None:
        return "torch.jit is tracing"
    if symbolically_tracing():
        return "torch.fx is tracing"
    if functorch_transform() is not None:
        return "a functorch transform (vmap, grad, ..) is running"
    if forward_mode_active():
        return "forward-mode differentiation is on"
    return ""


def own_behaviour(module: torch.nn.Module, stock_forward: Any) -> str:
    """What the module does besides e3nn's forward, so that a plan can't stand in for it; or an empty string."""
    if type(module).forward is not stock_forward or "forward" in module.__dict__:
        return "it has a forward of its own"
    if module_hooks(module):
        return "it has hooks, which only stock e3nn runs"
    if global_module_hooks():
        return "hooks are registered for all modules, which only stock e3nn runs"
    return ""


def left_out(config: Config, cls: type, path: str) -> str:
    """Why the configuration leaves this module alone."""
    names = [cls.__name__, f"{cls.__module__}.{cls.__qualname__}", *([path] if path else [])]

    def matches(globs: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, glob) for name in names for glob in globs)

    if matches(config.skip):
        return "left out by E3NN_ACCEL_SKIP or skip="
    if config.only and not matches(config.only):
        return "not among E3NN_ACCEL_ONLY or only="
    return ""
