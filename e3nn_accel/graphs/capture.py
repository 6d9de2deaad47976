"""Warm up, capture, replay.

A `Lane` is what the captured graphs of one model share: a stream to capture on, a pool of memory, and
the knowledge on which stream the last replay ran. Graphs that share a pool overwrite each other's
results, so they run one after the other, and results are copied out before the next.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from e3nn_accel.branches import Streams, branching
from e3nn_accel.compat import current_stream_function
from e3nn_accel.graphs.outputs import Produced
from e3nn_accel.groupings import one_capture

if TYPE_CHECKING:
    from e3nn_accel.graphs.derivative import Derivative

WARM_UPS = 3
"""TorchScript, in which e3nn has its spherical harmonics, compiles at the second and third call."""
MOST_OF_DEVICE = 0.25
"""Captured graphs of one model may take this share of the device's memory."""

_stream_address = current_stream_function()
Run = Callable[[], Produced]
Found = TypeVar("Found")


def warm_up(run: Run, derivative: Derivative | None, first: bool) -> None:
    """Run what will be captured."""
    produced = run()
    if derivative is not None:
        if first:
            derivative.prepare(produced)
        derivative(produced)


class Recording(Protocol):
    """A captured run.

    Attributes:
        produced: Its results, overwritten by each replay.
        bytes: Of device memory that the pool grew by.
        derivative: Of a run that can be differentiated.
    """

    produced: Produced
    bytes: int
    derivative: Derivative | None

    def replay(self) -> None:
        """Run it again on what its inputs hold now."""
        ...

    def replay_gradients(self) -> tuple[torch.Tensor | None, ...]:
        """The derivative of what the last replay produced, on the gradients that were loaded."""
        ...


class Lane(Protocol):
    """Where the runs of one model are recorded.

    Attributes:
        limit: Bytes that all of them may take.
        left: What the last replay left for its gradients (`TrainingStep.left`), or None.
    """

    limit: int
    left: object

    def allocating(self) -> AbstractContextManager[None]:
        """For tensors that belong to recordings."""
        ...

    def enter(self) -> None:
        """Before inputs are copied in: what the last replay does comes first."""
        ...

    def record(self, run: Run, derivative: Derivative | None = None) -> Recording:
        """Warm up and capture, the run and its derivative; raises what keeps it from being captured."""
        ...


@dataclass
class CudaRecording:
    """A CUDA graph; launched on the current stream of its device."""

    graph: torch.cuda.CUDAGraph
    produced: Produced
    bytes: int
    derivative: Derivative | None = None
    of_gradients: torch.cuda.CUDAGraph | None = None
    gradients: tuple[torch.Tensor | None, ...] = ()

    def replay(self) -> None:
        """One launch."""
        self.graph.replay()

    def replay_gradients(self) -> tuple[torch.Tensor | None, ...]:
        """One launch; overwritten by the next."""
        assert self.of_gradients is not None
        self.of_gradients.replay()
        return self.gradients


class CudaLane:
    """On one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._branches = Streams(torch.cuda.Stream(device), torch.cuda.Stream(device))
        self._pool = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.Stream | None = None
        self._last_address = -1
        self.left: object = None
        total = torch.cuda.get_device_properties(device).total_memory
        self.limit = int(MOST_OF_DEVICE * total)

    def enter(self) -> None:
        """A caller on another stream than the last waits for that one, on the device."""
        address = _stream_address(self._device.index)
        if address == self._last_address:
            return
        current = torch.cuda.current_stream(self._device)
        if self._last is not None:
            current.wait_stream(self._last)
        self._last, self._last_address = current, address

    @contextlib.contextmanager
    def allocating(self) -> Iterator[None]:
        """On the stream of captures: what is freed there goes to no caller while a replay still reads it."""
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def record(self, run: Run, derivative: Derivative | None = None) -> CudaRecording:
        """Warm up and capture on a stream of its own."""
        with torch.cuda.device(self._device):
            self._warm_up(run, derivative)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # of the warm-up: the graph has a pool of its own
            before = torch.cuda.memory_reserved()
            # of a training step the gradients are a graph of their own: no stream could join the two
            graph, produced = self._capture(run, self._branches if derivative is None else None)
            recording = CudaRecording(graph, replace(produced, live=None), 0, derivative)
            if derivative is not None:
                recording.of_gradients, recording.gradients = self._capture(
                    lambda: derivative(produced)
                )
            recording.bytes = torch.cuda.memory_reserved() - before
            return recording

    def _warm_up(self, run: Run, derivative: Derivative | None) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for n in range(WARM_UPS):
                warm_up(run, derivative, first=n == 0)
        current.wait_stream(self._stream)

    def _capture(
        self, run: Callable[[], Found], branches: Streams | None = None
    ) -> tuple[torch.cuda.CUDAGraph, Found]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream), _no_garbage_collection():
                # other threads may do on the device what they like meanwhile
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    with one_capture(), branching(branches):
                        found = run()
                except BaseException:
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except BaseException:
            self._recover()
            raise
        return graph, found

    def _recover(self) -> None:
        """After a capture that failed.

        torch leaves its random generator as it is within a capture then, and every later random
        number on the device is an error; a capture that succeeds puts that right.
        """
        self._pool = torch.cuda.graph_pool_handle()
        with contextlib.suppress(RuntimeError), torch.cuda.stream(self._stream):
            torch.cuda.synchronize()
            number = torch.zeros(1, device=self._device)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            number.add_(1)
            graph.capture_end()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What it would free on the device can't be freed within a capture."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
