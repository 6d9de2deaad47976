"""``e3nn_accel::run``, the operation that a plan is in a graph of torch.compile.

One operation serves plans and their derivatives of every order (`derivatives`): its derivative is
itself under another name. It is opaque: what a plan does (looking at the data, launching kernels,
sharing groupings of edges and species) happens when it runs, as without torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch

from e3nn_accel import compat
from e3nn_accel.forks import ForkSafeLock
from e3nn_accel.ops.derivatives import function_of, gradient_of

SCHEMA = "run(Tensor[] operands, str function) -> Tensor[]"

_library: torch.library.Library | None = None
_registering = ForkSafeLock()


def register() -> None:
    """Make ``torch.ops.e3nn_accel.run`` known, once."""
    global _library
    with _registering:
        if _library is not None:
            return
        library = torch.library.Library("e3nn_accel", "DEF")
        library.define(SCHEMA, tags=compat.opaque_operation_tags())
        library.impl("run", _run, "CompositeExplicitAutograd")
        torch.library.register_fake("e3nn_accel::run", _fake, lib=library)
        torch.library.register_autograd(
            "e3nn_accel::run", _backward, setup_context=_setup_context, lib=library
        )
        _library = library


def _run(operands: list[torch.Tensor], function: str) -> list[torch.Tensor]:
    """The results, contiguous and in memory of their own, as `_fake` promises."""
    with compat.autograd_within_operations(), torch.no_grad():
        results = function_of(function)(tuple(operands))
    taken = {t.untyped_storage().data_ptr() for t in operands}
    out = []
    for result in results:
        result = result.contiguous()
        if result.untyped_storage().data_ptr() in taken and result.numel():
            result = result.clone()
        taken.add(result.untyped_storage().data_ptr())
        out.append(result)
    return out


def _fake(operands: list[torch.Tensor], function: str) -> list[torch.Tensor]:
    return list(function_of(function).like(tuple(operands)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    operands, ctx.function = inputs
    ctx.save_for_backward(*operands)


def _backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[list[torch.Tensor | None], None]:
    operands = ctx.saved_tensors
    functions = ctx.next_functions
    wanted = [
        needed and compat.engine_wants(functions[n][0])
        for n, needed in enumerate(ctx.needs_input_grad[0])
    ]
    if not any(wanted):
        return [None] * len(operands), None
    name = gradient_of(ctx.function, wanted)
    found = iter(torch.ops.e3nn_accel.run.default([*grads, *operands], name))
    return [next(found) if w else None for w in wanted], None
