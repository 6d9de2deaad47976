"""What runs beside the rest of a captured call, with streams that note what they are told."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from e3nn_accel import branches
from e3nn_accel.branches import Streams, begun, beside, branching, early, is_ready
from e3nn_accel.groupings import NodesBySpecies

pytestmark = pytest.mark.once


@dataclass(eq=False)
class Stream:
    """In place of a CUDA stream: an event is the number of things its stream was given before."""

    name: str
    given: list[str] = field(default_factory=list)
    device = torch.device("cpu")

    def record_event(self) -> str:
        return f"{self.name} {len(self.given)}"

    def wait_event(self, event: str) -> None:
        self.given.append(f"waits for {event}")

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Device:
    """Has a current stream."""

    def __init__(self) -> None:
        self.main, self.side, self.ahead = Stream("main"), Stream("side"), Stream("ahead")
        self.current = self.main
        self.streams: Any = Streams(self.side, self.ahead)  # type: ignore[arg-type]

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def does(self, what: str) -> None:
        self.current.given.append(what)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(torch.cuda, "current_stream", found.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", found.stream)
    return found


def product(device: Device, name: str) -> branches.Run:
    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        device.does(name)
        return x @ w

    return beside(run)


def test_it_waits_for_its_operand_alone(device: Device) -> None:
    """And what comes after waits for it; the second product for the first, on the same stream."""
    x, w = torch.ones(3, 2), torch.ones(2, 2)
    first, second = product(device, "first"), product(device, "second")
    with branching(device.streams):
        device.does("x")
        is_ready(x)
        device.does("something else")
        first(x, w)
        device.does("a layer")
        second(x, w)
    assert device.side.given == ["waits for main 1", "first", "waits for main 1", "second"]
    assert device.main.given == [
        "x", "something else", "waits for side 2", "a layer", "waits for side 4", "waits for side 4",
    ]  # fmt: skip
    assert device.ahead.given == []


def test_what_was_made_beside_is_waited_for_as_soon_as_it_is_there(device: Device) -> None:
    """Not what the first stream was given since: a radial MLP of a radial embedding."""
    x, w = torch.ones(3, 2), torch.ones(2, 2)
    with branching(device.streams):
        device.does("lengths")
        is_ready(x)
        device.does("something else")
        embedding = is_ready(product(device, "embedding")(x, w))
        device.does("a layer")
        product(device, "net")(embedding, w)
    assert device.side.given == ["waits for main 1", "embedding", "waits for side 2", "net"]
    assert device.main.given == [
        "lengths", "something else", "waits for side 2", "a layer", "waits for side 4", "waits for side 4",
    ]  # fmt: skip


def test_an_operand_that_nobody_noted_or_that_changed(device: Device) -> None:
    """Whatever the stream was given before may have made it."""
    x, w = torch.ones(3, 2), torch.ones(2, 2)
    run = product(device, "product")
    with branching(device.streams):
        device.does("x")
        run(x, w)
        device.does("x again")
        x.add_(1)
        run(x, w)
    assert device.side.given == ["waits for main 1", "product", "waits for main 3", "product"]


def test_what_is_made_of_frozen_weights_or_of_the_batch(device: Device) -> None:
    """Waits for the capture's begin, or for the batch as it was then. Only the end waits for what nobody reads."""
    batch, weight = torch.arange(3.0), torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def find(name: str, *of: torch.Tensor) -> torch.Tensor:
        def found() -> torch.Tensor:
            device.does(name)
            return sum(of, torch.zeros(3))

        return early(found, of)

    with branching(device.streams):
        is_ready(batch)
        device.does("a layer")
        assert torch.equal(find("basis", weight), torch.ones(3))
        assert torch.equal(find("order", batch, weight), batch + 1)
        unread = begun(lambda: device.does("another"), (batch,))
        device.does("a second layer")
        with device.stream(device.side):
            assert unread.get() is None
        device.does("a third")
    assert device.ahead.given == [
        "waits for main 0", "basis", "waits for main 0", "waits for main 0", "order",
        "waits for main 0", "another",
    ]  # fmt: skip
    assert device.main.given == [
        "a layer", "waits for ahead 2", "waits for ahead 5", "a second layer", "a third", "waits for ahead 7",
    ]  # fmt: skip
    assert device.side.given == ["waits for ahead 7"]


def test_ahead_of_what_runs_beside(device: Device) -> None:
    """Within a radial MLP, too, and within gradients, which autograd's thread finds on the streams of the forward."""
    weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    halves = lambda: early(lambda: device.does("halves"), (weight,))  # noqa: E731

    def run(x: torch.Tensor) -> torch.Tensor:
        halves()
        device.does("product")
        return x * 2

    x = torch.ones(3, requires_grad=True)
    with branching(device.streams):
        out = beside(run)(is_ready(x))
        thread = threading.Thread(target=halves)
        thread.start()
        thread.join()
        del out
    assert device.ahead.given == ["waits for main 0", "halves"] * 2
    assert device.side.given == ["waits for main 0", "waits for ahead 2", "product"]
    assert "waits for ahead 4" in device.main.given


def test_what_is_made_of_what_was_found_ahead(device: Device) -> None:
    """Waits for that alone, not for what came between."""
    batch, weight = torch.ones(3), torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def find() -> NodesBySpecies:
        device.does("order")
        return NodesBySpecies(None, 1, batch.int(), batch.int(), torch.zeros(3))

    with branching(device.streams):
        is_ready(batch)
        nodes = early(find, (batch,))
        device.does("a layer")
        early(lambda: device.does("halves of those that occur"), (weight, nodes.first))
    assert device.ahead.given == [
        "waits for main 0", "order", "waits for main 0", "waits for ahead 2", "halves of those that occur",
    ]  # fmt: skip


def test_another_stream_than_those_of_the_capture(device: Device) -> None:
    """Another thread's call meanwhile."""
    with branching(device.streams), device.stream(Stream("another")):
        early(lambda: device.does("found"), (torch.ones(3),))
        assert device.current.given == ["found"]
    assert device.main.given == device.ahead.given == []


def test_elsewhere_it_is_a_call(device: Device) -> None:
    """Without a branch, within a graph of many edges, and after a capture."""
    x, w = torch.ones(3, 2), torch.ones(2, 2)
    run = product(device, "product")
    assert torch.equal(run(is_ready(x), w), x @ w)
    with branching(None):
        run(x, w)
    with branching(device.streams):
        run(torch.ones(branches.MOST_ROWS + 1, 2), w)
    run(x, w)
    assert device.main.given == ["product"] * 4
    assert device.side.given == []


def test_what_passes_between_streams_is_kept(device: Device) -> None:
    """Results, operands and both gradients, until the capture ends; gradients are what they are without."""
    w = torch.randn(2, 2)
    run = product(device, "product")
    x = torch.randn(3, 2, requires_grad=True)
    (expected,) = torch.autograd.grad((x @ w).sin().sum(), x)
    with branching(device.streams):
        out = run(x, w)
        (found,) = torch.autograd.grad(out.sin().sum(), x)
        branch = branches.branches_of_streams[device.main]  # type: ignore[index]
        kept = [t.data_ptr() for t in branch._kept if isinstance(t, torch.Tensor)]
        assert {x.data_ptr(), out.data_ptr()} <= set(kept)
        assert (
            len(kept) == 5
        )  # x twice: as it was given, and as it was taken; with its gradient and that of out
    assert not branches.branches_of_streams
    torch.testing.assert_close(found, expected)
