"""The captured sizes of one model: a handful, the least recently used one goes first."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from e3nn_accel.graphs.buffers import StaticInputs
from e3nn_accel.graphs.capture import Lane, Recording
from e3nn_accel.graphs.padding import Capacity, Size

MOST = 4
"""Captured sizes that are kept of one model."""
MOST_WAITING = 16


@dataclass(frozen=True)
class Captured:
    """One captured call.

    Attributes:
        key: Whatever else than the size a call must share with it.
        capacity: What it was padded to.
        lane: Where it was recorded.
    """

    key: tuple[Hashable, ...]
    capacity: Capacity
    inputs: StaticInputs
    recording: Recording
    lane: Lane

    def takes(self, size: Size) -> bool:
        """Whether a batch of this size fits, as that of the last call does."""
        return size is self.inputs.size or self.capacity.takes(size)


@dataclass
class Store:
    """What was captured, the most recently used last; and sizes that may yet be.

    Attributes:
        pool: Bytes of the memory that the captured graphs share. It stays while one of them is kept.
    """

    kept: list[Captured] = field(default_factory=list)
    pool: int = 0
    _waiting: dict[tuple[Hashable, Capacity], int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of device memory, with the inputs."""
        return self.pool + sum(captured.inputs.bytes for captured in self.kept)

    @property
    def last(self) -> Captured | None:
        """The most recently used."""
        return self.kept[-1] if self.kept else None

    def find(self, key: Hashable, size: Size) -> Captured | None:
        """The smallest that takes a call, from now on the most recently used."""
        last = self.last
        if last is not None and last.key == key and last.takes(size):
            return last
        fitting = [c for c in self.kept if c.key == key and c.capacity.takes(size)]
        if not fitting:
            return None
        found = min(fitting, key=lambda c: (c.capacity.edges, c.capacity.nodes))
        self.kept.remove(found)
        self.kept.append(found)
        return found

    def seen(self, key: Hashable, size: Size) -> tuple[Capacity, int]:
        """What a call would be padded to, and how many calls of that kind there were, this one included."""
        for (other, capacity), calls in self._waiting.items():
            if other == key and capacity.takes(size):
                self._waiting[other, capacity] = calls + 1
                return capacity, calls + 1
        capacity = Capacity.of(size)
        self._waiting[key, capacity] = 1
        if len(self._waiting) > MOST_WAITING:
            del self._waiting[next(iter(self._waiting))]
        return capacity, 1

    def make_room(self) -> None:
        """Before one more is captured: its memory can then be that of what goes."""
        del self.kept[: max(0, len(self.kept) - MOST + 1)]

    def add(self, captured: Captured) -> None:
        """Keep it."""
        self._waiting.pop((captured.key, captured.capacity), None)
        self.kept.append(captured)
        self.pool += captured.recording.bytes

    def clear(self) -> None:
        """Forget everything."""
        self.kept.clear()
        self._waiting.clear()
        self.pool = 0

    def __str__(self) -> str:
        sizes = "; ".join(str(captured.capacity) for captured in self.kept)
        return f"{len(self.kept)} sizes kept, {self.bytes / 2**20:.0f} MiB ({sizes})"
