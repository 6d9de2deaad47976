"""Tensor products edge by edge, in every mode: a plan from kernels for its parts.

Weights that all rows share and that mix channels are left to a matrix product: the kernels make the
pairs' values z [rows * (2l+1), pairs] of every output block, torch multiplies them with W [pairs, mul].
"""

from __future__ import annotations

import torch

from e3nn_accel.availability import architecture_of
from e3nn_accel.backends.cuda import indexed_linear
from e3nn_accel.backends.cuda.tensor_product_cut import parts_of
from e3nn_accel.backends.cuda.tensor_product_launch import ProductLaunch
from e3nn_accel.backends.cuda.tensor_product_layout import Layout
from e3nn_accel.backends.cuda.tensor_product_plan import (
    PAIR_LIMIT,
    SHARED_BYTES,
    Part,
    numbered,
    pair_count,
)
from e3nn_accel.backends.cuda.tensor_product_staged import staged
from e3nn_accel.backends.torch import species_linear
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.irreps import dim_of
from e3nn_accel.layout import flat_rows
from e3nn_accel.ops.tensor_product import tensor_product
from e3nn_accel.plan import Plan, PlanContext, Refusal

PART_LIMIT = 12
"""Kernels of a product; each is compiled, and reads its inputs again."""
BYTES = {torch.float32: 4, torch.float64: 8}


def plan(d: TensorProductDescriptor, context: PlanContext) -> Plan | Refusal:
    """Kernels for one product, compiled at their first use; or why there are none."""
    if species_linear.applies(d):
        return indexed_linear.plan(d, context)
    paths = numbered(d)
    if not paths:
        return Refusal("cuda", "no path contributes anything")
    layout = Layout.of(d, paths)
    widest = max(pair_count(d, n) for n in paths)
    if widest > PAIR_LIMIT:
        return Refusal("cuda", f"a path of {widest} pairs of channels, tables hold {PAIR_LIMIT}")
    architecture = context.architecture or architecture_of(context.device)
    parts = [
        staged(part, architecture) for part in parts_of(d, layout, paths, BYTES[context.dtype])
    ]
    if len(parts) > PART_LIMIT:
        return Refusal("cuda", f"it would take {len(parts)} kernels, {PART_LIMIT} are worth it")
    needed = max(part.shared_bytes for part in parts)
    if needed > SHARED_BYTES:
        return Refusal(
            "cuda", f"a row needs {needed} bytes of shared memory, there are {SHARED_BYTES}"
        )
    launch = ProductLaunch(d, tuple(parts), layout.segments, context)

    def run(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        others = (y,) if d.shared_weights else (y, weight)
        leading = x.shape[:-1]
        if any(
            other.shape[:-1] != leading for other in others
        ):  # torch's own function takes longer than a launch
            leading = torch.broadcast_shapes(leading, *(other.shape[:-1] for other in others))
        x, y = (
            flat_rows(x, leading, dim_of(d.irreps_in1)),
            flat_rows(y, leading, dim_of(d.irreps_in2)),
        )
        w = weight.reshape(-1) if d.shared_weights else flat_rows(weight, leading, weight.shape[-1])
        # weights that matrices alone use are no operand of the kernels
        out = tensor_product(x, y, w if launch.weighted else w.detach(), launch)
        if layout.blocks:
            out = layout.mixed(out, w, x.shape[0])
        return out.reshape(*leading, dim_of(d.irreps_out))

    return Plan("cuda", d, _strategy(parts, layout), run, tuple(launch.programs()))


def _strategy(parts: list[Part], layout: Layout) -> str:
    names = {
        "ChannelPart": "a thread a channel",
        "ElementPart": "pairs of channels",
        "MixPart": "weights of rows",
        "StagedMixPart": "weights of rows by bulk copies",
    }
    kinds = list(dict.fromkeys(names[type(part).__name__] for part in parts))
    count = f", {len(parts)} kernels" if len(parts) > 1 else ""
    return (
        "row kernel, " + ", ".join(kinds) + count + (", matrix products" if layout.blocks else "")
    )
