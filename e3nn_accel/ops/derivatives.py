"""A plan and its derivatives of every order as functions of tensors, known by name.

``name`` is the value, ``gradient 101 of name`` the gradients of its first and third operand, as a
function of (gradient of the result, *operands); that is a function of tensors again, so
``gradient 1101 of gradient 101 of name`` is the second derivative, and so on. A name says all there
is to know besides the plan: code that another process compiled and kept on disk means the same here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256

import torch

from e3nn_accel.ops.result_shape import result_shape
from e3nn_accel.plan import Plan, PlanContext, Tensors

_GRADIENT = re.compile("gradient ([01]+) of (.*)")

_plans: dict[str, Plan] = {}
"""By name, for good: compiled code may call a plan as long as the process lives, and nothing says when
it no longer will. Equal modules share a plan, so there are few."""


def name_of(plan: Plan, context: PlanContext) -> str:
    """The plan's name, by which it can be called from now on; the same in every process."""
    digest = sha256(repr(plan.descriptor).encode()).hexdigest()[:12]
    dtype = str(context.dtype).removeprefix("torch.")
    how = f"{dtype} as {plan.rounded_to}" if plan.rounded_to else dtype
    name = f"{plan.descriptor} ({plan.backend}, {how}, {context.device}) {digest}"
    _plans[name] = plan
    return name


def gradient_of(name: str, wanted: Sequence[bool]) -> str:
    """The name of the gradients of the wanted arguments."""
    return f"gradient {''.join('01'[w] for w in wanted)} of {name}"


@cache
def function_of(name: str) -> Value | Gradient:
    """The function with this name."""
    matched = _GRADIENT.fullmatch(name)
    if matched is None:
        return Value(name)
    return Gradient(function_of(matched[2]), tuple(bit == "1" for bit in matched[1]))


@dataclass(frozen=True)
class Value:
    """What a plan computes."""

    name: str
    results = 1

    @property
    def plan(self) -> Plan:
        """The plan that has this name now.

        Raises:
            RuntimeError: No plan of this process has it.
        """
        try:
            return _plans[self.name]
        except KeyError:
            raise RuntimeError(f"e3nn_accel has no plan {self.name!r} in this process") from None

    def __call__(self, operands: Tensors) -> Tensors:
        """[the result], differentiable where autograd is on."""
        return (self.plan.run(*operands),)

    def like(self, operands: Tensors) -> Tensors:
        """Empty tensors of the results' shapes."""
        return (operands[0].new_empty(result_shape(self.plan.descriptor, operands)),)


@dataclass(frozen=True)
class Gradient:
    """The gradients of the wanted arguments of another function.

    Takes the gradients of that function's results, then its arguments.
    """

    of: Value | Gradient
    wanted: tuple[bool, ...]

    @property
    def results(self) -> int:
        """How many gradients it returns."""
        return sum(self.wanted)

    def __call__(self, arguments: Tensors) -> Tensors:
        """The wanted gradients; differentiable where autograd is on."""
        above, inner = arguments[: self.of.results], arguments[self.of.results :]
        if isinstance(self.of, Value) and self.of.plan.gradients is not None:
            known = self.of.plan.gradients(above[0], inner, self.wanted)
            if known is not None:
                return known
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            # each argument a tensor of its own: one passed twice has two gradients
            inner = tuple(_argument(t, w, further) for t, w in zip(inner, self.wanted, strict=True))
            results = self.of(inner)
        leaves = [t for t, w in zip(inner, self.wanted, strict=True) if w]
        used = [(r, g) for r, g in zip(results, above, strict=True) if r.requires_grad]
        if not used:
            return tuple(torch.zeros_like(t) for t in leaves)
        found = torch.autograd.grad(
            [r for r, _ in used], leaves, [g for _, g in used],
            create_graph=further, allow_unused=True,
        )  # fmt: skip
        return tuple(
            torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)
        )

    def like(self, arguments: Tensors) -> Tensors:
        """Empty tensors of the gradients' shapes."""
        inner = arguments[self.of.results :]
        return tuple(t.new_empty(t.shape) for t, w in zip(inner, self.wanted, strict=True) if w)


def _argument(t: torch.Tensor, wanted: bool, further: bool) -> torch.Tensor:
    """One that is not wanted stays the same object where it can: groupings are kept by it."""
    if further and t.requires_grad:
        return t
    if wanted:
        return t.detach().requires_grad_()
    return t.detach() if t.requires_grad else t
