"""What there is to copy of a batch, and whether it can be; batches like one before are known at a glance.

Between two steps of molecular dynamics a batch's tensors are others of the same kind, and the host's time
before a replay is a small system's time. So what was found of a batch is kept by all that it was found from:
names, classes, dtypes, devices, layouts, shapes, and which of them require a gradient. The last batch's is asked
for first, of all tensors at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from e3nn_accel.compat import likeness_of
from e3nn_accel.graphs.eligibility import Request, RunsEagerly, Signature
from e3nn_accel.graphs.padding import GRAPHS, Axis, Size

DIFFERENTIABLE = frozenset({"positions", "shifts", "node_attrs"})
"""Inputs that may require a gradient: MACE itself marks some of them."""
NEEDED = frozenset({"positions", "node_attrs", "edge_index", "cell", "batch", "ptr"})
MOST_KINDS = 256
"""Of batches that are remembered."""
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_facts = attrgetter("__class__", "dtype", "device", "layout", "shape", "requires_grad")
_is_inference = torch.Tensor.is_inference


class Kind(NamedTuple):
    """What batches are alike in: see `Request`."""

    size: Size
    signature: Signature
    axes: Mapping[str, Axis]


class Last(NamedTuple):
    """What the last batch was.

    Attributes:
        kind: Its own.
        names: Of its inputs.
        alike: Whether others' tensors are like them; None of one that nothing says so of, or that came once: where
            edges come and go, the next is of another kind.
    """

    kind: Kind | None = None
    names: tuple[str, ...] = ()
    alike: Callable[..., bool] | None = None


class BatchReader:
    """Reads the batches of one model.

    Args:
        axes: How each input grows that the model reads.
    """

    def __init__(self, axes: Mapping[str, Axis]) -> None:
        self._axes = axes
        self._known: dict[Hashable, Kind] = {}
        self._signatures: dict[Signature, Signature] = {}
        self._last = Last()

    def read(self, data: Any, flags: tuple[str, ...], device: torch.device) -> Request:
        """A call with this batch.

        Raises:
            RunsEagerly: Something of it can't be copied.
        """
        if type(data) is not dict:
            raise RunsEagerly(f"the batch is a {type(data).__name__}, not a dict")
        if "displacement" in data:
            raise RunsEagerly("the caller gives a displacement of its own")
        inputs = {name: data[name] for name in self._axes if name in data}
        kind, names, alike = self._last
        if kind is None or alike is None or names != tuple(inputs) or not alike(*inputs.values()):
            found = self._found(inputs, device)
            if found is not kind:
                self._last = Last(found)
            elif alike is None:
                self._last = Last(found, tuple(inputs), likeness_of(list(inputs.values()), 0))
            kind = found
        return Request(data, flags, kind.size, kind.signature, inputs, kind.axes)

    def _found(self, inputs: dict[str, torch.Tensor], device: torch.device) -> Kind:
        """Of a batch that isn't like the last one."""
        tensors = inputs.values()
        try:
            facts: Hashable = (device, *inputs, *map(_facts, tensors))
        except AttributeError:  # of what is no tensor; `kind_of` says which
            facts = None
        kind = self._known.get(facts)
        if kind is None or any(map(_is_inference, tensors)):
            kind = kind_of(inputs, self._axes, device)
            # the same object each time, which is compared at a glance
            kind = kind._replace(
                signature=self._signatures.setdefault(kind.signature, kind.signature)
            )
            if len(self._known) >= MOST_KINDS:
                self._known.clear()
                self._signatures.clear()
            self._known[facts] = kind
        return kind


def kind_of(
    inputs: Mapping[str, torch.Tensor], axes: Mapping[str, Axis], device: torch.device
) -> Kind:
    """Of inputs that are looked at one by one.

    Raises:
        RunsEagerly: Something can't be copied.
    """
    for name, tensor in inputs.items():
        _check_input(name, tensor, device)
    if not inputs.keys() >= NEEDED:
        raise RunsEagerly("the batch lacks inputs")
    if inputs["cell"].dim() == 3:
        axes = {**axes, "cell": GRAPHS}
    size = Size(
        inputs["positions"].shape[0],
        inputs["edge_index"].shape[-1],
        inputs["ptr"].shape[0] - 1,
    )
    if size.nodes == 0 or size.graphs < 1:
        raise RunsEagerly("the batch is empty")
    numbers = {"nodes": size.nodes, "edges": size.edges, "graphs": size.graphs}
    signature = []
    for name, tensor in inputs.items():
        axis, shape = axes[name], tensor.shape
        dim = axis.dim
        if len(shape) <= dim or shape[dim] != numbers[axis.of] * axis.each + axis.extra:
            raise RunsEagerly(f"{name} has shape {tuple(shape)} in a batch of {size}")
        signature.append((name, tensor.dtype, shape[:dim] + shape[dim + 1 :]))
    return Kind(size, tuple(signature), axes)


def _check_input(name: str, tensor: Any, device: torch.device) -> None:
    reason = ""
    if type(tensor) not in _PLAIN:
        reason = f"is a {type(tensor).__name__}, not a plain tensor"
    elif tensor.device != device:
        reason = f"is on {tensor.device}, the positions on {device}"
    elif tensor.layout != torch.strided:
        reason = f"has layout {tensor.layout}"
    elif tensor.dim() == 0:
        reason = "is a single number"
    elif tensor.is_inference():
        reason = "was made in inference mode"
    elif tensor.requires_grad and name not in DIFFERENTIABLE:
        reason = "requires a gradient"
    if reason:
        raise RunsEagerly(f"{name} {reason}")
