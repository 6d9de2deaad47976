"""The results of a captured graph: found once, then copied out without the padding at every call.

Forward also writes to the batch it is given: under stress, positions and shifts that depend on the
displacement; and it marks positions as requiring a gradient. What a captured forward did to its
batch is found by looking, and done to the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from e3nn_accel.branches import is_ready
from e3nn_accel.edge_geometry import while_captured
from e3nn_accel.gathers import QuickGathers
from e3nn_accel.graphs.copying import copy_all
from e3nn_accel.graphs.padding import AXES, GRAPHS, NODES, Axis, Capacity, Size

RESULTS: Mapping[str, Axis] = {
    "energy": GRAPHS,
    "interaction_energy": GRAPHS,
    "contributions": GRAPHS,
    "virials": GRAPHS,
    "stress": GRAPHS,
    "displacement": GRAPHS,
    "node_energy": NODES,
    "forces": NODES,
    "node_feats": NODES,
}
"""What MACE's models return, where it isn't None."""
DISPLACEMENT = "displacement"
"""The result by which others may be differentiated: zeros that forward makes, and strains everything by."""


class NotCapturable(RuntimeError):
    """Something about the results that a replay couldn't give; the message says what."""


@dataclass(frozen=True)
class Result:
    """One tensor that forward returned, or put into the batch.

    Attributes:
        name: Its key.
        in_batch: Whether it is the batch's.
        axis: How it grows.
        differentiable: Whether it requires a gradient after an eager call.
    """

    name: str
    in_batch: bool
    axis: Axis
    differentiable: bool


@dataclass(frozen=True)
class Live:
    """What autograd's graph hangs on, of a run that is to be differentiated.

    Attributes:
        results: Those that have a gradient, by their place in `Produced.results`.
        leaves: Inputs that forward marked, and the displacement, by name.
    """

    results: dict[int, torch.Tensor]
    leaves: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Produced:
    """What one run of forward left.

    Attributes:
        keys: Of the returned dict, in order; those without a tensor among `results` were None.
        results: The tensors, described.
        marked: Inputs that forward made require a gradient.
        tensors: Those of `results`, padded.
        live: As long as its gradients aren't captured.
    """

    keys: tuple[str, ...]
    results: tuple[Result, ...]
    marked: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    live: Live | None = None


def produce(
    forward: Callable[[dict[str, torch.Tensor]], Any],
    inputs: Mapping[str, torch.Tensor],
    capacity: Capacity,
    differentiated: bool = False,
) -> Produced:
    """Run forward on inputs that stay as they are, and describe what came of it.

    Args:
        forward: A model's.
        inputs: What it reads, padded.
        capacity: To this size.
        differentiated: Whether autograd's graph is wanted, too.

    Raises:
        NotCapturable: Something came of it that isn't known.
    """
    before = {name: tensor.detach() for name, tensor in inputs.items()}
    batch = {name: is_ready(tensor) for name, tensor in before.items()}
    with QuickGathers(), while_captured():
        returned = forward(batch)
    if type(returned) is not dict:
        raise NotCapturable(f"forward returned a {type(returned).__name__}")
    found = [
        _described(name, value, False, RESULTS, capacity)
        for name, value in returned.items()
        if value is not None
    ]
    found += [
        _described(name, value, True, {**RESULTS, **AXES}, capacity)
        for name, value in batch.items()
        if value is not before.get(name)
    ]
    marked = {name: tensor for name, tensor in before.items() if tensor.requires_grad}
    return Produced(
        tuple(returned),
        tuple(result for result, _ in found),
        tuple(marked),
        tuple(tensor.detach() for _, tensor in found),
        _live(found, marked) if differentiated else None,
    )


def _live(found: list[tuple[Result, torch.Tensor]], marked: dict[str, torch.Tensor]) -> Live:
    results = {n: t for n, (_, t) in enumerate(found) if t.grad_fn is not None}
    leaves = dict(marked)
    for n, (result, tensor) in enumerate(found):
        if result.name == DISPLACEMENT and tensor.requires_grad:
            leaves[DISPLACEMENT] = tensor
            results.pop(n, None)
    return Live(results, leaves)


def _described(
    name: str, value: Any, in_batch: bool, known: Mapping[str, Axis], capacity: Capacity
) -> tuple[Result, torch.Tensor]:
    where = "into the batch" if in_batch else "as a result"
    if name not in known or type(value) is not torch.Tensor:
        raise NotCapturable(f"forward gives {name!r} {where}, of which nothing is known")
    axis = known[name]
    if value.shape[axis.dim : axis.dim + 1] != (axis.length(capacity),):
        raise NotCapturable(f"{name} has shape {tuple(value.shape)} for {capacity}")
    return Result(name, in_batch, axis, value.requires_grad), value


def unpadded(produced: Produced, size: Size) -> list[torch.Tensor]:
    """Copies of the real rows, which the caller may keep."""
    real = [
        tensor.narrow(result.axis.dim, 0, result.axis.length(size))
        for result, tensor in zip(produced.results, produced.tensors, strict=True)
    ]
    copies = [tensor.new_empty(tensor.shape) for tensor in real]
    copy_all(copies, real)
    return copies


def hand_over(
    produced: Produced, tensors: tuple[torch.Tensor, ...], data: dict[str, Any]
) -> dict[str, Any]:
    """The dict that forward returns, and its changes of the batch."""
    found: dict[str, Any] = dict.fromkeys(produced.keys)
    for result, tensor in zip(produced.results, tensors, strict=True):
        (data if result.in_batch else found)[result.name] = tensor
    return found
