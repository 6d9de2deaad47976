"""What is known of a tensor, for as long as it lives: found by the object, as every call does several times.

torch's WeakTensorKeyDictionary makes an object for each look-up, which takes ten times as long.
"""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


class OfTensors(Generic[Value]):
    """A value for each of some tensors, which it doesn't keep alive."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[torch.Tensor], Value]] = {}

    def get(self, tensor: torch.Tensor) -> Value | None:
        """That of this very object, or None."""
        found = self._kept.get(id(tensor))
        # a number may have passed to another tensor before the former's end was heard of
        return found[1] if found is not None and found[0]() is tensor else None

    def put(self, tensor: torch.Tensor, value: Value) -> None:
        """Keep a value until the tensor's end, or until the next one."""
        key, kept = id(tensor), self._kept

        def forget(ended: weakref.ref[torch.Tensor]) -> None:
            found = kept.get(key)
            if found is not None and found[0] is ended:
                del kept[key]

        kept[key] = weakref.ref(tensor, forget), value

    def __len__(self) -> int:
        return len(self._kept)
