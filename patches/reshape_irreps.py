"""``mace.modules.irreps_tools.reshape_irreps``: a row of irreps as channels with all components side by side."""

from __future__ import annotations

from typing import Any

import torch

from e3nn_accel.as_planned import AsPlanned
from e3nn_accel.compat import WRITTEN_FOR
from e3nn_accel.descriptor import Descriptor, ReshapeDescriptor
from e3nn_accel.hookspecs import Call, Target, hookimpl
from e3nn_accel.patches.arguments import mismatch

CLASS = "mace.modules.irreps_tools:reshape_irreps"


def _layout(module: Any) -> tuple[Any, ...]:
    return (getattr(module, "cueq_config", None), tuple(module.muls), tuple(module.dims))


_as_planned = AsPlanned(_layout)


def bind(module: Any, tensor: torch.Tensor) -> Call | str:
    """The rows of ``reshape_irreps.forward``, or why stock MACE takes the call."""
    reason = mismatch(tensor)
    dim = sum([mul * d for mul, d in zip(module.muls, module.dims, strict=True)])
    if not reason and (tensor.dim() != 2 or tensor.shape[1] != dim):
        reason = f"rows of shape {tuple(tensor.shape)}, wanted [nodes, {dim}]"
    if not torch.compiler.is_compiling():  # which can't trace this
        reason = reason or _as_planned.change(module)
    return reason or Call("reshape_irreps", (tensor,))


@hookimpl
def e3nn_accel_targets() -> list[Target]:
    """A GPU's alone: elsewhere torch's cat is as fast."""
    return [
        Target(
            CLASS, bind, "reshape_irreps", "mace-torch", WRITTEN_FOR["mace-torch"],
            traceable=True, backend="cuda",
        )
    ]  # fmt: skip


@hookimpl
def e3nn_accel_describe(module: torch.nn.Module, operation: str) -> Descriptor | None:
    """One multiplicity, and the dimension of each irrep."""
    if operation != "reshape_irreps":
        return None
    from mace.modules.irreps_tools import reshape_irreps

    if not isinstance(module, reshape_irreps):
        return None
    _as_planned.keep(module)
    other_layout, muls, dims = _layout(module)
    if other_layout is not None:
        raise NotImplementedError("it is in cuEquivariance's layout")
    if len(set(muls)) != 1 or 0 in muls:
        raise NotImplementedError(f"multiplicities {muls}, wanted one that all irreps share")
    return ReshapeDescriptor(int(muls[0]), tuple(int(dim) for dim in dims))
