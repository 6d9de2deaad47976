"""Compare a plan with stock e3nn: at its first use, on a small random batch, values and gradients.

The comparison draws from a generator of its own, so a user's seeds give the same run with and
without us, and works on a copy of the module with random parameters: parameters that are zero at
first (LoRA) would prove nothing, and the module's own must not be touched. It runs in a thread of its
own, since what surrounds the user's call belongs to that call alone: gradient and inference mode,
autocast, a default device, hooks on saved tensors (activation checkpointing counts them).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from e3nn_accel import compat
from e3nn_accel.config import Precision
from e3nn_accel.hookspecs import Call
from e3nn_accel.interception import stock_call, suspend
from e3nn_accel.plan import Plan
from e3nn_accel.samples import copy_of, direction, operands, random_inputs, randomised

SKIPPED = "stock e3nn itself could not be run"
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Relative, norm-wise: far above rounding, far below any wrong sign, factor or index."""
ROUNDED: dict[Precision, float] = {"tf32": 2e-3, "bf16": 2e-2}
"""Likewise, where a plan may round what it multiplies: products of numbers of 11 bits are off by 3e-4
(root mean square), of 8 bits by 2.3e-3."""
FLOOR = 1e-2
"""Root mean square that results count as having at least: where stock e3nn's is the rounding of a
zero (an antisymmetric coupling, say), there is nothing to be relative to. Inputs are of order one."""


def compare(
    plan: Plan, module: torch.nn.Module, operation: str, dtype: torch.dtype, device: torch.device
) -> str:
    """What differs between the plan and stock e3nn, or an empty string.

    Returns:
        A sentence that starts with `SKIPPED` where the module can't be run as a copy.

    Raises:
        OutOfMemory: The device is full, which says nothing about the plan.
    """
    findings: list[str] = []
    full: list[Exception] = []

    def check() -> None:
        try:
            findings.append(_compare(plan, module, operation, dtype, device))
        except compat.OutOfMemory as error:
            full.append(error)

    thread = threading.Thread(target=check, name="e3nn_accel self-check")
    thread.start()
    thread.join()
    if full:
        raise full[0]
    return findings[0] if findings else "the self-check itself failed"


def _compare(
    plan: Plan, module: torch.nn.Module, operation: str, dtype: torch.dtype, device: torch.device
) -> str:
    with suspend():
        try:
            stock = randomised(copy_of(module), dtype, device)
            inputs = random_inputs(stock, operation, dtype, device)
            expected, leaves = _stock(stock, operation, inputs)
        except compat.OutOfMemory:
            raise
        except Exception as error:
            return f"{SKIPPED} on a small batch ({type(error).__name__}: {error})"
        try:
            given = operands(stock, operation, inputs)
            found, ordinary = plan.run(*given), _as_ordinary(plan, given)
        except compat.OutOfMemory:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        try:
            stocks = _stock_gradients(expected, leaves)
        except compat.OutOfMemory:
            raise
        except Exception as error:  # autograd itself, in a child process forked after CUDA was used
            return f"{SKIPPED} backward ({type(error).__name__}: {error})"
        tolerance = _tolerance(dtype, plan)
        finding = _differences(found, expected, leaves, stocks, tolerance)
        if finding or ordinary is None:
            return finding
        return _difference("value of an ordinary call", ordinary, expected, tolerance)


def _as_ordinary(plan: Plan, given: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """What the plan has for ordinary calls, of these operands if they could be one's."""
    if plan.ordinary is None or not plan.ordinary.takes(given):
        return None
    with torch.no_grad():
        return plan.ordinary.run(*given)


def compare_call(module: torch.nn.Module, call: Call, found: torch.Tensor, plan: Plan) -> str:
    """What differs between one result and stock e3nn on the same operands, or an empty string."""
    with suspend(), torch.no_grad():
        inputs = tuple(x.detach() for x in call.operands)
        expected = _run_stock(module, call.operation, inputs)
        return _difference("value", found.detach(), expected, _tolerance(expected.dtype, plan))


def _tolerance(dtype: torch.dtype, plan: Plan) -> float:
    if plan.rounded_to is not None:
        return ROUNDED[plan.rounded_to]
    return TOLERANCE.get(dtype, 8 * torch.finfo(dtype).eps)


def _run_stock(module: Any, operation: str, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if operation == "convolution":
        x, y, weight, edges = inputs
        messages = stock_call(module, (x[edges[0]], y, weight), {})
        return torch.zeros(len(x), messages.shape[1], dtype=x.dtype, device=x.device).index_add(
            0, edges[1], messages
        )
    if operation in ("contraction", "radial_mlp"):  # further operands are its own weights
        inputs = inputs[: 2 if operation == "contraction" else 1]
    if operation == "radial_embedding":
        embedding: torch.Tensor = stock_call(module, (inputs[0], None, None, None), {})[0]
        return embedding
    out: torch.Tensor = stock_call(module, inputs, {})
    return out


def _stock(
    module: Any, operation: str, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    if operation == "tensor_product" and type(module).__name__ == "TensorSquare":
        inputs = (inputs[0], *inputs[2:])
    leaves = {f"input {n}": x for n, x in enumerate(inputs) if x.requires_grad}
    if operation != "radial_embedding":  # of which plans take none that wants a gradient
        leaves |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    return _run_stock(module, operation, inputs), leaves


def _stock_gradients(
    expected: torch.Tensor, leaves: dict[str, torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    if not leaves or not expected.requires_grad:
        return ()
    tensors = list(leaves.values())
    return torch.autograd.grad(expected, tensors, direction(expected), allow_unused=True)


def _differences(
    found: torch.Tensor,
    expected: torch.Tensor,
    leaves: dict[str, torch.Tensor],
    stocks: Sequence[torch.Tensor | None],
    tolerance: float,
) -> str:
    finding = _difference("value", found, expected, tolerance)
    if finding or not stocks:
        return finding
    tensors = list(leaves.values())
    ours: Sequence[torch.Tensor | None] = [None] * len(tensors)
    if found.requires_grad:
        try:
            ours = torch.autograd.grad(found, tensors, direction(expected), allow_unused=True)
        except compat.OutOfMemory:
            raise
        except Exception as error:
            return f"{type(error).__name__} backward: {error}"
    for name, leaf, a, b in zip(leaves, tensors, ours, stocks, strict=True):
        a = torch.zeros_like(leaf) if a is None else a
        b = torch.zeros_like(leaf) if b is None else b
        finding = finding or _difference(f"gradient of {name}", a, b, tolerance)
    return finding


def _difference(what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{what} is {found.dtype} {tuple(found.shape)}, stock {expected.dtype} {tuple(expected.shape)}"
    if not expected.numel():
        return ""
    error = float(torch.linalg.vector_norm((found - expected).detach()))
    size = float(torch.linalg.vector_norm(expected.detach()))
    if error <= tolerance * max(size, FLOOR * expected.numel() ** 0.5):
        return ""
    if not bool(torch.isfinite(expected).all()) and torch.equal(
        torch.isfinite(found), torch.isfinite(expected)
    ):
        return ""  # nothing can be said of a result that stock e3nn itself can't represent
    return (
        f"{what} differs by {error / max(size, 1e-30):.2e} of its norm (tolerance {tolerance:.0e})"
    )
