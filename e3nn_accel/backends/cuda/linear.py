"""``o3.Linear`` by the kernels of the species-indexed linear, with a single matrix: all irreps in one launch.

Rows are read and written mul_ir, where torch's matrix products have them transposed before and
after.
"""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.indexed_linear_launch import IndexedLinearKernels, OneCall
from e3nn_accel.backends.cuda.indexed_linear_layout import too_early
from e3nn_accel.backends.cuda.indexed_linear_tables import MatrixPaths
from e3nn_accel.descriptor import LinearDescriptor, dim_of
from e3nn_accel.layout import flat, flat_rows, unflat
from e3nn_accel.ops.weighted import weighted
from e3nn_accel.plan import Plan, PlanContext, Refusal


def plan(d: LinearDescriptor, context: PlanContext) -> Plan | Refusal:
    """Kernels for one linear; or why there are none."""
    paths = too_early(context) or MatrixPaths.of_linear(d)
    if isinstance(paths, str):
        return Refusal("cuda", paths)
    call = OneCall(IndexedLinearKernels(paths, str(d), context))
    dim_in = dim_of(d.irreps_in)

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        leading = x.shape[:-1]
        out = weighted(flat_rows(x, leading, dim_in), flat(weight), call)
        if d.bias_numel:
            out = out + _row_of(bias, d)
        return unflat(out, leading)

    return Plan("cuda", d, "all irreps in one kernel", run, call.kernels.programs())


def _row_of(bias: torch.Tensor, d: LinearDescriptor) -> torch.Tensor:
    """Biases where their scalars are in a row of the output, zero elsewhere."""
    biased = [p for p in d.paths if p.i_in == -1 and 0 not in p.path_shape]
    sizes = [p.path_shape[0] for p in biased]
    parts = dict(zip([p.i_out for p in biased], bias.reshape(-1).split(sizes), strict=True))
    pieces = [
        parts[o] if o in parts else bias.new_zeros(block.dim)
        for o, block in enumerate(d.irreps_out)
    ]
    return torch.cat(pieces)
