"""Calls that torch.compile traces: one opaque operation of ours in the graph, or stock e3nn's own ones.

Dynamo traces the functions made here like any other, but runs those that say `run_while_tracing` for
real and takes their answers for constants. They are given constants: which module it is (by its id,
on which Dynamo guards) and `generation.current.name`, which changes with every switch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from e3nn_accel import compat, generation
from e3nn_accel.backends.torch import species_linear
from e3nn_accel.by_choice import device_of
from e3nn_accel.config import Config
from e3nn_accel.descriptor import (
    ConvolutionDescriptor,
    LinearDescriptor,
    TensorProductDescriptor,
)
from e3nn_accel.errors import AccelError
from e3nn_accel.guard import own_behaviour, program_transform
from e3nn_accel.hookspecs import Call, Target
from e3nn_accel.interception import suspended
from e3nn_accel.living import living_module
from e3nn_accel.ops import derivatives, opaque
from e3nn_accel.plan import Plan, PlanContext
from e3nn_accel.unfused import is_fused, unfused

if TYPE_CHECKING:
    from e3nn_accel.dispatch import Dispatcher

log = logging.getLogger(__name__)
Result = TypeVar("Result")
EXPORTING = "torch.export writes a program that must run without e3nn_accel"
UNTRACEABLE = "torch.compile can't trace how the plugin reads its arguments"
FUSED_BY_THE_COMPILER = (
    "the compiler fuses stock e3nn's operations: faster than a plan in torch operations"
)
VERIFYING = "verify compares calls one by one, which a graph of torch.compile hasn't"


def traced_call(dispatcher: Dispatcher, target: Target, stock_forward: Any) -> Callable[..., Any]:
    """What ``module(...)`` is for modules of one target while torch.compile traces it."""
    bind, wrap = target.bind, target.wrap

    @compat.run_while_tracing
    def plan_name(identity: int, generation: str, operation: str, dtype: Any, device: Any) -> str:
        module = _living(identity)
        if module is None:
            return ""
        return _plan_name(dispatcher, target, module, stock_forward, operation, dtype, device)

    @compat.run_while_tracing
    def left_to_stock(identity: int, generation: str, reason: str) -> bool:
        module = _living(identity)
        return module is None or _left_to_stock(dispatcher, target, module, stock_forward, reason)

    def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        identity, now = id(module), generation.current.name
        bound = bind(module, *args, **kwargs)
        if isinstance(bound, Call):
            operation, operands = bound
            x = operands[0]
            name = plan_name(identity, now, operation, x.dtype, x.device)
            if name != "":
                out = torch.ops.e3nn_accel.run.default(list(operands), name)[0]
                return out if wrap is None else wrap(out)
        else:
            left_to_stock(identity, now, bound)
        if is_fused(module, args, kwargs):
            return unfused(module, args, kwargs)
        return torch.nn.Module.__call__(module, *args, **kwargs)

    def stock(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        left_to_stock(id(module), generation.current.name, UNTRACEABLE)
        return torch.nn.Module.__call__(module, *args, **kwargs)

    return call if target.traceable else stock


def traced_fusion(dispatcher: Dispatcher) -> Callable[[torch.nn.Module], bool]:
    """Whether a block hands its gather and scatter to its product, while torch.compile traces it."""

    @compat.run_while_tracing
    def fuses(identity: int, generation: str) -> bool:
        product = _living(identity)
        return product is not None and _fuses(dispatcher, product)

    def ask(product: torch.nn.Module) -> bool:
        return fuses(id(product), generation.current.name)

    return ask


def _living(identity: int) -> torch.nn.Module | None:
    try:
        module: torch.nn.Module = living_module(identity)
    except LookupError:
        log.info("a module that torch.compile traces can't be found", exc_info=True)
        return None
    return module


def _plan_name(
    dispatcher: Dispatcher,
    target: Target,
    module: torch.nn.Module,
    stock_forward: Any,
    operation: str,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """The name of the plan that takes a traced call, or an empty string: stock e3nn."""
    config, _ = dispatcher.settings_of(module)
    if config is None or suspended():
        return ""
    runner = dispatcher.runners.get(module) or dispatcher.runner_for(module, stock_forward)
    if dispatcher.left_by_choice(target, runner, device):
        return ""
    reason = (
        (EXPORTING if compat.exporting() else "")
        or program_transform()
        or own_behaviour(module, stock_forward)
        or runner.left
        or (VERIFYING if config.verify else "")
    )
    if reason:
        runner.count(operation, "e3nn", reason)
        return ""
    outcome = _untraced(lambda: dispatcher.plans.outcome(module, runner, operation, dtype, device))
    if outcome.plan is None:
        runner.count(operation, "e3nn", outcome.reason)
        if config.strict or config.backend != "auto":
            raise AccelError(
                f"{type(module).__name__} {runner.path} can't be accelerated", [outcome.reason]
            )
        return ""
    if _better_fused(module, outcome.plan, config):
        runner.count(operation, "e3nn", FUSED_BY_THE_COMPILER)
        return ""
    opaque.register()
    runner.count(operation, outcome.plan.backend, "")
    return derivatives.name_of(outcome.plan, PlanContext(dtype, device, config))


def _better_fused(module: torch.nn.Module, plan: Plan, config: Config) -> bool:
    """Whether the compiler makes more of stock e3nn's code than of one opaque operation.

    Measured with inductor on one core, forward and backward: a linear 1.0 ms and 1.6 opaque, a small
    convolution 12 and 22; but a species-indexed product, of which stock multiplies with all species,
    38 and 19.
    """
    if config.strict or config.backend != "auto" or plan.backend != "torch":
        return False
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        return False  # e3nn's own default, which the compiler can't look into
    d = plan.descriptor
    if isinstance(d, TensorProductDescriptor):
        return not species_linear.applies(d)
    return isinstance(d, LinearDescriptor | ConvolutionDescriptor)


def _left_to_stock(
    dispatcher: Dispatcher,
    target: Target,
    module: torch.nn.Module,
    stock_forward: Any,
    reason: str,
) -> bool:
    """Count a traced call that stock e3nn takes for a reason; not one that it has by choice."""
    config, _ = dispatcher.settings_of(module)
    if config is not None and not suspended():
        runner = dispatcher.runners.get(module) or dispatcher.runner_for(module, stock_forward)
        if dispatcher.left_by_choice(target, runner, device_of(module)):
            return True
        runner.count("", "e3nn", reason)
        if config.strict and not own_behaviour(module, stock_forward) and not compat.exporting():
            raise AccelError(f"{type(module).__name__} {runner.path} ran on stock e3nn", [reason])
    return True


def _fuses(dispatcher: Dispatcher, product: torch.nn.Module) -> bool:
    """As `Dispatcher.fusible`, but certain: the plan is made now, where the module's tensors are."""
    config, _ = dispatcher.settings_of(product)
    if config is None or config.verify or compat.exporting() or not dispatcher.fusible(product):
        return False
    mask: Any = product.output_mask
    found = dispatcher.target_of(product)
    assert found is not None
    runner = dispatcher.runners.get(product) or dispatcher.runner_for(product, found[1])
    outcome = _untraced(
        lambda: dispatcher.plans.outcome(product, runner, "convolution", mask.dtype, mask.device)
    )
    return outcome.plan is not None and not _better_fused(product, outcome.plan, config)


def _untraced(function: Callable[[], Result]) -> Result:
    """Run in a thread of its own, where nothing is being traced: planning makes and runs real tensors."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, name="e3nn_accel planning")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
