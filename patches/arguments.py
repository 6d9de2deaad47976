"""What every `bind` checks before a call may leave stock e3nn.

A plan takes well-formed calls only. Anything else is answered with a reason, and stock e3nn takes
the call: it then raises its own error, or handles what plans don't.
"""

from __future__ import annotations

from typing import Any

import torch

from e3nn_accel.compat import autocast_takes

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_STRIDED = torch.strided


def mismatch(x: Any, *others: Any) -> str:
    """Why these operands can't go to a plan together, or an empty string.

    All must be ordinary tensors of one floating dtype on one device, outside autocast.
    """
    if type(x) not in _PLAIN:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    dtype, device = x.dtype, x.device
    if not dtype.is_floating_point:
        return f"the input is {dtype}, not floating point"
    for other in others:
        if type(other) not in _PLAIN:
            return f"an operand is a {type(other).__name__}, not a plain tensor"
        if other.dtype != dtype:
            return f"operands of different dtypes, {dtype} and {other.dtype}"
        if other.device != device:
            return f"operands on different devices, {device} and {other.device}"
        if other.layout != _STRIDED:
            return f"an operand has layout {other.layout}"
    if x.layout != _STRIDED:
        return f"the input has layout {x.layout}"
    if autocast_takes(x):
        return "autocast is on"
    return ""


def wrong_last_dimension(name: str, x: torch.Tensor, dim: int) -> str:
    """Why stock e3nn would refuse this shape, or an empty string."""
    shape = x.shape
    if not shape or shape[-1] != dim:
        return f"{name} has shape {tuple(shape)}, wanted (..., {dim})"
    return ""
