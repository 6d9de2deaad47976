"""A plugin for e3nn_accel: one backend, for one operation.

It computes ``o3.Linear`` without biases with ``torch.einsum``, and leaves everything else to the
other backends. Read it from top to bottom; the README says how to install and try it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from e3nn_accel import hookimpl
from e3nn_accel.descriptor import Descriptor, LinearDescriptor
from e3nn_accel.irreps import dim_of
from e3nn_accel.layout import join_blocks, split_blocks, split_weights
from e3nn_accel.plan import Availability, Backend, Plan, PlanContext, Refusal


class EinsumBackend:
    """Plans what it can, and says why where it can't.

    A backend needs a name, which ``backend="einsum"`` asks for; a priority, of which the highest
    is asked first (the torch backend has 0); and the two methods below.
    """

    name = "einsum"
    priority = 10

    def available(self) -> Availability:
        """Asked once. A backend for a GPU library would import it here, and say if that fails."""
        return Availability(True)

    def plan(self, descriptor: Descriptor, context: PlanContext) -> Plan | Refusal:
        """Asked once for each kind of module, dtype and device.

        The descriptor says what is computed, without any tensor in it. The answer is a plan, or a
        refusal whose reason the user reads in ``explain``; the next backend is then asked.
        """
        reason = _why_not(descriptor, context)
        if reason:
            return Refusal(self.name, reason)
        assert isinstance(descriptor, LinearDescriptor)
        return Plan(self.name, descriptor, "one einsum a path", _linear(descriptor))


def _why_not(descriptor: Descriptor, context: PlanContext) -> str:
    if not isinstance(descriptor, LinearDescriptor):
        return "does o3.Linear only"
    if descriptor.bias_numel:
        return "does no biases"
    if not descriptor.shared_weights or descriptor.f_in is not None:
        return "does one weight for all rows only"
    if context.dtype not in (torch.float32, torch.float64):
        return f"does float32 and float64, not {context.dtype}"
    return ""


def _linear(d: LinearDescriptor) -> Callable[..., torch.Tensor]:
    """What a plan runs: the operands in, what e3nn would return out.

    Each operation has its own operands, which `e3nn_accel.plan.Plan` lists; for a linear they are
    the features, the flat weight as the module holds it, and the flat bias. Ordinary torch
    operations are differentiated by autograd as often as one likes. At its first use e3nn_accel
    compares the plan with stock e3nn, values and gradients, and drops it if they differ.
    """
    shapes = [path.path_shape for path in d.paths]

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        leading = x.shape[:-1]  # e3nn takes any number of leading dimensions
        rows = x.reshape(leading.numel(), dim_of(d.irreps_in))
        blocks = split_blocks(rows, d.irreps_in)  # [rows, mul, 2l+1] of each irrep
        out = [rows.new_zeros(len(rows), block.mul, block.ir_dim) for block in d.irreps_out]
        for path, w in zip(d.paths, split_weights(weight, shapes), strict=True):
            product = torch.einsum("zui,uw->zwi", blocks[path.i_in], w)
            out[path.i_out] = out[path.i_out] + path.path_weight * product
        return join_blocks(out, len(rows), x).reshape(*leading, dim_of(d.irreps_out))

    return run


@hookimpl
def e3nn_accel_backends() -> Iterable[Backend]:
    """The hook: e3nn_accel calls it when it is enabled. `e3nn_accel.hookspecs` lists the others."""
    yield EinsumBackend()
