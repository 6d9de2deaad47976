"""Training calls: their results are a replay, and so are the gradients of these.

``training=True`` wants results that can be differentiated by parameters. The graph that autograd makes of a
captured forward is captured, too, by walking through it once with gradients of the results that lie still:
`derivative.Derivative`. Later a step is two launches, one for the results and one for the gradients, and one node in
autograd's graph between them.

All captured graphs of a model share their memory. What a forward leaves for its gradients lies there until the
next replay of any of them, or until the gradients were found. A `TrainingStep` whose forward is no longer the
latest thing that ran replays it again first, from the caller's own inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from e3nn_accel.graphs.copying import copy_all
from e3nn_accel.graphs.eligibility import Request, RunsEagerly
from e3nn_accel.graphs.padding import Axis
from e3nn_accel.graphs.recompute import Forward
from e3nn_accel.graphs.store import Captured


class TrainingStep:
    """A replayed training call, until its gradients are wanted, and for as long as they may be.

    Attributes:
        left: Stands for what its forward left in memory; the lane, which outlives the model, knows no more of it.

    Args:
        captured: What was replayed; it stays, even if the model's `Store` lets it go.
        request: The call.
        lock: Held while anything of the model is replayed.
        rerun: For derivatives of gradients, which no replay has.
    """

    def __init__(
        self,
        captured: Captured,
        request: Request,
        lock: AbstractContextManager[Any],
        rerun: Forward,
    ) -> None:
        self.captured, self.request, self.rerun = captured, request, rerun
        self.left = object()
        self._lock = lock
        derivative = captured.recording.derivative
        assert derivative is not None
        self.derivative = derivative
        for name, tensor in request.inputs.items():
            if tensor.requires_grad and name not in derivative.leaves:
                raise RunsEagerly(f"{name} requires a gradient")
        self._versions = [tensor._version for tensor in request.inputs.values()]
        self._places = [p.data_ptr() for p in derivative.parameters]

    def attach(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The results, with one node of autograd's graph behind them."""
        found = list(tensors)
        leaves = []
        for name in self.derivative.leaves:
            if name in self.request.inputs:
                leaves.append(self.request.inputs[name])
            else:  # the displacement: a result for whoever wants derivatives by it
                n = [r.name for r in self.captured.recording.produced.results].index(name)
                leaves.append(found[n].requires_grad_(True))
        places = self.derivative.places
        attached = _Step.apply(  # type: ignore[no-untyped-call]
            self, [tensors[n] for n in places], *leaves, *self.derivative.parameters
        )
        for n, tensor in zip(places, attached, strict=True):
            found[n] = tensor
        return tuple(found)

    def gradients(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Of leaves and parameters, copies, by a replay."""
        recording, lane = self.captured.recording, self.captured.lane
        with self._lock, torch.no_grad():
            lane.enter()
            if lane.left is not self.left:
                self._again()
            lane.left = None  # a replay of gradients uses it up
            self.derivative.load(grads, self.request.size)
            reached = self.derivative.reached_by(grads)
            padded = recording.replay_gradients()
            found = [
                self._real(n, tensor) if tensor is not None and there else None
                for n, (tensor, there) in enumerate(zip(padded, reached, strict=True))
            ]
            copies = [None if t is None else t.new_empty(t.shape) for t in found]
            copy_all([t for t in copies if t is not None], [t for t in found if t is not None])
        return copies

    def eagerly(
        self, grads: Sequence[torch.Tensor | None], differentiable: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Results that have gradients, and the same gradients as `gradients`, of a forward that is run anew.

        Args:
            grads: Of the results.
            differentiable: Whether derivatives of the gradients will be asked for.
        """
        batch = dict(self.request.inputs)
        with torch.enable_grad():
            found = self.rerun(batch)
        described = self.captured.recording.produced.results
        results = []
        for n in self.derivative.places:
            where = batch if described[n].in_batch else found
            results.append(where[described[n].name])
        inputs = self.request.inputs
        by = [inputs[n] if n in inputs else found[n] for n in self.derivative.leaves]
        pairs = [(t, grad) for t, grad in zip(results, grads, strict=True) if grad is not None]
        gradients = torch.autograd.grad(
            [result for result, _ in pairs],
            [*by, *self.derivative.parameters],
            [grad for _, grad in pairs],
            create_graph=differentiable,
            allow_unused=True,
        )
        return results, list(gradients)

    def _again(self) -> None:
        """Replay the forward once more: another replay has written over what it left."""
        now = [tensor._version for tensor in self.request.inputs.values()]
        if now != self._versions:
            raise RuntimeError(
                "an input of the model needed for gradient computation has been modified by an inplace operation"
            )
        if [p.data_ptr() for p in self.derivative.parameters] != self._places:
            raise RuntimeError(
                "parameters of the model were moved before their gradients were computed"
            )
        self.captured.inputs.load(self.request.inputs, self.request.size)
        self.captured.recording.replay()

    def _real(self, n: int, padded: torch.Tensor) -> torch.Tensor:
        """Without the rows of the padding; parameters have none."""
        if n >= len(self.derivative.leaves):
            return padded
        name = self.derivative.leaves[n]
        axis = self.request.axes.get(name) or self._axis_of_result(name)
        return padded.narrow(axis.dim, 0, axis.length(self.request.size))

    def _axis_of_result(self, name: str) -> Axis:
        return next(r.axis for r in self.captured.recording.produced.results if r.name == name)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: TrainingStep, results: list[torch.Tensor], *leaves: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        # saved, so that torch objects to parameters that were written to before, as it does for stock
        ctx.save_for_backward(*leaves[len(step.derivative.leaves) :])
        ctx.step = step
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.saved_tensors  # noqa: B018  # or torch's error
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            return None, None, *ctx.step.eagerly(grads, differentiable=True)[1]
        return None, None, *ctx.step.gradients(grads)
