"""Parts of a captured call that run beside the rest of it.

A CUDA graph runs kernels in the order in which one stream was given them, one after the other, and with few
atoms none of them fills the device. Radial MLPs wait for nothing but the lengths of edges, and nobody but
the edges' own derivative waits for their gradients: captured on a stream of their own, they and their
gradients (autograd gives a node's the stream of its forward) are a branch of the graph. So is what is made of
the batch or of frozen weights alone: the order of nodes by species, weights in a reduced basis.

Memory that one stream frees is taken again without waiting for the other. What passes between the two is
therefore kept until the capture ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from e3nn_accel.compat import version_counter

MOST_ROWS = 16384
"""Of what runs beside: more fill the device by themselves, and would be kept.

An H200's replays of 2928, 9852 and 23410 edges take 7, 9 and -1 % less time with branches.
"""

Run = Callable[..., torch.Tensor]
Found = TypeVar("Found")


class Branch:
    """Of one capture: a second stream, and what passed between it and the first."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._kept: list[object] = []
        self._begun: torch.cuda.Event = torch.cuda.current_stream(stream.device).record_event()
        self._ready: dict[tuple[int, int | None], torch.cuda.Event] = {}

    def run(self, run: Run, x: torch.Tensor, others: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """On the second stream, as soon as ``x`` is there; ``others`` were there before the capture."""
        main = torch.cuda.current_stream(x.device)
        self.stream.wait_event(self.when_ready(x))
        with torch.cuda.stream(self.stream):
            out = run(self._with_its_gradient_kept(x.view_as(x)), *others)
        main.wait_stream(self.stream)
        return self._with_its_gradient_kept(out)

    def find(self, find: Callable[[], Found], of: Sequence[torch.Tensor]) -> Found:
        """On the second stream, as soon as all of them are there."""
        for t in of:
            self.stream.wait_event(self.when_ready(t))
        with torch.cuda.stream(self.stream):
            found = find()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self._kept.append(found)
        return found

    def when_ready(self, x: torch.Tensor) -> torch.cuda.Event:
        """An event after what computed ``x``, the earliest that is known."""
        if isinstance(x, torch.nn.Parameter):
            return self._begun
        key = id(x), version_counter(x)
        if key not in self._ready:
            self._kept.append(x)  # another could get its number
            self._ready[key] = torch.cuda.current_stream(x.device).record_event()
        return self._ready[key]

    def _with_its_gradient_kept(self, t: torch.Tensor) -> torch.Tensor:
        self._kept.append(t)
        if t.requires_grad:
            t.register_hook(self._kept.append)
        return t


class _OfThread(threading.local):
    branch: Branch | None = None


_here = _OfThread()


@contextmanager
def branching(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Around a capture, whose second stream ``stream`` is; None: it has none."""
    before, _here.branch = _here.branch, None if stream is None else Branch(stream)
    try:
        yield
    finally:
        _here.branch = before


def is_ready(x: torch.Tensor) -> torch.Tensor:
    """What was just computed, noted: nothing that comes between is waited for by what runs beside and reads it."""
    if _here.branch is not None:
        _here.branch.when_ready(x)
    return x


def early(find: Callable[[], Found], of: Sequence[torch.Tensor | None]) -> Found:
    """What ``find`` makes of these, which nothing differentiates; in a capture with a branch as early as may be."""
    branch = _here.branch
    if branch is None:
        return find()
    there = [t for t in of if t is not None]
    return find() if any(map(_fills_the_device, there)) else branch.find(find, there)


def beside(run: Run) -> Run:
    """``run`` of (rows, weights), beside the rest where that pays."""

    def branched(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        branch = _here.branch
        if branch is None or _fills_the_device(x):
            return run(x, *weights)
        return branch.run(run, x, weights)

    return branched


def _fills_the_device(t: torch.Tensor) -> bool:
    return t.dim() == 0 or t.shape[:-1].numel() > MOST_ROWS
