"""``e3nn.o3.TensorProduct`` and its subclasses, edge by edge, and the fused convolution of four arguments."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import torch

from e3nn_accel import compat
from e3nn_accel.descriptor import (
    ConvolutionDescriptor,
    Coupling,
    Descriptor,
    ProductPath,
    TensorProductDescriptor,
)
from e3nn_accel.hookspecs import Call, Target, hookimpl
from e3nn_accel.irreps import irreps_of
from e3nn_accel.patches.arguments import mismatch, wrong_last_dimension


def bind(
    module: Any, x: Any, y: Any, weight: Any = None, edge_index: torch.Tensor | None = None
) -> Call | str:
    """The operands of ``TensorProduct.forward``, or of a convolution where ``edge_index`` is given."""
    weight = _weights(module, weight)
    reason = mismatch(x, y, weight) if module.weight_numel > 0 else mismatch(x, y)
    if reason:
        return reason
    constants = module._buffers["output_mask"].dtype  # which e3nn doesn't convert
    if constants != x.dtype:
        return f"the module is {constants}, the input {x.dtype}"
    shape1, shape2 = x.shape, y.shape
    if (
        edge_index is None
        and len(shape1) == len(shape2) == 2
        and shape1[0] == shape2[0]
        and shape1[1] == module._in1_dim
        and shape2[1] == module._in2_dim
        and module.shared_weights
    ):
        return Call("tensor_product", (x, y, weight))  # the ordinary case, cheap
    return _bind_any_shape(module, x, y, weight, edge_index)


def operands(module: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Those of a product that has its own weights.

    Raises:
        TypeError: It hasn't, or its constants, which e3nn doesn't convert, are of another dtype.
    """
    if not module.internal_weights or module._buffers["output_mask"].dtype != x.dtype:
        raise TypeError
    return x, y, module._parameters["weight"]


def _bind_any_shape(
    module: Any,
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    edge_index: torch.Tensor | None,
) -> Call | str:
    reason = wrong_last_dimension("x", x, module._in1_dim)
    reason = reason or wrong_last_dimension("y", y, module._in2_dim)
    if reason:
        return reason
    if edge_index is not None:
        return _bind_convolution(module, x, y, weight, edge_index)
    leading = x.shape[:-1]
    per_row = not module.shared_weights
    if leading != y.shape[:-1] or (per_row and leading != weight.shape[:-1]):
        shapes = (leading, y.shape[:-1], *((weight.shape[:-1],) if per_row else ()))
        try:
            torch.broadcast_shapes(*shapes)
        except RuntimeError:
            return "leading dimensions that don't broadcast"
    return Call("tensor_product", (x, y, weight))


def _bind_convolution(
    module: Any, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, edge_index: torch.Tensor
) -> Call | str:
    edges = edge_index.shape[-1]
    if x.dim() != 2 or y.dim() != 2 or edge_index.dim() != 2 or edge_index.dtype != torch.int64:
        return "a convolution takes x [nodes, dim], y [edges, dim] and edge_index [2, edges] int64"
    per_row = module.weight_numel > 0 and not module.shared_weights
    if y.shape[0] != edges or (per_row and tuple(weight.shape[:-1]) != (edges,)):
        return "edge attributes and weights need a row for each edge"
    return Call("convolution", (x, y, weight, edge_index))


def _weights(module: Any, weight: Any) -> torch.Tensor:
    """What stock's own method makes of them, or raises; the ordinary cases without its detours."""
    if weight is None:
        own: torch.Tensor | None = module._parameters.get("weight")
        if own is not None and module.internal_weights:
            return own
    elif (
        isinstance(weight, torch.Tensor)
        and not module.shared_weights
        and weight.dim() > 1
        and weight.shape[-1] == module.weight_numel
    ):
        return weight
    found: torch.Tensor = module._get_weights(weight)
    return found


def bind_square(module: Any, x: torch.Tensor, weight: Any = None) -> Call | str:
    """``TensorSquare.forward``: the product of x with itself."""
    return bind(module, x, x, weight)


@hookimpl
def e3nn_accel_targets() -> list[Target]:
    """The classes of e3nn with this forward; TensorSquare's own hands on to it."""
    names = (
        "TensorProduct",
        "FullyConnectedTensorProduct",
        "ElementwiseTensorProduct",
        "FullTensorProduct",
    )
    targets = [
        Target(f"e3nn.o3:{name}", bind, "tensor_product", traceable=True, operands=operands)
        for name in names
    ]
    square = Target("e3nn.o3:TensorSquare", bind_square, "tensor_product", traceable=True)
    return [*targets, square]


@hookimpl
def e3nn_accel_describe(module: torch.nn.Module, operation: str) -> Descriptor | None:
    """Describe any tensor product of e3nn."""
    from e3nn import o3

    if operation not in ("tensor_product", "convolution") or not isinstance(
        module, o3.TensorProduct
    ):
        return None
    m: Any = module
    in1, in2, out = irreps_of(m.irreps_in1), irreps_of(m.irreps_in2), irreps_of(m.irreps_out)
    buffers = compat.product_buffers(m)
    paths = tuple(
        ProductPath(
            i.i_in1, i.i_in2, i.i_out, i.connection_mode, bool(i.has_weight), float(i.path_weight), tuple(i.path_shape),
            _coupling(i.connection_mode, bool(i.has_weight), in1[i.i_in1].l, in2[i.i_in2].l, out[i.i_out].l,
                      bool(m._specialized_code), buffers),
        )
        for i in m.instructions
    )  # fmt: skip
    product = TensorProductDescriptor(
        in1, in2, out, paths, bool(m.shared_weights), bool(m.internal_weights)
    )
    return ConvolutionDescriptor(product) if operation == "convolution" else product


def _coupling(
    mode: str,
    has_weight: bool,
    l1: int,
    l2: int,
    l3: int,
    specialized: bool,
    buffers: dict[str, torch.Tensor],
) -> Coupling:
    """C[i,j,k] as e3nn's generated code has it: exact identities where it specialises, else its constants.

    The constants of a module built in float32 are rounded ones even after ``.double()``; the module's
    own are taken, since its numbers are the ones to reproduce.
    """
    unweighted = not has_weight and mode in ("uvu", "uuw")
    if specialized and not unweighted and mode not in ("uvuv", "uvu<v", "u<vw"):
        if 0 in (l1, l2, l3):
            c = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
            size = max(c.shape)
            identity = np.eye(size) / sqrt(size)
            axis = (l1, l2, l3).index(0)
            c[(slice(None),) * axis + (0,)] = identity
            return Coupling.of(c)
        if mode == "uuu" and (l1, l2, l3) == (1, 1, 1):
            return Coupling.of(_cross_product() / sqrt(6))
    stored = buffers.get(f"_w3j_{l1}_{l2}_{l3}")
    return Coupling.of(compat.as_numpy(compat.wigner_3j(l1, l2, l3) if stored is None else stored))


def _cross_product() -> np.ndarray:
    c = np.zeros((3, 3, 3))
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        c[i, j, k], c[j, i, k] = 1.0, -1.0
    return c
