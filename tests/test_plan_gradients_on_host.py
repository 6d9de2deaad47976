"""Gradients that plans give without running forward again, on the CPU: what torch.compile's graphs call.

Held against those that autograd finds through ``plan.run``, which other tests hold against stock e3nn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import accelerated, draw
from e3nn import o3
from radial_parity import CASES as RADIAL

from e3nn_accel.config import Config
from e3nn_accel.dispatch import Dispatcher
from e3nn_accel.ops import derivatives
from e3nn_accel.plan import Plan, PlanContext

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]
ROWS, SPECIES = 23, 5
Call = Callable[[], torch.Tensor]


def linear(**options: Any) -> Call:
    module = o3.Linear("8x0e+5x1o", "6x0e+4x1o", **options)
    return lambda: module(draw((ROWS, module.irreps_in.dim), 1))


def by_species() -> Call:
    module = o3.FullyConnectedTensorProduct("8x0e+5x1o", f"{SPECIES}x0e", "8x0e+5x1o")
    attrs = torch.nn.functional.one_hot(torch.arange(ROWS) % SPECIES, SPECIES).double()
    return lambda: module(draw((ROWS, module.irreps_in1.dim), 1), attrs)


def radial_mlp() -> Call:
    module = RADIAL["MACE"].build()
    return lambda: module(draw((ROWS, module.hs[0]), 1))


def contraction() -> Call:
    pytest.importorskip("mace")
    from contraction_parity import Contraction, node_attrs

    shape = Contraction("0e+1o", "0e+1o", 3, channels=5)
    module, attrs = shape.build(), node_attrs("all species", ROWS, shape.species)
    return lambda: module(shape.features(ROWS, dtype=torch.float64), attrs.double())


CASES: dict[str, tuple[Callable[[], Call], tuple[str, ...]]] = {
    # what is called, and which gradients are given; of the rest forward is run again
    "linear": (linear, ("100", "010", "110", "111")),
    "linear with biases": (lambda: linear(biases=True), ("100", "110")),
    "by species": (by_species, ("100", "001", "101")),
    "radial MLP": (radial_mlp, ("1000", "0001", "0110", "1111")),
    "contraction": (contraction, ("1",)),
}


def planned(call: Call, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, tuple[torch.Tensor, ...]]:
    """The plan that takes the call, and its operands."""
    found: list[Any] = []
    run = Dispatcher.run

    def recorded(
        self: Any, module: Any, runner: Any, outcome: Any, target: Any, call: Any, *rest: Any
    ):
        found.append((outcome.plan, call.operands))
        return run(self, module, runner, outcome, target, call, *rest)

    monkeypatch.setattr(Dispatcher, "run", recorded)
    with accelerated(self_check=False, backend="cuda"):
        call()
    ((plan, operands),) = found
    return plan, tuple(t.detach() for t in operands)


@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, choices = CASES[case]
    plan, operands = planned(make(), monkeypatch)
    assert plan.gradients is not None
    context = PlanContext(torch.float64, torch.device("cpu"), Config())
    name = derivatives.name_of(plan, context)
    g = torch.randn_like(plan.run(*operands))
    for choice in choices:
        wanted = tuple(bit == "1" for bit in choice.ljust(len(operands), "0"))
        assert plan.gradients(g, operands, wanted) is not None, choice
        agree(plan, name, g, operands, wanted)


def agree(
    plan: Plan,
    name: str,
    g: torch.Tensor,
    operands: tuple[torch.Tensor, ...],
    wanted: tuple[bool, ...],
) -> None:
    first = derivatives.function_of(derivatives.gradient_of(name, wanted))
    results = []
    for known in (plan, replace(plan, gradients=None)):
        derivatives._plans[name] = known
        with torch.no_grad():
            values = first((g, *operands))
        leaves = [t.clone().requires_grad_(w) for t, w in zip(operands, wanted, strict=True)]
        above = g.clone().requires_grad_()
        direction = [torch.cos(torch.arange(t.numel()).double()).view_as(t) for t in values]
        by = [above, *[t for t, w in zip(leaves, wanted, strict=True) if w]]
        with torch.enable_grad():
            second = torch.autograd.grad(
                [t for t in first((above, *leaves)) if t.requires_grad],
                by,
                [d for d in direction if d.numel()],
                allow_unused=True,
                materialize_grads=True,
            )
        results.append([*values, *second])
    for ours, autograds in zip(*results, strict=True):
        assert ours.shape == autograds.shape
        torch.testing.assert_close(ours, autograds, rtol=1e-12, atol=1e-12)


def test_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases, say: forward is run again, and the gradients are right."""
    plan, operands = planned(linear(biases=True), monkeypatch)
    g = torch.randn_like(plan.run(*operands))
    assert plan.gradients is not None
    assert plan.gradients(g, operands, (True, True, True)) is None
    name = derivatives.name_of(plan, PlanContext(torch.float64, torch.device("cpu"), Config()))
    with torch.no_grad():
        name = derivatives.gradient_of(name, (False, False, True))
        (found,) = derivatives.function_of(name)((g, *operands))
    torch.testing.assert_close(found, g[:, : found.shape[-1]].sum(0).view_as(found))


@pytest.mark.parametrize("case", ["by species", "contraction"])
def test_second_derivatives_by_species(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a gradient by features alone, which depends on node_attrs, too."""
    plan, operands = planned(CASES[case][0](), monkeypatch)
    name = derivatives.name_of(plan, PlanContext(torch.float64, torch.device("cpu"), Config()))
    g = torch.randn_like(plan.run(*operands))
    others = [False] * (len(operands) - 2)
    first = derivatives.gradient_of(name, [True, False, *others])
    second = derivatives.function_of(derivatives.gradient_of(first, [False, False, True, *others]))
    direction = torch.randn_like(operands[0])
    found = []
    for known in (plan, replace(plan, gradients=None)):
        derivatives._plans[name] = known
        with torch.no_grad():
            found.append(second((direction, g, *operands))[0])
    assert float(found[1].norm()) > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
