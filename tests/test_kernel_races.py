"""Barriers of the convolution kernels: enough of them, and none for nothing.

A test of barriers is worth something if it fails without them, so each is left out in turn.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import accelerated, derivatives
from convolution_parity import check, every_path, fused, hub, operands_of
from graphs import random_edges
from host_kernels import HostCompiler, race_shown
from kernel_barriers import barriers, without

from e3nn_accel.backends.cuda import convolution_kernels

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64"),
]

FILES = {"convolution.cu": 0, "convolution_staged.cu": 90}
"""And a compute capability that they are for."""
PRODUCT = ("40x0e+36x1o", "0e+1o", "0e+1o")
"""Two warps, of which one has idle lanes; rows of whole 16 bytes."""


@pytest.fixture
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Plans are made for the compute capability that a kernel file is for."""
    found = FILES[request.param]
    monkeypatch.setattr(convolution_kernels, "architecture_of", lambda device: found)
    return found


def each_barrier(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for each."""
    numbers = [
        pytest.param(file, file, n, id=f"{file} {n}") for file in FILES for n in barriers(file)
    ]
    return pytest.mark.parametrize(
        ("architecture", "file", "barrier"), numbers, indirect=["architecture"]
    )(test)


def all_derivatives() -> dict[str, torch.Tensor]:
    """By the kernels forward, backward, double and the sum by sender."""
    module, ends = every_path(*PRODUCT), random_edges(7, 150, seed=4)
    ends[1, 10:110] = 1  # more than three batches
    operands = operands_of(module, 7, ends.shape[1], torch.float64)
    with accelerated(self_check=False):
        return derivatives(fused(module, ends), operands).tensors


@pytest.mark.parametrize("architecture", ["convolution.cu"], indirect=True)
@pytest.mark.parametrize("barrier", barriers("convolution.cu"))
def test_no_barrier_is_for_nothing(
    architecture: int, barrier: int, kernels_on_host: HostCompiler
) -> None:
    """Fibers take their turns in an order in which a missing barrier changes the result.

    The staged kernels' would end this process: rows are asked for by numbers that aren't there yet.
    """
    whole = all_derivatives()
    kernels_on_host.change = without("convolution.cu", barrier)
    broken = all_derivatives()
    assert not all(torch.equal(broken[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FILES, indirect=True)
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sanitizers_find_nothing(
    architecture: int, sanitizer: str, dtype: torch.dtype, kernels_on_host: HostCompiler
) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    module, ends = every_path(*PRODUCT), hub()
    check(module, ends, operands_of(module, 7, ends.shape[1], dtype), dtype)


@pytest.mark.slow
@each_barrier
def test_a_missing_barrier_is_a_race(
    architecture: int, file: str, barrier: int, kernels_on_host: HostCompiler
) -> None:
    """ThreadSanitizer says so, of each; or it dies of an index that isn't written yet."""
    kernels_on_host.sanitizer, kernels_on_host.change = "thread", without(file, barrier)
    with race_shown():
        all_derivatives()
