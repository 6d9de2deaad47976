"""Parts of a captured call that run beside the rest of it.

A CUDA graph runs kernels in the order in which one stream was given them, one after the other, and with few
atoms none of them fills the device. Radial MLPs wait for nothing but the lengths of edges, and nobody but
the edges' own derivative waits for their gradients: captured on a stream of their own, they and their
gradients (autograd gives a node's the stream of its forward) are a branch of the graph.

Memory that one stream frees is taken again without waiting for the other. What passes between the two is
therefore kept until the capture ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from e3nn_accel.compat import version_counter

MOST_ROWS = 16384
"""Of what runs beside: more fill the device by themselves, and would be kept.

An H200's replays of 2928, 9852 and 23410 edges take 7, 9 and -1 % less time with branches.
"""

Run = Callable[..., torch.Tensor]


class Branch:
    """Of one capture: a second stream, and what passed between it and the first."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._kept: list[torch.Tensor] = []
        self._ready: dict[tuple[int, int | None], torch.cuda.Event] = {}

    def run(self, run: Run, x: torch.Tensor, others: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """On the second stream, as soon as ``x`` is there; ``others`` were there before the capture."""
        main = torch.cuda.current_stream(x.device)
        self.stream.wait_event(self._when_ready(x, main))
        with torch.cuda.stream(self.stream):
            out = run(self._with_its_gradient_kept(x.view_as(x)), *others)
        main.wait_stream(self.stream)
        return self._with_its_gradient_kept(out)

    def _when_ready(self, x: torch.Tensor, main: torch.cuda.Stream) -> torch.cuda.Event:
        """An event after what computed ``x``, the earliest that is known."""
        key = id(x), version_counter(x)
        if key not in self._ready:
            self._kept.append(x)  # another could get its number
            self._ready[key] = main.record_event()
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


def beside(run: Run) -> Run:
    """``run`` of (rows, weights), beside the rest where that pays."""

    def branched(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        branch = _here.branch
        if branch is None or x.dim() == 0 or x.shape[:-1].numel() > MOST_ROWS:
            return run(x, *weights)
        return branch.run(run, x, weights)

    return branched
