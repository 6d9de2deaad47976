"""Which calls of a model may be captured, and of any other the reason why it runs eagerly."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from e3nn_accel import compat
from e3nn_accel.config import Config
from e3nn_accel.graphs.padding import Axis, Size
from e3nn_accel.guard import program_transform

COMPUTED = frozenset(
    {"training", "compute_force", "compute_virials", "compute_stress", "compute_displacement"}
)
"""Flags of MACE's forward with which a call can be captured."""


class RunsEagerly(Exception):
    """A call can't be replayed; the message says why."""


Signature = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Request:
    """A call that can be captured.

    Attributes:
        data: The caller's batch.
        flags: Names of the flags that are on.
        size: Of the batch.
        signature: Names, dtypes and other dimensions of the inputs.
        inputs: Those inputs.
        axes: How each of them grows.
    """

    data: dict[str, Any]
    flags: tuple[str, ...]
    size: Size
    signature: Signature
    inputs: dict[str, torch.Tensor]
    axes: Mapping[str, Axis]


@functools.cache
def _flag_defaults(forward: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a forward after self and data, with their defaults."""
    parameters = list(inspect.signature(forward).parameters.values())[2:]
    return {p.name: p.default for p in parameters}


def left_by(config: Config) -> str:
    """Why the configuration wants every operation to be seen, or an empty string."""
    if config.verify:
        return "verify compares every operation"
    if config.profile:
        return "profiling times every operation"
    return ""


def data_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The batch that a call was given."""
    return args[0] if args else kwargs.get("data")


def device_of(data: Any) -> torch.device | None:
    """Where a batch is, as far as that can be seen."""
    positions = (
        data.get("positions") if isinstance(data, dict) else getattr(data, "positions", None)
    )
    device = getattr(positions, "device", None)
    return device if isinstance(device, torch.device) else None


def flags_of(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """Names of the flags that are on.

    Raises:
        RunsEagerly: A call with these can't be captured.
    """
    if len(args) == 1 and all(type(value) is bool for value in kwargs.values()):
        return _flags_on(forward, tuple(kwargs.items()))
    flags = _flag_defaults(forward)
    given = dict(zip(("data", *flags), args, strict=False))
    if len(args) > len(flags) + 1 or not given.keys().isdisjoint(kwargs):
        raise RunsEagerly("arguments that forward doesn't take")
    given |= kwargs
    given.pop("data", None)
    return _on(flags, given)


@functools.lru_cache(maxsize=256)
def _flags_on(forward: Callable[..., Any], given: tuple[tuple[str, bool], ...]) -> tuple[str, ...]:
    """Of a call that gives no others, as nearly all do."""
    return _on(_flag_defaults(forward), dict(given))


def _on(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    if not given.keys() <= defaults.keys():
        raise RunsEagerly("arguments that forward doesn't take")
    flags = {**defaults, **given}
    if not flags.get("compute_force") and not flags.get("training"):
        raise RunsEagerly("compute_force=False: the energy may be differentiated")
    on = tuple(name for name, value in flags.items() if value)
    for name in on:
        if name not in COMPUTED:
            raise RunsEagerly(f"{name}=True")
    return on


def flags_to_pass(on: tuple[str, ...]) -> dict[str, bool]:
    """Keyword arguments for a forward, all of whose other flags are off."""
    return {"compute_force": False, **dict.fromkeys(on, True)}


@functools.lru_cache(maxsize=64)
def type_of(device: torch.device) -> str:
    """A text, which torch writes anew at each look."""
    return device.type


def check_process(device: torch.device) -> None:
    """Raise `RunsEagerly` where nothing can be captured now, whatever the call."""
    reason = program_transform()
    if not reason and not torch.is_grad_enabled():
        reason = "gradients are off, without which MACE has no forces"
    if not reason and torch.is_anomaly_enabled():
        reason = "anomaly detection looks at every value"
    if not reason and compat.any_autocast() and compat.autocast_active(device):
        reason = "autocast is on"
    if not reason and compat.dispatch_mode_active():
        reason = "a torch dispatch mode is on"
    if not reason and type_of(device) == "cuda" and torch.cuda.is_current_stream_capturing():
        reason = "the caller captures a CUDA graph"
    if reason:
        raise RunsEagerly(reason)


def check_gradients(frozen: bool, training: bool, always: bool) -> None:
    """Raise `RunsEagerly` where a call's gradients can't be those of a replay.

    Args:
        frozen: Whether no parameter of the model requires a gradient.
        training: Whether results are to be differentiated by parameters.
        always: Whether results are to be detached, whatever parameters require (graph=1).
    """
    reason = ""
    if training and frozen:
        reason = "training=True: results are differentiated"
    elif training and threading.current_thread() is not threading.main_thread():
        # autograd's thread, waiting for this one's lock, would be waited for by another's capture
        reason = "training in a thread that isn't the main one"
    elif training and several_processes():
        reason = "training in several processes"
    elif not training and not always and not frozen:
        reason = "parameters require gradients"
    if reason:
        raise RunsEagerly(reason)


def several_processes() -> bool:
    """Whether this one is of a group that trains together: captures beside NCCL haven't been shown to work."""
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1
