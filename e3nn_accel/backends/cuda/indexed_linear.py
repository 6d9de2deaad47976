"""Species-indexed linears, MACE's skip connections: a plan without a wait for the device.

The torch backend has to know which species occur before it can multiply. Here rows are sorted and
tiles are counted on the device, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.indexed_linear_launch import IndexedLinearKernels, OneCall
from e3nn_accel.backends.cuda.indexed_linear_layout import products_in, too_early
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.backends.cuda.species import SpeciesSort
from e3nn_accel.backends.torch import tensor_product
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.irreps import dim_of
from e3nn_accel.layout import flat, flat_rows, unflat
from e3nn_accel.ops.weighted import weighted, weighted_gradients
from e3nn_accel.plan import Ordinary, Plan, PlanContext, Refusal, Tensors


def plan(d: TensorProductDescriptor, context: PlanContext) -> Plan | Refusal:
    """Kernels for a product that `species_linear.applies` to; or why there are none."""
    paths = too_early(context) or MatrixPaths.of(d)
    if isinstance(paths, str):
        return Refusal("cuda", paths)
    kernels, sort = IndexedLinearKernels(paths, str(d), context), SpeciesSort(context)
    _, general = tensor_product.plan(d, context)
    dim1, species = dim_of(d.irreps_in1), paths.species

    def run(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if y.requires_grad and torch.is_grad_enabled():
            return general(x, y, weight)  # which species a row has is no matter of degree here
        if x.dim() == y.dim() == 2 and x.shape[0] == y.shape[0]:  # as MACE has them
            return weighted(x, flat(weight), call_of(y))
        leading = x.shape[:-1]
        if y.shape[:-1] != leading:
            leading = torch.broadcast_shapes(leading, y.shape[:-1])
        x, attrs = flat_rows(x, leading, dim1), flat_rows(y, leading, species)
        # rows that needed no change are found again by the tensor that the caller has
        call = call_of(y if y.shape[:-1] == leading else attrs)
        return unflat(weighted(x, flat(weight), call), leading)

    def run_ordinary(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        by = sort.nodes(y)
        return kernels.known_rows(x, weight, (by.attrs, by.order, by.first))

    def call_of(attrs: torch.Tensor) -> OneCall:
        """Of rows of these species, whose scalars are read where they were copied to when they were sorted."""
        by = sort.nodes(attrs)
        return OneCall(kernels, (by.attrs, by.order, by.first))

    def gradients(g: torch.Tensor, operands: Tensors, wanted: tuple[bool, ...]) -> Tensors | None:
        x, y, weight = operands
        # by species nothing of these is differentiable
        if wanted[1] or (y.requires_grad and torch.is_grad_enabled()):
            return None
        if x.dim() != 2 or y.shape[:-1] != x.shape[:-1]:
            return None
        dx, dw = weighted_gradients(g, x, flat(weight), call_of(y), (wanted[0], wanted[2]))
        return tuple(t.reshape(of.shape) for t, of in ((dx, x), (dw, weight)) if t is not None)

    rounded = kernels.rounded_to
    strategy = f"indexed linear over {species} species, sorted on the device{products_in(rounded)}"
    programs = (*kernels.programs(), sort.program)
    ordinary = Ordinary((2, 2), run_ordinary)
    return Plan("cuda", d, strategy, run, programs, gradients, rounded, ordinary=ordinary)
