"""A computation captured in a CUDA graph by hand, as a user's own program captures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Compute = Callable[[], Sequence[torch.Tensor]]
WARM_UPS = 3


def warmed_up(compute: Compute) -> None:
    """Before a capture: on a stream of its own, as torch asks for."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            compute()
    torch.cuda.current_stream().wait_stream(stream)


def assert_replay_equals_eager(compute: Compute, change: Callable[[], object]) -> None:
    """Bit by bit, after ``change`` put other numbers into the same operands."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    with torch.no_grad():
        change()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, compute(), strict=True))
