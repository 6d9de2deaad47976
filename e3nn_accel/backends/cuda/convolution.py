"""Plans of the fused convolution on an NVIDIA GPU, and what has none."""

from __future__ import annotations

import torch

from e3nn_accel import edge_geometry
from e3nn_accel.backends.cuda.convolution_kernels import FusedConvolution
from e3nn_accel.backends.cuda.edge_vectors import EdgeVectors
from e3nn_accel.backends.cuda.edges import EdgeSort
from e3nn_accel.backends.cuda.group_sums import GroupSums
from e3nn_accel.backends.cuda.tensor_copies import TensorCopies
from e3nn_accel.descriptor import ConvolutionDescriptor
from e3nn_accel.graphs.copying import copiers
from e3nn_accel.groupings import adders, finders, neighbours_of
from e3nn_accel.ops.convolution import convolution, convolution_gradients
from e3nn_accel.plan import Plan, PlanContext

OF_A_POSITION = 3
"""Numbers, whose gradients are summed by the edges of an atom."""


def refusal(descriptor: ConvolutionDescriptor) -> str:
    """Why there is no kernel for this product, or an empty string."""
    d = descriptor.product
    paths = [p for p in d.paths if 0 not in p.path_shape]
    modes = {p.mode for p in paths} - {"uvu"}
    if modes:
        return f"fused convolution is for uvu instructions, this product has {', '.join(sorted(modes))}"
    if d.shared_weights and any(p.has_weight for p in paths):
        return "the weights are shared by all edges, the kernels want a row for each"
    if not paths or any(not len(p.coupling.values) or p.path_weight == 0 for p in paths):
        return "a path contributes nothing"
    return ""


def plan(descriptor: ConvolutionDescriptor, context: PlanContext) -> Plan:
    """Kernels for one product; compiled at their first use."""
    kernels = FusedConvolution(descriptor.product, context)
    edges, sums = EdgeSort(context.config), GroupSums(context.config)
    copies, vectors = TensorCopies(context.config), EdgeVectors(context.config)
    if context.device.type == "cuda":  # for all that asks for neighbours, or sums over them, there
        finders["cuda"], adders["cuda"], copiers["cuda"] = edges.find, sums, copies
        edge_geometry.kernels["cuda"] = vectors

    def run(
        x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, edge_index: torch.Tensor
    ) -> torch.Tensor:
        return convolution(x, y, w, neighbours_of(edge_index, x.shape[0], edges.find), kernels)

    def gradients(
        g: torch.Tensor, operands: tuple[torch.Tensor, ...], wanted: tuple[bool, ...]
    ) -> tuple[torch.Tensor, ...]:
        x, y, w, edge_index = operands
        of_tensors = (wanted[0], wanted[1], wanted[2])
        graph = neighbours_of(edge_index, x.shape[0], edges.find)
        found = convolution_gradients(g, x, y, w, graph, kernels, of_tensors)
        return tuple(t for t in found if t is not None)

    count = len(kernels.groups)
    strategy = f"fused kernel, {sum(len(g.terms) for g in kernels.groups)} paths" + (
        f" in {count} parts" if count > 1 else ""
    )
    of_graphs = (
        edges.program, sums.program(OF_A_POSITION, context.dtype), copies.program,
        vectors.program(context.dtype),
    )  # fmt: skip
    return Plan("cuda", descriptor, strategy, run, (*kernels.programs(), *of_graphs), gradients)
