"""cuEquivariance and OpenEquivariance on the same work, where they are installed.

Each function makes a callable of the work's tensors, or raises what the peer raises: a refusal is a result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from e3nn_accel.cli.node_operations import CORRELATION, NodeWork
from e3nn_accel.cli.products import Work

Call = Callable[..., torch.Tensor]


class Refused(Exception):
    """A peer that has nothing for this work."""


def cuequivariance(work: Work) -> Call:
    """The channel-wise product with gather and scatter, as MACE uses it."""
    import cuequivariance as cue
    import cuequivariance_torch as cuet
    from mace.tools.cg import O3_e3nn

    product, edge_index = work.product, work.edge_index
    if edge_index is None or product.mode != "uvu":
        raise Refused("used for fused convolutions alone")
    irreps = [cue.Irreps(O3_e3nn, t) for t in (product.irreps1, product.irreps2, product.outputs)]
    polynomial = (
        cue.descriptors.channelwise_tensor_product(*irreps)
        .flatten_coefficient_modes()
        .squeeze_modes()
        .polynomial
    )
    dtype, device = work.tensors[0].dtype, work.tensors[0].device
    module = cuet.SegmentedPolynomial(polynomial, math_dtype=dtype, method="uniform_1d").to(device)
    sender, receiver = edge_index[0].contiguous(), edge_index[1].contiguous()

    def call(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module([w, x, y], {1: sender}, {0: x}, {0: receiver})[0]
        return out

    return call


def openequivariance(work: Work) -> Call:
    """Its convolution with atomics, or its product row by row."""
    import openequivariance as oeq

    problem = _problem(oeq, work)
    if work.edge_index is None:
        module = oeq.TensorProduct(problem)
        return lambda x, y, w: module(x, y, w)
    convolution = oeq.TensorProductConv(problem, deterministic=False)
    sender, receiver = work.edge_index[0].contiguous(), work.edge_index[1].contiguous()
    return lambda x, y, w: convolution(x, y, w, receiver, sender)


def openequivariance_deterministic(work: Work) -> Call:
    """Its convolution in a fixed order, which wants sorted edges."""
    import openequivariance as oeq

    if work.edge_index is None or not work.product.is_sorted:
        raise Refused("wants edges sorted by receiver")
    convolution = oeq.TensorProductConv(_problem(oeq, work), deterministic=True)
    sender, receiver = work.edge_index[0].contiguous(), work.edge_index[1].contiguous()
    order = torch.argsort(sender)
    return lambda x, y, w: convolution(x, y, w, receiver, sender, order)


def _problem(oeq: Any, work: Work) -> Any:
    dtype = oeq.torch_to_oeq_dtype(work.tensors[0].dtype)
    module = work.module
    return oeq.TPProblem(
        module.irreps_in1,
        module.irreps_in2,
        module.irreps_out,
        work.instructions,
        shared_weights=False,
        internal_weights=False,
        irrep_dtype=dtype,
        weight_dtype=dtype,
    )


def cuequivariance_on_nodes(work: NodeWork) -> Call:
    """What MACE's converter makes of the module, in the layout that is the peer's own."""
    import cuequivariance as cue
    import cuequivariance_torch as cuet

    operation, x = work.product, work.tensors[0]
    if operation.kind in ("radial MLP", "harmonics", "radial"):
        raise Refused("MACE's converter leaves it as it is")
    here: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    if operation.kind == "contraction":
        from mace.tools.cg import O3_e3nn

        irreps = [cue.Irreps(O3_e3nn, t) for t in (operation.irreps_in, operation.irreps_out)]
        module = cuet.SymmetricContraction(
            *irreps, contraction_degree=CORRELATION, num_elements=operation.species, **here,
            layout_in=cue.ir_mul, layout_out=cue.mul_ir, original_mace=True, math_dtype=x.dtype,
        )  # fmt: skip
        return lambda x: module(x.transpose(1, 2).flatten(1), work.species)
    irreps = [cue.Irreps("O3", t) for t in (operation.irreps_in, operation.irreps_out)]
    if operation.kind == "linear":
        linear = cuet.Linear(*irreps, layout=cue.ir_mul, method="naive", **here)
        return lambda x: linear(x)
    product = cuet.FullyConnectedTensorProduct(
        irreps[0], cue.Irreps("O3", f"{operation.species}x0e"), irreps[1],
        layout=cue.mul_ir, method="naive", **here,
    )  # fmt: skip
    return lambda x: product(x, work.attrs)


def cuequivariance_indexed(work: NodeWork) -> Call:
    """Its linear with weights by index, for species, which MACE doesn't use."""
    import cuequivariance as cue
    import cuequivariance_torch as cuet

    operation, x = work.product, work.tensors[0]
    if operation.kind != "skip connection" or work.species is None:
        raise Refused("for skip connections alone")
    irreps = [cue.Irreps("O3", t) for t in (operation.irreps_in, operation.irreps_out)]
    module = cuet.Linear(
        *irreps, layout=cue.ir_mul, internal_weights=False, weight_classes=operation.species,
        method="indexed_linear", device=x.device, dtype=x.dtype,
    )  # fmt: skip
    weight = torch.randn(operation.species, module.weight_numel, device=x.device, dtype=x.dtype)
    sorted_species = work.species.sort().values  # which it wants
    return lambda x: module(x, weight=weight, weight_indices=sorted_species)


NODE_PEERS: dict[str, Callable[[NodeWork], Call]] = {
    "cueq": cuequivariance_on_nodes,
    "cueq, indexed": cuequivariance_indexed,
}
PEERS: dict[str, Callable[[Work], Call]] = {
    "cueq": cuequivariance,
    "oeq": openequivariance,
    "oeq-det": openequivariance_deterministic,
}
