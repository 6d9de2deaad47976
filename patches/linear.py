"""``e3nn.o3.Linear``."""

from __future__ import annotations

from typing import Any

import torch

from e3nn_accel.compat import run_while_tracing
from e3nn_accel.descriptor import (
    Descriptor,
    LinearDescriptor,
    LinearPath,
)
from e3nn_accel.hookspecs import Call, Target, hookimpl
from e3nn_accel.irreps import dim_of, irreps_of
from e3nn_accel.living import living_module
from e3nn_accel.patches.arguments import mismatch, wrong_last_dimension


def bind(
    module: Any,
    features: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Call | str:
    """The operands of ``Linear.forward``, or why stock e3nn takes the call."""
    own = module._parameters.get("weight")
    if (
        weight is None
        and bias is None
        and own is not None
        and own.dim() == 1
        and not module.bias_numel
    ):
        # the ordinary case, cheap: a plan meets a wrong last dimension with an error, then stock with its own
        reason = mismatch(features, own)
        return reason or Call("linear", (features, own, module._buffers.get("bias", own)))
    external = weight is not None or bias is not None
    if weight is None:
        if module.weight_numel > 0 and not module.internal_weights:
            return "no weights given"
        weight = module.weight
    if bias is None:
        if module.bias_numel > 0 and not module.internal_weights:
            return "no biases given"
        bias = module.bias
    operands = (features, weight, bias)
    used = [features]
    if module.weight_numel > 0:
        used.append(weight)
    if module.bias_numel > 0:
        used.append(bias)
    reason = mismatch(*used) or wrong_last_dimension("the input", features, _dim_in(module))
    if not reason and (external or not module.internal_weights or module.weight.dim() > 1):
        reason = _wrong_weights(module, features, weight, bias)
    return reason or Call("linear", operands)


def operands(module: Any, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Those of a Linear that has its own weights and no biases."""
    own = module._parameters["weight"]
    return features, own, module._buffers.get("bias", own)


def _dim_in(module: Any) -> int:
    """torch.compile can't look into e3nn's Irreps, which refuse to say their length."""
    if torch.compiler.is_compiling():
        return _dim_while_traced(id(module))
    return int(module.irreps_in.dim)


@run_while_tracing
def _dim_while_traced(identity: int) -> int:
    return int(living_module(identity).irreps_in.dim)


def _wrong_weights(
    module: Any, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> str:
    """Shapes that stock e3nn would reject, or would read otherwise than a plan."""
    columns = (
        module.weight.shape[:-1]
        if module.internal_weights and module.weight.dim() > 1
        else torch.Size()
    )
    if columns and (features.dim() < 2 or features.shape[-2] != columns[0]):
        return f"the input has shape {tuple(features.shape)}, wanted (..., {columns[0]}, {_dim_in(module)})"
    rows = features.shape[: features.dim() - 1 - (len(columns) > 0)].numel()
    if module.weight_numel > 0:
        per_row = columns.numel() * module.weight_numel
        wanted = (per_row,) if module.shared_weights else (per_row, per_row * rows)
        if weight.shape[-1:] != (module.weight_numel,) or weight.numel() not in wanted:
            return f"weights of shape {tuple(weight.shape)} for {rows} rows"
    if module.bias_numel > 0 and bias.numel() != module.bias_numel * (columns[1] if columns else 1):
        return f"biases of shape {tuple(bias.shape)}"
    return ""


@hookimpl
def e3nn_accel_targets() -> list[Target]:
    """Linear alone; subclasses with a forward of their own stay stock."""
    return [Target("e3nn.o3:Linear", bind, "linear", traceable=True, operands=operands)]


@hookimpl
def e3nn_accel_describe(module: torch.nn.Module, operation: str) -> Descriptor | None:
    """Describe a Linear; the number of feature columns is only in the shape of its weight."""
    from e3nn import o3

    if operation != "linear" or not isinstance(module, o3.Linear):
        return None
    m: Any = module
    own_weights = m.internal_weights and m.weight_numel > 0
    if not own_weights and _has_feature_columns(m):
        raise NotImplementedError(
            "feature columns (f_in) are known from a Linear's own weights only, it has none"
        )
    columns = tuple(m.weight.shape[:-1]) if own_weights and m.weight.dim() > 1 else (None, None)
    paths = tuple(
        LinearPath(i.i_in, i.i_out, tuple(i.path_shape), float(i.path_weight))
        for i in m.instructions
    )
    d = LinearDescriptor(
        irreps_of(m.irreps_in), irreps_of(m.irreps_out), paths, columns[0], columns[1],
        bool(m.shared_weights), bool(m.internal_weights),
    )  # fmt: skip
    assert dim_of(d.irreps_in) == m.irreps_in.dim
    return d


def _has_feature_columns(m: Any) -> bool:
    """Whether it was built with ``f_in``, which nothing but its compiled code remembers: ask it for no rows."""
    x = m.output_mask.new_zeros((0, m.irreps_in.dim))
    rows = () if m.shared_weights else (0,)
    try:
        out = m._compiled_main(x, x.new_zeros((*rows, m.weight_numel)), x.new_zeros(m.bias_numel))
    except RuntimeError:
        return True
    return tuple(out.shape) != (0, m.irreps_out.dim)
