"""Compare a plan with stock e3nn: at its first use, on a small random batch, values and gradients.

The comparison draws from a generator of its own, so a user's seeds give the same run with and
without us, and works on a copy of the module with random parameters: parameters that are zero at
first (LoRA) would prove nothing, and the module's own must not be touched. It runs in a thread of its
own, since what surrounds the user's call belongs to that call alone: gradient and inference mode,
autocast, a default device, hooks on saved tensors (activation checkpointing counts them).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch

from e3nn_accel import compat
from e3nn_accel.config import Precision
from e3nn_accel.hookspecs import Call
from e3nn_accel.interception import stock_call, suspend
from e3nn_accel.plan import Plan

SKIPPED = "stock e3nn itself could not be run"
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Relative, norm-wise: far above rounding, far below any wrong sign, factor or index."""
ROUNDED: dict[Precision, float] = {"tf32": 2e-3, "bf16": 2e-2}
"""Likewise, where a plan may round what it multiplies: products of numbers of 11 bits are off by 3e-4
(root mean square), of 8 bits by 2.3e-3."""
FLOOR = 1e-2
"""Root mean square that results count as having at least: where stock e3nn's is the rounding of a
zero (an antisymmetric coupling, say), there is nothing to be relative to. Inputs are of order one."""

ROWS, EDGES, SEED = 4, 7, 20240229


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
            stock = _randomised(_copy_of(module), dtype, device)
            inputs = _random_inputs(stock, operation, dtype, device)
            expected, leaves = _stock(stock, operation, inputs)
        except compat.OutOfMemory:
            raise
        except Exception as error:
            return f"{SKIPPED} on a small batch ({type(error).__name__}: {error})"
        try:
            found = plan.run(*_operands(stock, operation, inputs))
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
        return _differences(found, expected, leaves, stocks, _tolerance(dtype, plan))


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


def _copy_of(module: Any) -> Any:
    """A module with parameters and buffers of its own, which shares whatever else hangs on it.

    Not `copy.deepcopy`: that fails for MACE's EmptyParam and for attributes like locks, and traces
    e3nn's generated code anew, for which torch.fx patches the calls of all modules meanwhile.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return copy.deepcopy(module)
    twin = object.__new__(type(module))
    fields = vars(module)
    own = {
        "_parameters": lambda p: torch.nn.Parameter(p.detach().clone()),
        "_buffers": lambda b: b.detach().clone(),
        "_modules": _copy_of,
    }
    vars(twin).update(fields)
    for name, copied in own.items():
        kept = {
            key: None if value is None else copied(value) for key, value in fields[name].items()
        }
        vars(twin)[name] = type(fields[name])(kept)
    return twin


def _generator() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(SEED)


def _randn(
    shape: Sequence[int], like: torch.Generator, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=like, dtype=torch.float64, device="cpu").to(
        device, dtype
    )


def _randomised(module: Any, dtype: torch.dtype, device: torch.device) -> Any:
    generator = _generator()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
        parameter.data.copy_(_randn(parameter.shape, generator, parameter.dtype, parameter.device))
    return module.to(device=device, dtype=dtype)


def _random_inputs(
    module: Any, operation: str, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Inputs of the operation: unsorted edges, an isolated node, mixed species."""
    generator = _generator()

    def draw(*shape: int) -> torch.Tensor:
        return _randn(shape, generator, dtype, device).requires_grad_(True)

    if operation == "linear":
        columns = (
            tuple(module.weight.shape[:1])
            if module.internal_weights and module.weight.dim() > 1
            else ()
        )
        return (draw(ROWS, *columns, module.irreps_in.dim), *_external_linear(module, draw))
    if operation == "contraction":
        species, _, channels = module.contractions[0].weights_max.shape
        picked = torch.randint(species, (ROWS,), generator=generator, device="cpu")
        hot = torch.nn.functional.one_hot(picked, species).to(device, dtype)
        return draw(ROWS, channels, module.contractions[0].coupling_irreps.dim), hot
    if operation == "radial_mlp":
        return (draw(ROWS, module.hs[0]),)
    if operation == "spherical_harmonics":
        return (draw(ROWS, 3),)
    if operation == "radial_embedding":  # within the cutoff and beyond it
        ratio = torch.rand((ROWS, 1), generator=generator, dtype=torch.float64, device="cpu") + 0.2
        return ((module.cutoff_fn.r_max.detach() * ratio.to(device, dtype)).requires_grad_(True),)
    rows = EDGES if operation == "convolution" else ROWS
    weight = (
        ()
        if module.internal_weights
        else (draw(*(() if module.shared_weights else (rows,)), module.weight_numel),)
    )
    y = draw(rows, module.irreps_in2.dim)
    if operation == "convolution":
        edges = torch.tensor(
            [[0, 1, 2, 3, 0, 1, 2], [2, 0, 2, 1, 0, 2, 0]], device=device
        )  # nothing reaches node 3
        weight = weight or (module.weight,)
        return draw(ROWS, module.irreps_in1.dim), y, *weight, edges
    if operation == "tensor_product" and _only_scalars(module.irreps_in2):
        picked = torch.randint(module.irreps_in2.dim, (rows,), generator=generator, device="cpu")
        y = torch.nn.functional.one_hot(picked, module.irreps_in2.dim).to(device, dtype)
    return draw(rows, module.irreps_in1.dim), y, *weight


def _only_scalars(irreps: Any) -> bool:
    return irreps.dim > 1 and all(ir.l == 0 for _, ir in irreps)


def _external_linear(module: Any, draw: Any) -> tuple[torch.Tensor, ...]:
    if module.internal_weights:
        return ()
    rows = () if module.shared_weights else (ROWS,)
    return draw(*rows, module.weight_numel), draw(1, module.bias_numel)


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


def _operands(
    module: Any, operation: str, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    if operation == "linear":
        return inputs if len(inputs) == 3 else (inputs[0], module.weight, module.bias)
    if operation == "contraction":
        from e3nn_accel.patches.symmetric_contraction import weights_of

        return (
            *inputs,
            *(weight for contraction in module.contractions for weight in weights_of(contraction)),
        )
    if operation == "radial_mlp":
        from e3nn_accel.patches.radial_mlp import weights_of as weights_of_layers

        return (*inputs, *weights_of_layers(module))
    if operation == "radial_embedding":
        bessel, cutoff = module.bessel_fn, module.cutoff_fn
        weights = bessel.bessel_weights.detach()
        return *inputs, weights, bessel.prefactor, cutoff.r_max, cutoff.p
    if operation == "tensor_product":
        x, y = inputs[:2]
        y = x if type(module).__name__ == "TensorSquare" else y
        return (x, y, inputs[2] if len(inputs) > 2 else module.weight)
    return inputs


def _direction(like: torch.Tensor) -> torch.Tensor:
    return _randn(like.shape, _generator(), like.dtype, like.device)


def _stock_gradients(
    expected: torch.Tensor, leaves: dict[str, torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    if not leaves or not expected.requires_grad:
        return ()
    tensors = list(leaves.values())
    return torch.autograd.grad(expected, tensors, _direction(expected), allow_unused=True)


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
            ours = torch.autograd.grad(found, tensors, _direction(expected), allow_unused=True)
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
