"""``mace.modules.blocks.RadialEmbeddingBlock``: Bessel functions times a polynomial cutoff."""

from __future__ import annotations

from typing import Any

import torch

from e3nn_accel.compat import WRITTEN_FOR
from e3nn_accel.descriptor import Descriptor, RadialEmbeddingDescriptor
from e3nn_accel.guard import own_behaviour
from e3nn_accel.hookspecs import Call, Target, hookimpl
from e3nn_accel.patches.arguments import mismatch

CLASS = "mace.modules.blocks:RadialEmbeddingBlock"
PARTS = "mace.modules.radial"


def bind(
    module: Any,
    edge_lengths: torch.Tensor,
    node_attrs: Any = None,
    edge_index: Any = None,
    atomic_numbers: Any = None,
) -> Call | str:
    """Lengths and what MACE keeps in buffers, or why stock MACE takes the call."""
    reason = _another_form(module)
    if reason:
        return reason
    bessel, cutoff = module.bessel_fn, module.cutoff_fn
    constants = (bessel.bessel_weights, bessel.prefactor, cutoff.r_max)
    reason = mismatch(edge_lengths, *constants)
    if reason:
        return reason
    if bessel.bessel_weights.requires_grad and torch.is_grad_enabled():
        return "the weights of the Bessel functions are trained"
    if edge_lengths.dim() != 2 or edge_lengths.shape[1] != 1:
        return f"edge lengths of shape {tuple(edge_lengths.shape)}, wanted [edges, 1]"
    if cutoff.p.dtype not in (torch.int32, edge_lengths.dtype):
        return f"the cutoff's p is {cutoff.p.dtype}"
    return Call("radial_embedding", (edge_lengths, *constants, cutoff.p))


def as_the_block_returns(embedding: torch.Tensor) -> tuple[torch.Tensor, None]:
    """With nothing in the place of a cutoff that is still to be applied."""
    return embedding, None


def _another_form(module: Any) -> str:
    """What makes the block compute something else than a plan, or an empty string."""
    for part, wanted in ((module.bessel_fn, "BesselBasis"), (module.cutoff_fn, "PolynomialCutoff")):
        cls = type(part)
        if cls.__name__ != wanted or cls.__module__ != PARTS:
            return f"it has a {cls.__name__} for a {wanted}"
        if (
            not torch.compiler.is_compiling()
        ):  # which can't trace this, and runs hooks in its own way
            own = own_behaviour(part, cls.forward)
            if own:
                return f"its {wanted}: {own}"
    if "distance_transform" in module._modules:
        return f"distances go through {type(module.distance_transform).__name__}"
    if not getattr(module, "apply_cutoff", True):
        return "the cutoff is applied later"
    return ""


@hookimpl
def e3nn_accel_targets() -> list[Target]:
    """The whole block; its basis and its cutoff are only ever called by it."""
    return [
        Target(
            CLASS, bind, "radial_embedding", "mace-torch", WRITTEN_FOR["mace-torch"],
            traceable=True, wrap=as_the_block_returns, backend="cuda",
        )
    ]  # fmt: skip


@hookimpl
def e3nn_accel_describe(module: torch.nn.Module, operation: str) -> Descriptor | None:
    """The number of functions alone: everything else is read where the module has it, at each call."""
    if operation != "radial_embedding":
        return None
    from mace.modules.blocks import RadialEmbeddingBlock

    if not isinstance(module, RadialEmbeddingBlock):
        return None
    reason = _another_form(module)
    if reason:
        raise NotImplementedError(reason)
    m: Any = module
    if int(m.cutoff_fn.p) < 0:
        raise NotImplementedError(f"the cutoff's p is {int(m.cutoff_fn.p)}")
    return RadialEmbeddingDescriptor(
        len(m.bessel_fn.bessel_weights), not m.cutoff_fn.p.dtype.is_floating_point
    )
