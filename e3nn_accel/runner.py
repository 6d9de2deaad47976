"""What is known about one module: how it is configured, what was planned for it, and its calls so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from e3nn_accel.config import Config
from e3nn_accel.descriptor import Descriptor
from e3nn_accel.plan import Plan, Refusal

PlanKey = tuple[str, torch.dtype, torch.device]


@dataclass
class Outcome:
    """What planning one operation of one kind of module came to; shared by equal modules."""

    descriptor: Descriptor | None
    plan: Plan | None
    refusals: list[Refusal] = field(default_factory=list)

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
    """

    config: Config | None
    path: str
    left: str
    stock_forward: Any
    outcomes: dict[PlanKey, Outcome] = field(default_factory=dict)
    usage: dict[tuple[str, str, str], Usage] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def count(self, operation: str, backend: str, reason: str, seconds: float = 0.0) -> None:
        """Note one call."""
        usage = self.usage.get((operation, backend, reason))
        if usage is None:
            usage = self.usage[operation, backend, reason] = Usage()
        usage.calls += 1
        usage.seconds += seconds
