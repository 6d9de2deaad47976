"""Tensors copied to others, many at once: inputs to where a captured call reads them, results to whoever called.

torch takes a kernel for each dtype of short tensors, and one for each long one; a backend may have one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Protocol

import torch

from e3nn_accel.compat import copy_together

COPIED_TOGETHER = 1 << 15
"""Numbers of a tensor, at most, that torch should copy in one kernel with others: it has few blocks for each."""

_dtype, _contiguous = attrgetter("dtype"), torch.Tensor.is_contiguous


Copy = Callable[[Sequence[torch.Tensor]], None]


class CopiesTensors(Protocol):
    """What copies tensors of any dtypes in one launch.

    Attributes:
        most: Tensors that it takes.
    """

    most: int

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Each source to its target of the same dtype and shape; all are contiguous and on one device.

        Autograd doesn't hear of it, nor do version counters.
        """
        ...

    def copies_to(self, targets: Sequence[torch.Tensor]) -> Copy:
        """The same of targets that stay where they are, and of sources that are given again and again."""
        ...


copiers: dict[str, CopiesTensors] = {}
"""By type of device, where something is faster than torch's operations; a backend puts it here."""


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source to its target, which nothing was recorded of for gradients."""
    if not targets:
        return
    copier = copiers.get("cuda") if targets[0].is_cuda else None
    if (
        copier is not None
        and len(targets) <= copier.most
        and all(map(_contiguous, targets))
        and all(map(_contiguous, sources))
        and list(map(_dtype, targets)) == list(map(_dtype, sources))
    ):
        copier.copy(targets, sources)
    else:
        copy_in_torch(targets, sources)


def copies_to(targets: Sequence[torch.Tensor]) -> Copy | None:
    """What copies contiguous sources of the same dtypes and shapes to these, again and again; None: `copy_all` does."""
    copier = copiers.get("cuda") if targets and targets[0].is_cuda else None
    if copier is None or len(targets) > copier.most or not all(map(_contiguous, targets)):
        return None
    return copier.copies_to(targets)


def copy_in_torch(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Short ones in a kernel for each dtype, others by themselves."""
    together: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        dtype = target.dtype
        if (
            target.numel() > COPIED_TOGETHER
            or dtype != source.dtype
            or not (target.is_contiguous() and source.is_contiguous())
        ):
            target.copy_(source)
            continue
        found = together.get(dtype)
        if found is None:
            found = together[dtype] = ([], [])
        found[0].append(target)
        found[1].append(source)
    for there, here in together.values():
        copy_together(there, here)
