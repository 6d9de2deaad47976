"""The calls of every model that is accelerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from e3nn_accel import generation
from e3nn_accel.graphs import eligibility
from e3nn_accel.graphs.capture import CudaLane, Lane
from e3nn_accel.graphs.model_state import ModelState
from e3nn_accel.interception import stock_call, suspended
from e3nn_accel.runner import Runner


class ModelCalls:
    """The calls of every model.

    Attributes:
        device_type: Of the calls that can be captured; all others pass by, unreported.
        lane_for: Makes the `Lane` of a model on a device.
    """

    def __init__(self, runner_for: Callable[[torch.nn.Module, Any], Runner]) -> None:
        self.runner_for = runner_for
        self.device_type = "cuda"
        self.lane_for: Callable[[torch.device], Lane] = CudaLane
        self._models: WeakKeyDictionary[torch.nn.Module, ModelState] = WeakKeyDictionary()

    def call(
        self,
        module: torch.nn.Module,
        stock_forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Take a call of a model of MACE's classes."""
        device = eligibility.device_of(eligibility.data_of(args, kwargs))
        if device is None or eligibility.type_of(device) != self.device_type or suspended():
            return stock_call(module, args, kwargs)
        state = self._models.get(module)
        if state is None or state.generation != generation.current.name:
            runner = self.runner_for(module, stock_forward)
            state = self._models[module] = ModelState(runner, self.lane_for)
        if state.runner.config is None:
            return stock_call(module, args, kwargs)
        return state.call(module, device, args, kwargs)

    def clear(self) -> None:
        """Forget every captured graph."""
        for state in self._models.values():
            state.forget()
        self._models.clear()
