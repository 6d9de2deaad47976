"""Which gradients a backward pass asks for, and what it costs to find out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from e3nn_accel.compat import gradients_wanted


class Product(torch.autograd.Function):
    """x * y; notes which gradients were wanted."""

    wanted: tuple[bool, ...]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, y = ctx.saved_tensors
        Product.wanted = gradients_wanted(ctx, 2)
        return grads[0] * y, grads[0] * x


def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = Product.apply(x, y)  # type: ignore[no-untyped-call]
    return found.sum()


def test_a_leaf_that_is_not_asked_for() -> None:
    x, y = leaves()
    torch.autograd.grad(product(x, y), [x])
    assert Product.wanted == (True, False)


def test_a_function_that_leads_nowhere_asked_for() -> None:
    x, y = leaves()
    torch.autograd.grad(product(2 * x, 2 * y), [y])
    assert Product.wanted == (False, True)


def test_backward_wants_every_leaf() -> None:
    x, y = leaves()
    product(x, y).backward()  # type: ignore[no-untyped-call]
    assert Product.wanted == (True, True)


def test_constants_are_not_wanted() -> None:
    x, y = leaves()
    torch.autograd.grad(product(x, y.detach()), [x])
    assert Product.wanted == (True, False)


def test_a_captured_leaf_is_asked_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine answers by an exception, which costs more than a small kernel."""
    asked = []
    engine = torch._C._will_engine_execute_node
    monkeypatch.setattr(
        torch._C, "_will_engine_execute_node", lambda node: asked.append(node) or engine(node)
    )
    x, y = leaves()
    for _ in range(3):
        torch.autograd.grad(product(x, y), [x, y])
        assert Product.wanted == (True, True)
    assert len(asked) == 2
