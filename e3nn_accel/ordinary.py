"""Ordinary calls, known at a glance: like one before but for the number of rows, and nothing to differentiate.

With few atoms a step's time is the host's, and most of it is looking: at each operand's class, dtype, device, layout
and shape, by `bind`, by the plan, by what would be differentiated. torch's compiler has a function that compares all
of that of all operands with what it was. A call that is found the same goes straight to the kernels; every other one,
and what goes wrong in this, goes the long way, which decides everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from e3nn_accel.compat import likeness_of
from e3nn_accel.hookspecs import Call, Target
from e3nn_accel.plan import Plan, Tensors
from e3nn_accel.runner import Outcome, Runner, Usage

MOST_ATTEMPTS = 8
"""To remember a call of one module: where calls aren't ordinary, or of many kinds in turn, each is looked at."""

_grad_enabled = torch.is_grad_enabled


class OrdinaryCalls(NamedTuple):
    """Of one module.

    Attributes:
        operands: The target's.
        alike: Whether operands are like those before.
        rows: How many of them have rows, one or two.
        wanting: Whether some of them want gradients, and autograd has to be off.
        run: The plan's.
        outcome, plan: Where a plan is given up, the outcome has it no longer.
        usage: Where calls are counted.
    """

    operands: Callable[..., Tensors]
    alike: Callable[..., bool]
    rows: int
    wanting: bool
    run: Callable[..., torch.Tensor]
    outcome: Outcome
    plan: Plan
    usage: Usage

    def take(self, module: torch.nn.Module, args: tuple[Any, ...]) -> torch.Tensor | None:
        """The result; None: the call isn't one of these."""
        operands, alike, rows, wanting, run, outcome, plan, usage = self
        try:
            if _grad_enabled() and (wanting or args[0].requires_grad):
                return None
            found = operands(module, *args)
            if (
                not alike(*found)
                or outcome.plan is not plan
                or (rows > 1 and found[0].shape[0] != found[1].shape[0])
            ):
                return None
            out = run(*found)
        except Exception:  # whatever it is, the long way meets it, too, and knows what to do
            return None
        usage.calls += 1
        return out


def remember(
    module: torch.nn.Module,
    runner: Runner,
    target: Target,
    outcome: Outcome,
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """After a call that a plan took, whose result wants no gradient: the next like it are known, if it is ordinary."""
    runner.attempts_to_remember += 1
    plan, config, operands = outcome.plan, runner.config, call.operands
    if target.operands is None or plan is None or plan.ordinary is None or config is None:
        return
    if kwargs or config.profile or config.verify or not plan.ordinary.takes(operands):
        return
    dims = plan.ordinary.dims
    try:
        found = target.operands(module, *args)
        alike = likeness_of(operands, len(dims))
    except Exception:  # no call of these arguments, or no function of this torch's
        return
    if alike is None or list(map(id, found)) != list(map(id, operands)):
        return
    wanting = any(t.requires_grad for t in operands)
    usage = runner.usage[call.operation, plan.backend, ""]
    runner.ordinary = OrdinaryCalls(
        target.operands, alike, len(dims), wanting, plan.ordinary.run, outcome, plan, usage
    )
