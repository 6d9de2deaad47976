"""Symmetric contractions for the cuda backend against float64 stock MACE."""

from __future__ import annotations

import io
from typing import Any

import torch
from comparison import (
    Derivatives,
    Operands,
    accelerated,
    assert_close,
    derivatives,
    poisoned_memory,
    usage,
)
from mace_parts import Contraction, node_attrs

TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.float64: (1e-12, 1e-12)}
"""Relative and norm-wise, of values and of gradients."""


def check(
    shape: Contraction,
    nodes: int,
    dtype: torch.dtype,
    attrs: str = "all species",
    attrs_gradient: bool = False,
    device: str = "cpu",
) -> None:
    """Values, first and second derivatives by features, weights and, if wanted, node_attrs."""
    y = node_attrs(attrs, nodes, shape.species).to(dtype)
    check_operands(
        shape.build(), shape.features(nodes, dtype=dtype), y, attrs_gradient, device=device
    )


def check_operands(
    module: Any,
    x: torch.Tensor,
    y: torch.Tensor,
    attrs_gradient: bool = False,
    device: str = "cpu",
) -> None:
    """``module`` was built in float64; the operands' dtype is the one to compute in."""
    dtype = x.dtype
    ours = saved_and_loaded(module).to(device, dtype)
    exact = saved_and_loaded(ours).double()  # weights and constants as they were rounded
    x, y = x.to(device), y.to(device)
    expected = derivatives(
        lambda o: exact(o["x"], o["y"]), operands(exact, x.double(), y.double(), attrs_gradient)
    )
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        found = derivatives(lambda o: ours(o["x"], o["y"]), operands(ours, x, y, attrs_gradient))
        assert usage(ours) == {("contraction", "cuda"): 1}, usage(ours)
    assert {t.dtype for t in found.tensors.values()} == {dtype}
    found = Derivatives({name: t.double() for name, t in found.tensors.items()})
    forward, gradient = TOLERANCE[dtype]
    value = "value"
    assert_close(
        Derivatives({value: found.tensors[value]}),
        Derivatives({value: expected.tensors[value]}),
        forward,
    )
    assert_close(found, expected, gradient)


def saved_and_loaded(module: Any) -> Any:
    """A copy; MACE's EmptyParam, which can't be copied, becomes an ordinary Parameter."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def operands(module: Any, x: torch.Tensor, y: torch.Tensor, attrs_gradient: bool) -> Operands:
    """Features, node_attrs, and every weight that takes gradients."""
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    y = y.detach().clone().requires_grad_() if attrs_gradient else y
    return {"x": x.detach().clone().requires_grad_(), "y": y, **weights}
