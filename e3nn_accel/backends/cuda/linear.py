"""``o3.Linear`` by the kernels of the species-indexed linear, with a single matrix: all irreps in one launch.

Rows are read and written mul_ir, where torch's matrix products have them transposed before and
after.
"""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.indexed_linear_launch import IndexedLinearKernels, OneCall
from e3nn_accel.backends.cuda.indexed_linear_tables import MatrixPaths
from e3nn_accel.descriptor import LinearDescriptor, dim_of
from e3nn_accel.layout import flat_rows
from e3nn_accel.ops.weighted import weighted
from e3nn_accel.plan import Plan, PlanContext, Refusal


def plan(d: LinearDescriptor, context: PlanContext) -> Plan | Refusal:
    """Kernels for one linear; or why there are none."""
    paths = MatrixPaths.of_linear(d)
    if isinstance(paths, str):
        return Refusal("cuda", paths)
    call = OneCall(IndexedLinearKernels(paths, str(d), context))
    dim_in, dim_out = dim_of(d.irreps_in), dim_of(d.irreps_out)

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        leading = x.shape[:-1]
        out = weighted(flat_rows(x, leading, dim_in), weight.reshape(-1), call)
        return out.reshape(*leading, dim_out)

    return Plan("cuda", d, "all irreps in one kernel", run, call.kernels.programs())
