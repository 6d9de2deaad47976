"""Results of a replay that can be differentiated: forward is then run again, eagerly.

Stock MACE frees its graph when it has found the forces, and a gradient of its energy is an error
unless training=True. So hardly any caller wants one; results say ``requires_grad`` as stock's do, at
the price of one small node in autograd's graph, and whoever does differentiate them gets the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from e3nn_accel.graphs.outputs import Produced

Forward = Callable[[dict[str, torch.Tensor]], dict[str, Any]]
"""A model's forward with training=True and the flags of the call."""


def attach(
    forward: Forward,
    produced: Produced,
    tensors: list[torch.Tensor],
    inputs: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """The tensors, those that stock MACE's graph reaches with a gradient by way of ``forward``."""
    places = [n for n, result in enumerate(produced.results) if result.differentiable]
    if not places:
        return tuple(tensors)
    names = tuple((produced.results[n].name, produced.results[n].in_batch) for n in places)
    attached = _Replayed.apply(  # type: ignore[no-untyped-call]
        _Rerun(forward, tuple(inputs), names), [tensors[n] for n in places], *inputs.values()
    )
    found = list(tensors)
    for n, tensor in zip(places, attached, strict=True):
        found[n] = tensor
    return tuple(found)


class _Rerun:
    """How to find gradients: which results, of which inputs."""

    def __init__(
        self, forward: Forward, inputs: tuple[str, ...], results: tuple[tuple[str, bool], ...]
    ) -> None:
        self.forward, self.inputs, self.results = forward, inputs, results

    def gradients(
        self, tensors: tuple[torch.Tensor, ...], grads: tuple[Any, ...], needed: tuple[bool, ...]
    ) -> list[torch.Tensor | None]:
        """Of the results by the inputs that need one, those results given a gradient."""
        leaves = [t.detach() for t in tensors]
        wanted = [
            leaf.requires_grad_(True) for leaf, need in zip(leaves, needed, strict=True) if need
        ]
        batch = dict(zip(self.inputs, leaves, strict=True))
        with torch.enable_grad():
            found = self.forward(batch)
            pairs = [
                (batch[name] if in_batch else found[name], grad)
                for (name, in_batch), grad in zip(self.results, grads, strict=True)
                if grad is not None
            ]
            of_wanted = iter(
                torch.autograd.grad(
                    [value for value, _ in pairs],
                    wanted,
                    [grad for _, grad in pairs],
                    allow_unused=True,
                )
            )
        return [next(of_wanted) if need else None for need in needed]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rerun: _Rerun, results: list[torch.Tensor], *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.rerun = rerun
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        found = ctx.rerun.gradients(ctx.saved_tensors, grads, ctx.needs_input_grad[2:])
        return None, None, *found
