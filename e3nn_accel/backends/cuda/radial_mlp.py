"""The radial MLP: its hidden layers in one kernel, the product with the last weights in that of linears.

The output, a weight for each path, channel and edge, is nearly all of the traffic; the hidden layers
are some fifteen launches in torch and move nothing to speak of here.
"""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.indexed_linear_launch import IndexedLinearKernels, OneCall
from e3nn_accel.backends.cuda.indexed_linear_layout import products_in, too_early
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.backends.cuda.radial_mlp_kernels import RadialMlpKernels, too_large
from e3nn_accel.backends.torch.radial_mlp import activated, run_layers
from e3nn_accel.branches import beside
from e3nn_accel.descriptor import (
    LinearDescriptor,
    LinearPath,
    RadialLayer,
    RadialMlpDescriptor,
)
from e3nn_accel.irreps import MulIr
from e3nn_accel.layout import flat, flat_rows, unflat
from e3nn_accel.ops.radial_mlp import hidden_gradients, hidden_layers
from e3nn_accel.ops.weighted import weighted, weighted_gradients
from e3nn_accel.plan import Plan, PlanContext, Refusal, Tensors


def plan(d: RadialMlpDescriptor, context: PlanContext) -> Plan | Refusal:
    """Kernels for one net; or why there are none."""
    *hidden, last = d.layers
    paths = too_early(context) or MatrixPaths.of_linear(_as_linear(last))
    if isinstance(paths, str):
        return Refusal("cuda", paths)
    call = OneCall(IndexedLinearKernels(paths, str(d), context))
    left_to_torch = too_large(hidden, context) if hidden else "none"
    kernels = None if left_to_torch else RadialMlpKernels(hidden, str(d), context)
    shapes = [(layer.width_in, layer.width_out) for layer in d.layers]
    width_in = d.widths[0]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != width_in or [tuple(w.shape) for w in weights] != shapes:
            raise ValueError(f"operands of other shapes than those of {d}")
        leading = x.shape[:-1]
        x, inner = flat_rows(x, leading, width_in), weights[:-1]
        x = hidden_layers(x, inner, kernels) if kernels else run_layers(hidden, x, inner)
        out = weighted(x, flat(weights[-1]), call)
        return unflat(activated(last, out), leading)

    def gradients(g: torch.Tensor, operands: Tensors, wanted: tuple[bool, ...]) -> Tensors | None:
        x, *weights = operands
        if kernels is None or last.activation != "identity":
            return None
        leading, inner = x.shape[:-1], weights[:-1]
        x, g = flat_rows(x, leading, width_in), flat_rows(g, leading, g.shape[-1])
        found: list[torch.Tensor | None] = [None] * len(wanted)
        if any(wanted[:-1]):
            above, _ = weighted_gradients(g, x, flat(weights[-1]), call, (True, False))
            assert above is not None
            found[:-1] = hidden_gradients(above, x, inner, kernels, wanted[:-1])
        if wanted[-1]:
            activations = hidden_layers(x, inner, kernels)
            _, found[-1] = weighted_gradients(
                g, activations, flat(weights[-1]), call, (False, True)
            )
        pairs = zip(found, operands, strict=True)
        return tuple(t.reshape(of.shape) for t, of in pairs if t is not None)

    rounded = call.kernels.rounded_to
    last_one = products_in(rounded, "its products")
    strategy = f"hidden layers in one kernel, the last in another{last_one}"
    if left_to_torch:
        strategy = (
            f"the last layer in one kernel{last_one}; hidden layers in torch: {left_to_torch}"
        )
    programs = (*(kernels.programs() if kernels else ()), *call.kernels.programs())
    return Plan("cuda", d, strategy, beside(run), programs, gradients, rounded)


def _as_linear(layer: RadialLayer) -> LinearDescriptor:
    """Its product and scale, of scalars."""
    width_in, width_out = layer.width_in, layer.width_out
    path = LinearPath(0, 0, (width_in, width_out), layer.scale)
    scalars = (MulIr(width_in, 0, 1),), (MulIr(width_out, 0, 1),)
    return LinearDescriptor(*scalars, (path,), None, None, True, True)
