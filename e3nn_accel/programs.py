"""The kernels of a whole model, found without running it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import get_args

import torch

from e3nn_accel.compile import KernelProgram, programs_of
from e3nn_accel.config import Config
from e3nn_accel.descriptor import Descriptor
from e3nn_accel.health import registry
from e3nn_accel.hookspecs import Operation
from e3nn_accel.plan import Plan, PlanContext, Refusal

log = logging.getLogger(__name__)


def programs_for(
    model: torch.nn.Module,
    dtypes: Iterable[str],
    config: Config,
    architecture: int | None = None,
) -> tuple[list[KernelProgram], list[str]]:
    """Plan every module, in every way that it can be called.

    Backends are asked whether they can run here or not: a plan says what would run, no more.

    Args:
        model: Any module.
        dtypes: Names; none: those of the model's parameters.
        config: Says which backends are asked.
        architecture: The compute capability to plan for, as 90 for 9.0; None: this machine's GPU.

    Returns:
        The programs, each once, and the reasons of what has none.
    """
    wanted = [getattr(torch, name) for name in dtypes] or _dtypes_of(model)
    programs: dict[KernelProgram, None] = {}
    reasons: dict[str, None] = {}
    for descriptor in _descriptors(model):
        for dtype in wanted:
            context = PlanContext(dtype, torch.device("cuda", 0), config, architecture)
            for answer in _answers(descriptor, context):
                if isinstance(answer, Refusal):
                    reasons[str(answer)] = None
                else:
                    programs.update(dict.fromkeys(programs_of(answer)))
    return list(programs), list(reasons)


def _descriptors(model: torch.nn.Module) -> Iterable[Descriptor]:
    """What the modules compute; a product with four arguments is a convolution."""
    plugins = registry()
    found: dict[Descriptor, None] = {}
    for module in model.modules():
        for operation in get_args(Operation):
            descriptor = plugins.describe(module, operation)
            if not isinstance(descriptor, Refusal):
                found[descriptor] = None
    return found


def _answers(descriptor: Descriptor, context: PlanContext) -> Iterator[Plan | Refusal]:
    wanted = context.config.backend
    for backend, _ in registry().backends():
        # The torch backend has no kernels, and its plans put constants on the device.
        if wanted not in ("auto", backend.name) or backend.name == "torch":
            continue
        try:
            yield backend.plan(descriptor, context)
        except Exception as error:
            log.info("backend %s failed to plan %s", backend.name, descriptor, exc_info=True)
            yield Refusal(backend.name, f"{type(error).__name__}: {error}")


def _dtypes_of(model: torch.nn.Module) -> list[torch.dtype]:
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return sorted(found, key=str) or [torch.get_default_dtype()]
