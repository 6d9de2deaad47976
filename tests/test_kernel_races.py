"""Barriers of the convolution kernels: enough of them, and none for nothing.

A test of barriers is worth something if it fails without them, so each is left out in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import resources

import pytest
import torch
from comparison import accelerated, derivatives
from convolution_parity import check, every_path, fused, hub, operands_of
from host_kernels import HostCompiler
from host_launch import HostError

from e3nn_accel.compile import KernelProgram

pytestmark = pytest.mark.usefixtures("eager_e3nn", "float64")

BARRIER = "__syncthreads();"
KERNELS = resources.files("e3nn_accel.kernels")
BARRIERS = range(KERNELS.joinpath("convolution.cu").read_text().count(BARRIER))
PRODUCT = ("40x0e+33x1o", "0e+1o", "0e+1o")
"""Two warps, of which one has idle lanes."""


def without(barrier: int) -> Callable[[KernelProgram], KernelProgram]:
    """Leaves out one barrier of the kernel file."""

    def change(program: KernelProgram) -> KernelProgram:
        parts = KERNELS.joinpath(program.file).read_text().split(BARRIER)
        parts[barrier : barrier + 2] = ["".join(parts[barrier : barrier + 2])]
        return replace(program, code=BARRIER.join(parts))

    return change


def all_derivatives() -> dict[str, torch.Tensor]:
    """By the kernels forward, backward, double and gather."""
    module, ends = every_path(*PRODUCT), hub()
    operands = operands_of(module, 7, ends.shape[1], torch.float64)
    with accelerated(self_check=False):
        return derivatives(fused(module, ends), operands).tensors


@pytest.mark.parametrize("barrier", BARRIERS)
def test_no_barrier_is_for_nothing(barrier: int, kernels_on_host: HostCompiler) -> None:
    """Fibers take their turns in an order in which a missing barrier changes the result."""
    whole = all_derivatives()
    kernels_on_host.change = without(barrier)
    broken = all_derivatives()
    assert not all(torch.equal(broken[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sanitizers_find_nothing(
    sanitizer: str, dtype: torch.dtype, kernels_on_host: HostCompiler
) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    module, ends = every_path(*PRODUCT), hub()
    check(module, ends, operands_of(module, 7, ends.shape[1], dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_a_race(barrier: int, kernels_on_host: HostCompiler) -> None:
    """ThreadSanitizer says so, of each; or it dies of an index that isn't written yet."""
    kernels_on_host.sanitizer, kernels_on_host.change = "thread", without(barrier)
    with pytest.raises(HostError, match=r"data race|ThreadSanitizer: SEGV"):
        all_derivatives()
