"""``mace.modules.symmetric_contraction.SymmetricContraction``.

A call has up to a dozen weights, each to be looked at, and the host's time is a small system's. So what was found of
operands is kept by all that it was found from, and a call like one before is known at a glance.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch.nn import Parameter

from e3nn_accel import compat
from e3nn_accel.descriptor import ContractionDescriptor, ContractionOutput, Coupling, Descriptor
from e3nn_accel.hookspecs import Call, Target, hookimpl
from e3nn_accel.patches.arguments import mismatch

CLASS = "mace.modules.symmetric_contraction:SymmetricContraction"
_FALLING = [tuple(str(n) for n in reversed(range(length))) for length in range(16)]
"""Names in a list of so many parameters."""
MOST_KINDS = 256
"""Of operands that are remembered: nodes come and go."""
_facts = attrgetter("__class__", "dtype", "device", "layout", "shape")
_facts_of_weight = attrgetter("__class__", "dtype", "device")
"""Of one that is sparse kernels ask for memory that it hasn't, and stock takes the call; shapes the plan knows."""
_well_formed: set[Hashable] = set()


def weights_of(contraction: Any) -> list[torch.Tensor]:
    """Weights of one output for nu = 1 .. correlation, as MACE stores them.

    MACE keeps the highest degree in ``weights_max`` and the others falling in ``weights``. Its
    ``weights_*_zeroed`` flags are indexed the other way round and say nothing reliable: a weight
    that was zeroed is zero.
    """
    return [*reversed(list(contraction.weights)), contraction.weights_max]


def bind(module: Any, x: Any, y: Any) -> Call | str:
    """The operands of ``SymmetricContraction.forward``: features, node_attrs and every weight."""
    contractions = module._modules["contractions"]._modules
    if torch.compiler.is_compiling():  # which can't trace what is quicker
        weights = _all_weights(contractions)
        return _wrong(x, y, weights, contractions) or Call("contraction", (x, y, *weights))
    try:
        weights = list(operands(module, x, y)[2:])
        first, u = weights[0].shape, contractions["0"]._buffers["U_matrix_1"].shape
        kind: Hashable = (first, u, _facts(x), _facts(y), *map(_facts_of_weight, weights))
    except (AttributeError, LookupError):
        # something is no tensor, or weights are no parameters, as in a replica of data-parallel training
        kind, weights = None, _all_weights(contractions)
    if kind not in _well_formed or compat.autocast_takes(x):
        reason = _wrong(x, y, weights, contractions)
        if reason:
            return reason
        if kind is not None:
            _remember(kind)
    return Call("contraction", (x, y, *weights))


def operands(module: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Those of ``SymmetricContraction.forward``: `weights_of` where they lie."""
    found = [x, y]
    for contraction in module._modules["contractions"]._modules.values():
        parameters = contraction._modules["weights"]._parameters
        found += map(parameters.__getitem__, _FALLING[len(parameters)])
        found.append(contraction._parameters["weights_max"])
    return tuple(found)


def _remember(kind: Hashable) -> None:
    if len(_well_formed) >= MOST_KINDS:
        _well_formed.clear()
    _well_formed.add(kind)


def _all_weights(contractions: Mapping[str, Any]) -> list[torch.Tensor]:
    return [weight for contraction in contractions.values() for weight in weights_of(contraction)]


def _wrong(x: Any, y: Any, weights: list[Any], contractions: Mapping[str, Any]) -> str:
    """Why stock MACE takes operands, or an empty string."""
    reason = mismatch(x, y, *[w for w in weights if type(w) is Parameter or not _is_empty(w)])
    if reason:
        return reason
    if x.dim() != 3 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        return f"x of shape {tuple(x.shape)} and node_attrs of shape {tuple(y.shape)}, wanted [nodes, ..] of both"
    species, _, channels = weights[0].shape
    components = contractions["0"]._buffers["U_matrix_1"].shape[-2]
    if x.shape[1:] != (channels, components) or y.shape[1] != species:
        return f"x of shape {tuple(x.shape)}, node_attrs of shape {tuple(y.shape)}"
    return ""


def _is_empty(weight: torch.Tensor) -> bool:
    """MACE's EmptyParam, a Parameter subclass for a weight whose path doesn't exist."""
    return type(weight).__name__ == "EmptyParam"


@hookimpl
def e3nn_accel_targets() -> list[Target]:
    """MACE's SymmetricContraction; its Contraction children are only ever called by it."""
    versions = compat.WRITTEN_FOR["mace-torch"]
    return [
        Target(
            CLASS, bind, "contraction", "mace-torch", versions, traceable=True, operands=operands
        )
    ]


@hookimpl
def e3nn_accel_describe(module: torch.nn.Module, operation: str) -> Descriptor | None:
    """Describe a contraction by the coupling tensors that its instance carries."""
    if operation != "contraction":
        return None
    from mace.modules.symmetric_contraction import SymmetricContraction

    if not isinstance(module, SymmetricContraction):
        return None
    m: Any = module
    outputs = []
    for contraction in m.contractions:
        couplings = []
        for nu in range(1, contraction.correlation + 1):
            u = getattr(contraction, f"U_matrix_{nu}")
            u = (
                u.unsqueeze(0) if u.dim() == nu + 1 else u
            )  # a scalar output lacks the axis of components
            couplings.append(Coupling.of(compat.as_numpy(u)))
        outputs.append(ContractionOutput((couplings[0].shape[0] - 1) // 2, tuple(couplings)))
    weight = m.contractions[0].weights_max
    irreps = m.contractions[0].coupling_irreps
    degrees = tuple(ir.l for mul, ir in irreps for _ in range(mul))
    return ContractionDescriptor(
        weight.shape[2], irreps.dim, weight.shape[0], tuple(outputs), degrees
    )
