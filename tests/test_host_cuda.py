"""CUDA C++ on the CPU means what it means on a GPU, and mistakes don't pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from host_kernels import HostCompiler, compiler
from host_launch import HostError, HostKernel
from kernel_programs import axpy

from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(compiler() is None, reason="there is no g++"),
]

CPU = torch.device("cpu")
SIGNATURES = {
    "sum": "PP",
    "lanes": "P",
    "half_warp": "P",
    "left_over": "P",
    "stuck": "P",
    "gone": "P",
    "beyond": "Pi",
}
BLOCK = KernelProgram(
    "block", "block.cu", tuple(SIGNATURES), macros=("BARRIER=__syncthreads()",), package="kernel_files"
)  # fmt: skip

SANITIZERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("thread", "address")]
BUILDS = [pytest.param("", id="fibers"), *SANITIZERS]


def load(folder: Path, program: KernelProgram, name: str, sanitizer: str = "") -> HostKernel:
    (loaded,) = HostCompiler(folder, sanitizer).load_all([program], CPU, Config())
    return loaded.kernel(name, {"axpy": "PPqf", "reverse": "Pi"}.get(name) or SIGNATURES[name])


@pytest.mark.parametrize("sanitizer", BUILDS)
def test_sums_and_lanes(host_folder: Path, sanitizer: str) -> None:
    """Barriers, shuffles, votes and atomics, as fibers and as threads."""
    x, out = torch.arange(192.0), torch.zeros(1)
    load(host_folder, BLOCK, "sum", sanitizer)((2, 1, 1), (96, 1, 1), x, out)
    assert float(out) == float(x.sum())
    rows = torch.zeros(64, 6, dtype=torch.int32)
    load(host_folder, BLOCK, "lanes", sanitizer)((1, 1, 1), (64, 1, 1), rows)
    lane = torch.arange(64) % 32
    up = torch.where(lane % 8 >= 2, lane - 2, lane)
    down = torch.where(lane % 8 < 6, lane + 2, lane)
    expected = [torch.full((64,), 5), up, down, lane ^ 16, torch.full((64,), 7), torch.ones(64)]
    assert torch.equal(rows, torch.stack([t.int() for t in expected], 1))
    swapped = torch.zeros(32, dtype=torch.int32)
    load(host_folder, BLOCK, "half_warp", sanitizer)((1, 1, 1), (32, 1, 1), swapped)
    assert torch.equal(swapped[:16], torch.arange(16).int() ^ 1)
    assert torch.equal(swapped[16:], torch.arange(16, 32).int())


def test_arguments_and_dynamic_shared_memory(host_folder: Path) -> None:
    """As the tests of the launch on a GPU."""
    x, y = torch.rand(1000), torch.zeros(1000)
    load(host_folder, axpy(), "axpy")((8, 1, 1), (128, 1, 1), x, y, 1000, 1.5)
    torch.testing.assert_close(y, 3 * x)
    z = torch.arange(100.0)
    load(host_folder, axpy(), "reverse")((1, 1, 1), (32, 1, 1), z, 100, shared=400)
    assert torch.equal(z, torch.arange(100.0).flip(0))


def test_shared_memory_is_forgotten_between_blocks(host_folder: Path) -> None:
    out = torch.zeros(2, 32)
    load(host_folder, BLOCK, "left_over")((2, 1, 1), (32, 1, 1), out)
    assert bool((out[0] == 1).all())
    assert bool(out[1].isnan().all())


def test_a_missing_barrier_shows(host_folder: Path) -> None:
    """The sum misses what other warps write later."""
    program = replace(BLOCK, macros=("BARRIER=",))
    x, out = torch.ones(96), torch.zeros(1)
    load(host_folder, program, "sum")((1, 1, 1), (96, 1, 1), x, out)
    assert bool(out.isnan())


@pytest.mark.slow
def test_a_missing_barrier_is_a_race(host_folder: Path) -> None:
    """ThreadSanitizer says so."""
    program = replace(BLOCK, macros=("BARRIER=",))
    launch = load(host_folder, program, "sum", "thread")
    with pytest.raises(HostError, match="data race"):
        launch((1, 1, 1), (96, 1, 1), torch.ones(96), torch.zeros(1))


@pytest.mark.slow
def test_a_write_beyond_the_end_is_found(host_folder: Path) -> None:
    """By AddressSanitizer, with the line of the kernel."""
    with pytest.raises(HostError, match=r"heap-buffer-overflow(.|\n)*block\.cu:\d+"):
        load(host_folder, BLOCK, "beyond", "address")((1, 1, 1), (32, 1, 1), torch.zeros(50), 50)


@pytest.mark.parametrize(("kernel", "words"), [("stuck", "never reach"), ("gone", "takes no part")])
def test_what_is_undefined_on_a_gpu_is_an_error(host_folder: Path, kernel: str, words: str) -> None:
    launch = load(host_folder, BLOCK, kernel)
    with pytest.raises(HostError, match=words):
        launch((1, 1, 1), (32, 1, 1), torch.zeros(32, dtype=torch.int32))
    with pytest.raises(HostError, match=words):  # and the next launch is none the worse
        launch((1, 1, 1), (32, 1, 1), torch.zeros(32, dtype=torch.int32))


def test_a_launch_unlike_the_declaration_is_an_error(host_folder: Path) -> None:
    """What the driver would take for another thing, or read beyond."""
    (program,) = HostCompiler(host_folder).load_all([axpy()], CPU, Config())
    with pytest.raises(HostError, match="takes"):
        program.kernel("axpy", "PPif")
    with pytest.raises(ValueError, match="not 'missing'"):
        program.kernel("missing", "P")
    launch, one, x = program.kernel("axpy", "PPqf"), (1, 1, 1), torch.zeros(10)
    with pytest.raises(HostError, match=r"argument 1 is torch\.float64"):
        launch(one, one, x, x.double(), 10, 1.0)
    with pytest.raises(HostError, match="argument 0 is not contiguous"):
        launch(one, one, x[::2], x, 5, 1.0)
    with pytest.raises(HostError, match="argument 2 is tensor"):
        launch(one, one, x, x, x, 1.0)
    with pytest.raises(HostError, match="more than CUDA allows"):
        launch((1, 70000, 1), one, x, x, 10, 1.0)


def test_a_source_that_does_not_compile_says_where(host_folder: Path) -> None:
    program = axpy(code='#include "plan.cuh"\n__global__ void axpy() { nonsense; }\n')
    with pytest.raises(HostError, match=r"axpy\.cu:\d+.*'?‘?nonsense"):
        HostCompiler(host_folder).load_all([program], CPU, Config())
