"""Which calls of a model may be captured, and of any other the reason why it runs eagerly."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from e3nn_accel import compat
from e3nn_accel.config import Config
from e3nn_accel.graphs.padding import GRAPHS, Axis, Size
from e3nn_accel.guard import program_transform

COMPUTED = frozenset(
    {"training", "compute_force", "compute_virials", "compute_stress", "compute_displacement"}
)
"""Flags of MACE's forward with which a call can be captured."""
DIFFERENTIABLE = frozenset({"positions", "shifts", "node_attrs"})
"""Inputs that may require a gradient: MACE itself marks some of them."""
_PLAIN = (torch.Tensor, torch.nn.Parameter)
NEEDED = frozenset({"positions", "node_attrs", "edge_index", "cell", "batch", "ptr"})


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
    flags = dict(_flag_defaults(forward))
    given = dict(zip(("data", *flags), args, strict=False))
    if len(args) > len(flags) + 1 or not given.keys().isdisjoint(kwargs):
        raise RunsEagerly("arguments that forward doesn't take")
    given |= kwargs
    given.pop("data", None)
    if not given.keys() <= flags.keys():
        raise RunsEagerly("arguments that forward doesn't take")
    flags |= given
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


def check_process(device: torch.device) -> None:
    """Raise `RunsEagerly` where nothing can be captured now, whatever the call."""
    reason = program_transform()
    if not reason and not torch.is_grad_enabled():
        reason = "gradients are off, without which MACE has no forces"
    if not reason and torch.is_anomaly_enabled():
        reason = "anomaly detection looks at every value"
    if not reason and compat.autocast_active(device):
        reason = "autocast is on"
    if not reason and compat.dispatch_mode_active():
        reason = "a torch dispatch mode is on"
    if not reason and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        reason = "the caller captures a CUDA graph"
    if reason:
        raise RunsEagerly(reason)


def several_processes() -> bool:
    """Whether this one is of a group that trains together: captures beside NCCL haven't been shown to work."""
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def read(
    data: Any, flags: tuple[str, ...], axes: Mapping[str, Axis], device: torch.device
) -> Request:
    """What there is to copy.

    Raises:
        RunsEagerly: Something can't be.
    """
    if type(data) is not dict:
        raise RunsEagerly(f"the batch is a {type(data).__name__}, not a dict")
    if "displacement" in data:
        raise RunsEagerly("the caller gives a displacement of its own")
    inputs = {name: data[name] for name in axes if name in data}
    for name, tensor in inputs.items():
        _check_input(name, tensor, device)
    if not inputs.keys() >= NEEDED:
        raise RunsEagerly("the batch lacks inputs")
    if inputs["cell"].dim() == 3:
        axes = {**axes, "cell": GRAPHS}
    size = Size(
        inputs["positions"].shape[0],
        inputs["edge_index"].shape[-1],
        inputs["ptr"].shape[0] - 1,
    )
    if size.nodes == 0 or size.graphs < 1:
        raise RunsEagerly("the batch is empty")
    numbers = {"nodes": size.nodes, "edges": size.edges, "graphs": size.graphs}
    signature = []
    for name, tensor in inputs.items():
        axis, shape = axes[name], tensor.shape
        dim = axis.dim
        if len(shape) <= dim or shape[dim] != numbers[axis.of] * axis.each + axis.extra:
            raise RunsEagerly(f"{name} has shape {tuple(shape)} in a batch of {size}")
        signature.append((name, tensor.dtype, shape[:dim] + shape[dim + 1 :]))
    return Request(data, flags, size, tuple(signature), inputs, axes)


def _check_input(name: str, tensor: Any, device: torch.device) -> None:
    reason = ""
    if type(tensor) not in _PLAIN:
        reason = f"is a {type(tensor).__name__}, not a plain tensor"
    elif tensor.device != device:
        reason = f"is on {tensor.device}, the positions on {device}"
    elif tensor.layout != torch.strided:
        reason = f"has layout {tensor.layout}"
    elif tensor.dim() == 0:
        reason = "is a single number"
    elif tensor.is_inference():
        reason = "was made in inference mode"
    elif tensor.requires_grad and name not in DIFFERENTIABLE:
        reason = "requires a gradient"
    if reason:
        raise RunsEagerly(f"{name} {reason}")
