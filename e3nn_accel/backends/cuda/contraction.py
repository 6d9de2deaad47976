"""MACE's symmetric contraction: a plan from kernels for its reduced basis.

MACE's weights are mapped to that basis by a small kernel, at each call: gradients reach the original
parameters, and nothing of them is kept.
"""

from __future__ import annotations

from operator import attrgetter

import torch

from e3nn_accel.backends.cuda.contraction_basis import ChangeOfBasis
from e3nn_accel.backends.cuda.contraction_code import MOST_TERMS
from e3nn_accel.backends.cuda.contraction_kernels import FusedContraction
from e3nn_accel.backends.cuda.contraction_paths import Paths
from e3nn_accel.backends.cuda.species import SpeciesSort
from e3nn_accel.branches import early
from e3nn_accel.descriptor import ContractionDescriptor
from e3nn_accel.groupings import NodesBySpecies
from e3nn_accel.ops.change_of_basis import change_of_basis
from e3nn_accel.ops.contraction import contraction, contraction_gradients
from e3nn_accel.plan import Ordinary, Plan, PlanContext, Refusal, Tensors

MOST_PATHS = 65535
"""Blocks that a grid has in its second and third direction."""
MOST_COMPONENTS = 255
_shape = attrgetter("shape")


def plan(d: ContractionDescriptor, context: PlanContext) -> Plan | Refusal:
    """Kernels for one contraction, compiled at their first use; or why there are none."""
    paths = Paths.of(d, float(torch.finfo(context.dtype).eps))
    if not paths.paths or not d.channels:
        return Refusal("cuda", "no path contributes anything")
    kernels, sort = FusedContraction(paths, context, str(d)), SpeciesSort(context)
    terms = kernels.paths.term_count
    if terms > MOST_TERMS or paths.weights > MOST_PATHS:
        return Refusal("cuda", f"{terms} terms, tables hold {MOST_TERMS}")
    if d.components >= MOST_COMPONENTS:
        return Refusal(
            "cuda", f"{d.components} components of a channel, a table's indices are bytes"
        )
    used = [n for n, projection in enumerate(paths.projections) if projection.shape[1]]
    basis = ChangeOfBasis([paths.projections[n] for n in used], d.channels, context, str(d))
    shapes = [d.weight_shapes[n] for n in used]
    all_used = len(used) == len(paths.projections)

    def run(x: torch.Tensor, node_attrs: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        taken = weights if all_used else [weights[n] for n in used]
        if list(map(_shape, taken)) != shapes:
            raise ValueError(f"weights of other shapes than those of {d}")
        w = change_of_basis(taken, basis)
        if node_attrs.requires_grad and torch.is_grad_enabled():
            # a product that torch differentiates, by node_attrs, too; then each node has its own
            nodes = x.shape[0]
            own = (node_attrs @ w.flatten(1)).view(nodes, *w.shape[1:])
            return contraction(x, own, NodesBySpecies.each_its_own(nodes, x.device), kernels)
        return contraction(x, w, sort.nodes(node_attrs), kernels)

    def run_ordinary(
        x: torch.Tensor, node_attrs: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        taken = weights if all_used else [weights[n] for n in used]
        w = early(lambda: basis.to_basis(taken), taken)
        return kernels.forward(x, w, sort.nodes(node_attrs), None)

    def gradients(g: torch.Tensor, operands: Tensors, wanted: tuple[bool, ...]) -> Tensors | None:
        x, node_attrs, *weights = operands
        # by node_attrs nothing of these is differentiable
        if any(wanted[1:]) or (node_attrs.requires_grad and torch.is_grad_enabled()):
            return None
        w = change_of_basis([weights[n] for n in used], basis)
        dx, _ = contraction_gradients(g, x, w, sort.nodes(node_attrs), kernels, (True, False))
        assert dx is not None
        return (dx,)

    original = sum(shape[1] for shape in d.weight_shapes)
    how = "tables" if kernels.tables else "straight-line code"
    strategy = f"fused, {original} paths reduced to {paths.weights}, {how}"
    programs = (*kernels.programs(), basis.program, sort.program)
    ordinary = Ordinary((3, 2), run_ordinary)
    return Plan("cuda", d, strategy, run, programs, gradients, ordinary=ordinary)
