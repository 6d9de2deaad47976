"""What is known about one module: how it is configured, what was planned for it, and its calls so far."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from e3nn_accel.config import Config
from e3nn_accel.descriptor import Descriptor
from e3nn_accel.plan import Plan, Refusal

if TYPE_CHECKING:
    from e3nn_accel.ordinary import OrdinaryCalls

PlanKey = tuple[str, torch.dtype, torch.device]


@dataclass
class Outcome:
    """What planning one operation of one kind of module came to; shared by equal modules.

    Attributes:
        of_one: It is of one module alone, stock e3nn can't run a copy of it: perhaps its weights are of a wrong
            shape, of which equal ones know nothing.
    """

    descriptor: Descriptor | None
    plan: Plan | None
    refusals: list[Refusal] = field(default_factory=list)
    of_one: bool = False

    @property
    def reason(self) -> str:
        """Every refusal in one line."""
        return "; ".join(map(str, self.refusals))


@dataclass
class Usage:
    """Calls of one module in one operation by one backend (or "e3nn", with the reason)."""

    calls: int = 0
    seconds: float = 0.0


@dataclass
class Runner:
    """What is known about one module; never holds the module itself.

    Attributes:
        config: The configuration that applies to it, or None where it isn't accelerated.
        path: Its name within the model given to ``accelerate``, if any.
        left: Why the configuration leaves it to stock e3nn.
        stock_forward: The forward it must have for a plan to stand in for it.
        notes: What the report says of an operation that no plan describes.
        by_choice: By device, why stock e3nn has its calls by choice, or an empty string.
        ordinary: What knows most calls at a glance, after the first of them.
        attempts_to_remember: How many calls were looked at for that.
    """

    config: Config | None
    path: str
    left: str
    stock_forward: Any
    outcomes: dict[PlanKey, Outcome] = field(default_factory=dict)
    usage: dict[tuple[str, str, str], Usage] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    by_choice: dict[torch.device, str] = field(default_factory=dict)
    ordinary: OrdinaryCalls | None = None
    attempts_to_remember: int = 0

    def strategy(self, operation: str) -> str:
        """The strategy of the plan that runs an operation."""
        if operation in self.notes:
            return self.notes[operation]
        plans = (o.plan for (name, *_), o in self.outcomes.items() if name == operation)
        return next((plan.strategy for plan in plans if plan is not None), "")

    def count(self, operation: str, backend: str, reason: str, seconds: float = 0.0) -> None:
        """Note one call."""
        usage = self.usage.get((operation, backend, reason))
        if usage is None:
            usage = self.usage[operation, backend, reason] = Usage()
        usage.calls += 1
        usage.seconds += seconds


@dataclass
class Total(Usage):
    """Of several modules."""

    modules: int = 0

    def add(self, usage: Usage, modules: int = 1) -> None:
        """That of so many more."""
        self.calls += usage.calls
        self.seconds += usage.seconds
        self.modules += modules


Totals = defaultdict[tuple[str, str, str, str], Total]
"""By class, operation, backend, and the plan's strategy or the reason of the fallback."""


def total(totals: Totals, cls: str, runner: Runner) -> None:
    """Add what a module of this class did."""
    for (operation, backend, reason), usage in runner.usage.items():
        totals[cls, operation, backend, reason or runner.strategy(operation)].add(usage)


@dataclass
class Departed:
    """What modules did that are no more: a program's model is gone when its report is written.

    Attributes:
        modules: How many of them were called.
    """

    modules: int = 0
    totals: Totals = field(default_factory=lambda: Totals(Total))

    def add(self, cls: str, runner: Runner) -> None:
        """Once a module is gone."""
        self.modules += bool(runner.usage)
        total(self.totals, cls, runner)
