"""From a module's operation to the best plan that agrees with stock e3nn, or the reasons why there is none."""

from __future__ import annotations

import warnings

import torch

from e3nn_accel import compat, generation, selfcheck
from e3nn_accel.config import Config
from e3nn_accel.descriptor import Descriptor
from e3nn_accel.errors import FallbackWarning
from e3nn_accel.forks import ForkSafeLock
from e3nn_accel.hookspecs import Event
from e3nn_accel.plan import PlanContext, Refusal
from e3nn_accel.registry import Registry
from e3nn_accel.runner import Outcome, Runner


class Plans:
    """What planning came to, shared by equal modules.

    Attributes:
        outcomes: By what was planned, and with which options.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.outcomes: dict[tuple[Descriptor, torch.dtype, torch.device, Config], Outcome] = {}
        self._planning = ForkSafeLock()

    def outcome(
        self,
        module: torch.nn.Module,
        runner: Runner,
        operation: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Outcome:
        """What planning comes to, kept for the next calls; not so where the device was full."""
        try:
            outcome = self.preview(module, runner, operation, dtype, device)
        except compat.OutOfMemory as error:
            assert runner.config is not None
            if runner.config.strict or runner.config.backend != "auto":
                raise
            return Outcome(None, None, [Refusal("dispatch", f"not planned: {error}")])
        runner.outcomes[operation, dtype, device] = outcome
        return outcome

    def preview(
        self,
        module: torch.nn.Module,
        runner: Runner,
        operation: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Outcome:
        """What planning comes to, found once for equal modules."""
        assert runner.config is not None
        descriptor = self.registry.describe(module, operation)
        if isinstance(descriptor, Refusal):
            return Outcome(None, None, [descriptor])
        key = (descriptor, dtype, device, runner.config)
        with (
            self._planning
        ):  # copies of one module made by several threads at once disturb each other
            outcome = self.outcomes.get(key)
            if outcome is None:
                context = PlanContext(dtype, device, runner.config)
                outcome = self.checked(module, operation, descriptor, context)
                if not outcome.of_one:
                    self.outcomes[key] = outcome
            return outcome

    def checked(
        self, module: torch.nn.Module, operation: str, descriptor: Descriptor, context: PlanContext
    ) -> Outcome:
        """The best plan that agrees with stock e3nn; one that doesn't makes way for the next backend's."""
        outcome = Outcome(descriptor, None)
        failed: set[str] = set()
        while True:
            outcome.plan, refusals = self.registry.plan(descriptor, context, failed)
            outcome.refusals += [refusal for refusal in refusals if refusal not in outcome.refusals]
            if outcome.plan is None or not context.config.self_check:
                return outcome
            finding = selfcheck.compare(
                outcome.plan, module, operation, context.dtype, context.device
            )
            if not finding:
                return outcome
            skipped = finding.startswith(selfcheck.SKIPPED)
            failed.add(outcome.plan.backend)
            self.registry.event(Event("self-check failed", str(descriptor), finding))
            self.give_up(outcome, f"self-check: {finding}", warn=not skipped)
            if skipped or context.config.strict:
                outcome.of_one = skipped
                return outcome

    def give_up(self, outcome: Outcome, reason: str, warn: bool = True) -> None:
        """Leave a plan for good, saying so once."""
        assert outcome.plan is not None
        backend, outcome.plan = outcome.plan.backend, None
        outcome.refusals.append(Refusal(backend, reason))
        generation.advance()
        if warn:
            warnings.warn(
                f"e3nn_accel gives up a plan of backend {backend}: {outcome.descriptor}: {reason}",
                FallbackWarning,
                stacklevel=5,
            )
