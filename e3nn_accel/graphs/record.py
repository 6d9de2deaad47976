"""One call of a model, captured for its size."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from e3nn_accel.graphs import eligibility, outputs, padding
from e3nn_accel.graphs.buffers import StaticInputs
from e3nn_accel.graphs.capture import Lane, Recording, Run
from e3nn_accel.graphs.derivative import Derivative, in_place_of_parameters
from e3nn_accel.graphs.eligibility import Request
from e3nn_accel.graphs.padding import Capacity
from e3nn_accel.graphs.store import Captured
from e3nn_accel.interception import stock_call
from e3nn_accel.overwriting import OVERWRITTEN, differentiated_once


def record(
    module: torch.nn.Module,
    request: Request,
    key: tuple[Hashable, ...],
    capacity: Capacity,
    lane: Lane,
) -> Captured:
    """Capture it, and of a training call its derivative.

    Raises:
        NotCapturable: Something came of it that isn't known; whatever else keeps it from being captured.
    """
    cutoff = float(module.r_max)  # type: ignore[arg-type]
    lane.enter()
    with lane.allocating():
        dummies = padding.dummies(
            request.inputs, request.axes, capacity, cutoff, padding.feature_offsets(module)
        )
        inputs = StaticInputs(dummies, request.axes, capacity)
    inputs.load(request.inputs, request.size)
    flags = eligibility.flags_to_pass(request.flags)
    forward = lambda batch: stock_call(module, (batch,), flags)  # noqa: E731
    if "training" not in request.flags:
        recording = of_inference(lane, lambda: outputs.produce(forward, inputs.tensors, capacity))
        return Captured(key, capacity, inputs, recording, lane)
    with in_place_of_parameters(module) as doubles:
        recording = lane.record(
            lambda: outputs.produce(forward, inputs.tensors, capacity, differentiated=True),
            Derivative(doubles),
        )
    return Captured(key, capacity, inputs, recording, lane)


def of_inference(lane: Lane, run: Run) -> Recording:
    """Gradients overwrite what nobody reads any more; without that, where somebody does."""

    def once() -> outputs.Produced:
        with differentiated_once():
            return run()

    try:
        return lane.record(once)
    except RuntimeError as error:
        if OVERWRITTEN not in str(error):
            raise
    return lane.record(run)
