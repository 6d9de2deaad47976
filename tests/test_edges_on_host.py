"""The kernel that orders the edges of small graphs, on the CPU."""

from __future__ import annotations

import pytest
import torch
from edges_parity import CASES, check
from host_kernels import HostCompiler
from host_launch import HostError
from kernel_barriers import barriers, without

FILE = "edges.cu"
pytestmark = [pytest.mark.once, pytest.mark.usefixtures("kernels_on_host")]


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(sanitizer: str, kernels_on_host: HostCompiler) -> None:
    kernels_on_host.sanitizer = sanitizer
    check("several blocks")


@pytest.mark.slow
@pytest.mark.parametrize("barrier", barriers(FILE))
def test_a_missing_barrier_is_a_race(barrier: int, kernels_on_host: HostCompiler) -> None:
    kernels_on_host.sanitizer, kernels_on_host.change = "thread", without(FILE, barrier)
    with pytest.raises((HostError, AssertionError), match=r"data race|by_|first"):
        check("several blocks")


def test_no_edges_without_memory() -> None:
    """An index that lies nowhere."""
    empty = torch.empty(2, 0, dtype=torch.int64)
    assert empty.data_ptr() == 0
    check("no edges")
