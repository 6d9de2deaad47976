"""Parts of a captured call that run beside the rest of it.

A CUDA graph runs kernels in the order in which one stream was given them, one after the other, and with few
atoms none of them fills the device. So a capture has two more streams, each a branch of the graph:

- Beside: the radial embedding and radial MLPs wait for nothing but the lengths of edges, and nobody but the edges'
  own derivative waits for their gradients (autograd gives a node's the stream of its forward).
- Ahead: what is made of the batch or of frozen weights alone, the order of nodes by species, weights in a
  reduced basis or cut in halves. It waits for nothing that the model computes, and is waited for where it is used.

Memory that one stream frees is taken again without waiting for the others. What passes between them is
therefore kept until the capture ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from e3nn_accel.compat import version_counter

MOST_ROWS = 16384
"""Of what runs beside: more fill the device by themselves, and would be kept.

An H200's replays of 2928, 9852 and 23410 edges take 7, 9 and -1 % less time with branches.
"""

Run = Callable[..., torch.Tensor]
Found = TypeVar("Found")


class Streams(NamedTuple):
    """Of a capture's branches."""

    beside: torch.cuda.Stream
    ahead: torch.cuda.Stream


class Branches:
    """Of one capture: two more streams, and what passed between them and the first."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self._kept: list[object] = []
        self._used: set[torch.cuda.Stream] = set()
        self._begun: torch.cuda.Event = _current(streams.beside.device).record_event()
        self._ready: dict[tuple[int, int | None], torch.cuda.Event] = {}

    def run(self, run: Run, x: torch.Tensor, others: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Beside the rest, as soon as ``x`` is there; ``others`` were there before the capture."""
        main, stream = _current(x.device), self._using(self.streams.beside)
        stream.wait_event(self.when_ready(x))
        with torch.cuda.stream(stream):
            out = run(self._with_its_gradient_kept(x.view_as(x)), *others)
            when = stream.record_event()
        main.wait_event(when)
        self._ready[id(out), version_counter(out)] = when  # for what else runs beside and reads it
        return self._with_its_gradient_kept(out)

    def find(self, find: Callable[[], Found], of: Sequence[torch.Tensor]) -> Early[Found]:
        """Ahead of the rest, as soon as all of them are there."""
        stream = self._using(self.streams.ahead)
        for t in of:
            stream.wait_event(self.when_ready(t))
        with torch.cuda.stream(stream):
            found = find()
        self._kept.append(found)
        when = stream.record_event()
        for t in _tensors_of(found):
            self._ready[id(t), version_counter(t)] = when
        return Early(found, when, stream.device)

    def join(self, main: torch.cuda.Stream) -> None:
        """A capture ends in the stream where it began: what was begun ahead, and perhaps not used, ends before."""
        for stream in self.streams:
            if stream in self._used:
                main.wait_stream(stream)

    def when_ready(self, x: torch.Tensor) -> torch.cuda.Event:
        """An event after what computed ``x``, the earliest that is known."""
        if isinstance(x, torch.nn.Parameter):
            return self._begun
        key = id(x), version_counter(x)
        if key not in self._ready:
            self._kept.append(x)  # another could get its number
            self._ready[key] = _current(x.device).record_event()
        return self._ready[key]

    def _using(self, stream: torch.cuda.Stream) -> torch.cuda.Stream:
        self._used.add(stream)
        return stream

    def _with_its_gradient_kept(self, t: torch.Tensor) -> torch.Tensor:
        self._kept.append(t)
        if t.requires_grad:
            t.register_hook(self._kept.append)
        return t


@dataclass(frozen=True)
class Early(Generic[Found]):
    """What was begun, perhaps ahead of the rest.

    Attributes:
        found: To be read by whoever has waited.
        when: An event after it; None where whatever comes next comes after it.
        device: The event's.
    """

    found: Found
    when: torch.cuda.Event | None = None
    device: torch.device | None = None

    def get(self) -> Found:
        """It, waited for by the current stream."""
        if self.when is not None:
            assert self.device is not None
            _current(self.device).wait_event(self.when)
        return self.found


branches_of_streams: dict[torch.cuda.Stream, Branches] = {}
"""By each stream of a capture: autograd's thread, whose gradients are captured, too, has those of the forward."""


@contextmanager
def branching(streams: Streams | None) -> Iterator[None]:
    """Around a capture on the current stream, and its branches' streams; None: it has none."""
    if streams is None:
        yield
        return
    main = _current(streams.beside.device)
    branches = Branches(streams)
    branches_of_streams.update(dict.fromkeys((main, *streams), branches))
    try:
        yield
        branches.join(main)
    finally:
        for stream in (main, *streams):
            del branches_of_streams[stream]


def is_ready(x: torch.Tensor) -> torch.Tensor:
    """What was just computed, noted: nothing that comes between is waited for by what runs beside and reads it."""
    branches = _branches_of(x)
    if branches is not None:
        branches.when_ready(x)
    return x


def begun(find: Callable[[], Found], of: Sequence[torch.Tensor | None]) -> Early[Found]:
    """What ``find`` makes of these, which nothing differentiates; in a capture with branches as early as may be."""
    there = [t for t in of if t is not None]
    branches = _branches_of(there[0]) if branches_of_streams and there else None
    if branches is None or any(map(_fills_the_device, there)):
        return Early(find())
    return branches.find(find, there)


def early(find: Callable[[], Found], of: Sequence[torch.Tensor | None]) -> Found:
    """The same, waited for."""
    return begun(find, of).get() if branches_of_streams else find()


def beside(run: Run) -> Run:
    """``run`` of (rows, weights), beside the rest where that pays."""

    def branched(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        branches = _branches_of(x)
        if branches is None or _fills_the_device(x):
            return run(x, *weights)
        return branches.run(run, x, weights)

    return branched


def _branches_of(x: torch.Tensor) -> Branches | None:
    """Of the capture that the current stream is of."""
    return branches_of_streams.get(_current(x.device)) if branches_of_streams else None


def _tensors_of(found: Any) -> list[torch.Tensor]:
    """Those of what was found: a tensor, or a dataclass of some."""
    each = [found, *vars(found).values()] if is_dataclass(found) else [found]
    return [t for t in each if isinstance(t, torch.Tensor)]


def _current(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.current_stream(device)


def _fills_the_device(t: torch.Tensor) -> bool:
    return t.dim() == 0 or t.shape[:-1].numel() > MOST_ROWS
