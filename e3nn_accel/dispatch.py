"""The guard and the call: from ``module(...)`` to a plan, or to stock e3nn with the reason kept."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch

from e3nn_accel import compat, selfcheck
from e3nn_accel.by_choice import first_tensor, has_too_few_rows, reason_for_stock
from e3nn_accel.compat import is_plain_call
from e3nn_accel.config import Config
from e3nn_accel.errors import AccelError
from e3nn_accel.graphs.calls import ModelCalls
from e3nn_accel.guard import left_out, own_behaviour, program_transform
from e3nn_accel.hookspecs import Call, Target
from e3nn_accel.interception import stock_call, suspended
from e3nn_accel.neighbours.calls import CalculatorCalls
from e3nn_accel.ordinary import MOST_ATTEMPTS, remember
from e3nn_accel.plan import Refusal
from e3nn_accel.planning import Plans
from e3nn_accel.registry import Registry
from e3nn_accel.runner import Departed, Outcome, Runner
from e3nn_accel.traced import traced_call
from e3nn_accel.unfused import is_fused, unfused

log = logging.getLogger(__name__)


class Dispatcher:
    """The calls of all modules."""

    def __init__(
        self,
        registry: Registry,
        settings_of: Callable[[torch.nn.Module], tuple[Config | None, str]],
    ) -> None:
        self.registry = registry
        self.settings_of = settings_of
        self.runners: WeakKeyDictionary[torch.nn.Module, Runner] = WeakKeyDictionary()
        self.plans = Plans(registry)
        self.departed = Departed()
        self.targets: dict[type, tuple[Target, Any]] = {}
        self.model_calls = ModelCalls(
            lambda model, forward: self.runners.get(model) or self.runner_for(model, forward)
        )
        self.calculator_calls = CalculatorCalls(self.runner_of_calculator)

    def call_for(self, cls: type[torch.nn.Module], target: Target) -> Callable[..., Any]:
        """The ``__call__`` to put on ``cls``, the class of ``target``."""
        stock_forward = compat.original_forward(cls)
        self.targets[cls] = (target, stock_forward)
        while_compiled = traced_call(self, target, stock_forward)
        is_compiling, runner_of = torch.compiler.is_compiling, self.runners.get
        one_backend = target.backend

        def __call__(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_compiling():  # first: torch.compile traces this
                if torch.compiler.is_dynamo_compiling():
                    return while_compiled(module, *args, **kwargs)
                return torch.nn.Module.__call__(module, *args, **kwargs)  # torch.export
            runner = runner_of(module) or self.runner_for(module, stock_forward)
            if runner.config is None or suspended():
                return stock_call(module, args, kwargs)
            ordinary = runner.ordinary
            if ordinary is not None and not kwargs and is_plain_call(module, runner.stock_forward):
                taken = ordinary.take(module, args)
                if taken is not None:
                    return taken
            if one_backend and self.left_by_choice(target, runner, first_tensor(args, kwargs)):
                return stock_call(module, args, kwargs)
            return self.call(module, runner, target, args, kwargs)

        return __call__

    def left_by_choice(
        self, target: Target, runner: Runner, x: torch.Tensor | torch.device | None
    ) -> str:
        """Why stock e3nn has the calls of a module by choice, found once a device; or an empty string."""
        assert runner.config is not None
        device = x.device if isinstance(x, torch.Tensor) else x
        if device is None:
            return ""
        reason = runner.by_choice.get(device)
        if reason is None:
            reason = reason_for_stock(target, runner.config, self.registry, device)
            runner.by_choice[device] = reason
        return reason

    def runner_for(self, module: torch.nn.Module, stock_forward: Any) -> Runner:
        """Make the runner of a module at its first call."""
        config, path = self.settings_of(module)
        return self._new_runner(module, config, path, stock_forward)

    def runner_of_calculator(self, calculator: Any) -> Runner:
        """Make the runner of a calculator: what holds for its model holds for it."""
        found = self.runners.get(calculator)
        config, _ = self.settings_of(calculator.models[0])
        return found or self._new_runner(calculator, config, "", None)

    def forget_calls(self) -> None:
        """Let go what is kept for whole calls: captured graphs, lists of neighbours."""
        self.model_calls.clear()
        self.calculator_calls.clear()

    def _new_runner(
        self, module: Any, config: Config | None, path: str, stock_forward: Any
    ) -> Runner:
        left = "" if config is None else left_out(config, type(module), path)
        runner = self.runners[module] = Runner(config, path, left, stock_forward)
        # what it did stays in the report; not when the process ends, when its report has been written
        finalize(module, self.departed.add, type(module).__name__, runner).atexit = False
        return runner

    def call(
        self,
        module: torch.nn.Module,
        runner: Runner,
        target: Target,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Take a call of an active module: plan, or stock e3nn with the reason."""
        reason = program_transform() or own_behaviour(module, runner.stock_forward) or runner.left
        if reason:
            return self.stock(module, runner, reason, args, kwargs)
        assert runner.config is not None
        try:
            call = target.bind(module, *args, **kwargs)
        except Exception as error:  # stock e3nn meets the same arguments and raises its own error
            call = f"{type(error).__name__} while reading the arguments"
        if not isinstance(call, Call):
            out = self.stock(module, runner, call, args, kwargs)
            if runner.config.strict:
                raise AccelError(f"{_name(module, runner)} ran on stock e3nn", [call])
            return out
        operation, operands = call
        x = operands[0]
        outcome = runner.outcomes.get((operation, x.dtype, x.device))
        if outcome is None:
            outcome = self.plan(module, runner, call)
        if outcome.plan is None:
            if runner.config.strict or runner.config.backend != "auto":
                raise AccelError(f"{_name(module, runner)} can't be accelerated", [outcome.reason])
            return self.stock(module, runner, outcome.reason, args, kwargs, operation)
        plan = outcome.plan
        if plan.fewest_rows and has_too_few_rows(plan, x, operands[1]):
            return stock_call(module, args, kwargs)
        return self.run(module, runner, outcome, target, call, args, kwargs)

    def run(
        self,
        module: torch.nn.Module,
        runner: Runner,
        outcome: Outcome,
        target: Target,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the plan; if it fails where stock e3nn succeeds, give it up."""
        plan, config = outcome.plan, runner.config
        assert plan is not None
        assert config is not None
        started = time.perf_counter() if config.profile else 0.0
        try:
            out = plan.run(*call.operands)
        except Exception as error:
            if isinstance(error, compat.StopRecomputation) or _capturing(call.operands[0]):
                raise
            full = isinstance(error, compat.OutOfMemory)
            if full:
                traceback.clear_frames(error.__traceback__)  # which have what the plan allocated
            # arguments that stock e3nn refuses, too, end here with stock's own error
            result = self.stock(
                module, runner, f"{type(error).__name__} in the plan", args, kwargs, call.operation
            )
            if config.strict:
                raise
            if full:
                return result  # no fault of the plan, which may find room at the next call
            self.plans.give_up(
                outcome, f"failed where stock e3nn succeeds: {type(error).__name__}: {error}"
            )
            return result
        seconds = time.perf_counter() - started if config.profile else 0.0
        runner.count(call.operation, plan.backend, "", seconds)
        if (
            plan.ordinary is not None
            and not out.requires_grad
            and runner.attempts_to_remember < MOST_ATTEMPTS
        ):
            remember(module, runner, target, outcome, call, args, kwargs)
        if config.verify:
            self.verify(module, outcome, out, call, config.strict)
        return out if target.wrap is None else target.wrap(out)

    def stock(
        self,
        module: torch.nn.Module,
        runner: Runner,
        reason: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operation: str = "",
    ) -> Any:
        """Stock e3nn, counted with its reason; a fused convolution is taken apart first."""
        if is_fused(module, args, kwargs):
            runner.count("convolution", "unfused", reason)
            return unfused(module, args, kwargs)
        runner.count(operation, "e3nn", reason)
        return stock_call(module, args, kwargs)

    def plan(self, module: torch.nn.Module, runner: Runner, call: Call) -> Outcome:
        """Plan an operation at its first use, checked against stock e3nn."""
        x = call.operands[0]
        if _capturing(x):
            return Outcome(
                None,
                None,
                [Refusal("dispatch", "not planned before a CUDA graph was being captured")],
            )
        return self.plans.outcome(module, runner, call.operation, x.dtype, x.device)

    def verify(
        self, module: torch.nn.Module, outcome: Outcome, out: torch.Tensor, call: Call, strict: bool
    ) -> None:
        """Compare one result with stock e3nn on the same operands."""
        assert outcome.plan is not None
        finding = selfcheck.compare_call(module, call, out, outcome.plan)
        if finding and strict:
            raise AccelError(f"{type(module).__name__} differs from stock e3nn", [finding])
        if finding:
            self.plans.give_up(outcome, f"verify: {finding}")

    def target_of(self, module: torch.nn.Module) -> tuple[Target, Any] | None:
        """The target and stock forward of a module of an intercepted class."""
        return next(
            (self.targets[cls] for cls in type(module).__mro__ if cls in self.targets), None
        )

    def fusible(self, module: torch.nn.Module) -> bool:
        """Whether a block should hand its gather and scatter to this product."""
        if suspended() or program_transform():
            return False
        runner = self.runners.get(module)
        if runner is None:
            found = self.target_of(module)
            if found is None:
                return False
            runner = self.runner_for(module, found[1])
        if runner.config is None or runner.left or own_behaviour(module, runner.stock_forward):
            return False
        planned = [
            outcome.plan is not None
            for (operation, _, _), outcome in runner.outcomes.items()
            if operation == "convolution"
        ]
        if planned:
            return all(planned)
        instructions = getattr(module, "instructions", ())
        return bool(instructions) and all(i.connection_mode == "uvu" for i in instructions)

    def explain(
        self,
        module: torch.nn.Module,
        runner: Runner,
        operation: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[str, str]:
        """Backend and strategy of a module that wasn't called yet, or "e3nn" and the reason."""
        if runner.config is None:
            return "e3nn", "not accelerated"
        reason = own_behaviour(module, runner.stock_forward) or runner.left
        if reason:
            return "e3nn", reason
        outcome = self.plans.preview(module, runner, operation, dtype, device)
        return (
            ("e3nn", outcome.reason)
            if outcome.plan is None
            else (outcome.plan.backend, outcome.plan.strategy)
        )


def _capturing(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, within which much fails that works otherwise."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _name(module: torch.nn.Module, runner: Runner) -> str:
    return f"{type(module).__name__} {runner.path}".rstrip()
