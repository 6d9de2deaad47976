"""``o3.Linear`` by the kernels of the species-indexed linear, with a single matrix: all irreps in one launch.

Rows are read and written mul_ir, where torch's matrix products have them transposed before and
after. Weights of each row's own are read once, by the kernels of tensor products.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from e3nn_accel.backends.cuda import tensor_product
from e3nn_accel.backends.cuda.indexed_linear_launch import ALIKE, IndexedLinearKernels, OneCall
from e3nn_accel.backends.cuda.indexed_linear_layout import products_in, too_early
from e3nn_accel.backends.cuda.linear_forms import as_product, without_columns
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.descriptor import LinearDescriptor
from e3nn_accel.irreps import dim_of
from e3nn_accel.layout import flat, flat_rows, unflat
from e3nn_accel.ops.weighted import weighted, weighted_gradients
from e3nn_accel.plan import Ordinary, Plan, PlanContext, Refusal, Tensors


def plan(d: LinearDescriptor, context: PlanContext) -> Plan | Refusal:
    """Kernels for one linear; or why there are none."""
    if not d.shared_weights:
        return _own_weights(d, context)
    wide = without_columns(d)
    paths = too_early(context) or MatrixPaths.of_linear(wide)
    if isinstance(paths, str):
        return Refusal("cuda", paths)
    call = OneCall(IndexedLinearKernels(paths, str(d), context))
    known_rows = call.kernels.known_rows
    dim_in, own_dims = dim_of(wide.irreps_in), 1 if d.f_in is None else 2
    columns = () if d.f_in is None else (d.f_out or 1, dim_of(d.irreps_out))
    biased = wide.bias_numel > 0

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if not columns and x.dim() == 2:  # by far the most, and the host's time is a small system's
            out = weighted(x, flat(weight), call)
            return out + _row_of(bias, wide) if biased else out
        leading = x.shape[:-own_dims]
        x = x.reshape(leading.numel(), dim_in) if columns else flat_rows(x, leading, dim_in)
        out = weighted(x, flat(weight), call)
        if biased:
            out = out + _row_of(bias, wide)
        return out.reshape(*leading, *columns) if columns else unflat(out, leading)

    def run_ordinary(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return known_rows(x, weight, ALIKE)

    def gradients(g: torch.Tensor, operands: Tensors, wanted: tuple[bool, ...]) -> Tensors | None:
        x, weight, bias = operands
        if columns or (wanted[2] and biased):
            return None
        leading = x.shape[:-1]
        rows, above = flat_rows(x, leading, dim_in), flat_rows(g, leading, g.shape[-1])
        dx, dw = weighted_gradients(above, rows, flat(weight), call, (wanted[0], wanted[1]))
        return tuple(
            t.reshape(of.shape)
            for t, of in ((dx, x), (dw, weight), (bias.new_zeros(0) if wanted[2] else None, bias))
            if t is not None
        )

    rounded = call.kernels.rounded_to
    strategy = f"all irreps in one kernel{products_in(rounded)}"
    ordinary = None if biased or columns else Ordinary((2,), run_ordinary)
    programs = call.kernels.programs()
    return Plan("cuda", d, strategy, run, programs, gradients, rounded, ordinary=ordinary)


def _own_weights(d: LinearDescriptor, context: PlanContext) -> Plan | Refusal:
    """Weights of each row's own are most of what is read; a single row of them is for all rows."""
    product = tensor_product.plan(as_product(d), context)
    if isinstance(product, Refusal):
        return product
    shared = plan(replace(d, shared_weights=True), context)
    if isinstance(shared, Refusal):
        return shared
    dim_in = dim_of(d.irreps_in)

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        leading = x.shape[:-1]
        x, weight = flat_rows(x, leading, dim_in), weight.reshape(-1, weight.shape[-1])
        if weight.shape[0] == 1:
            return unflat(shared.run(x, weight, bias), leading)
        out = product.run(x, x.new_ones((x.shape[0], 1)), weight)
        return unflat(out + _row_of(bias, d) if d.bias_numel else out, leading)

    programs = (*product.programs, *shared.programs)
    strategy = f"{product.strategy}; {shared.strategy} where rows share weights"
    return Plan("cuda", d, strategy, run, programs, rounded_to=shared.rounded_to)


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
