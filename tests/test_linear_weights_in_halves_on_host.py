"""The gradient of o3.Linear's weights by halves, on the CPU, where copies and products are as late as they may be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparison import draw
from host_kernels import HostCompiler, race_shown
from kernel_barriers import barriers, without
from linear_parity import WEIGHTS_IN_HALVES, paths_of, scaled_weights, shrinkage
from weight_blocks_parity import gradient, launches_of_few

from e3nn_accel.backends.cuda import indexed_linear_launch, linear_weights_in_halves
from e3nn_accel.backends.cuda.indexed_linear_launch import IndexedLinearKernels
from e3nn_accel.backends.cuda.linear_weights_in_halves import LEAST, weights_in_halves
from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config
from e3nn_accel.plan import PlanContext

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]
FILE = "linear_weights_in_halves.cu"
WAITS = r"(__syncthreads\(\)|wait\(s\.full\[turn\], parity\));(?!\n    int block)"
"""All but that for barriers that are made: here the first thread has made them before another begins."""
VOTE = "__syncthreads_or(other)"


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each gradient of weights by halves; of however few it is called here, in blocks of a step or two."""
    return launches_of_few(monkeypatch, linear_weights_in_halves)


def test_sizes_of_rows_channels_and_columns(launches: list[int]) -> None:
    """None is lost beside others: numbers are multiplied by powers of two, which change from step to step."""
    errors, sizes = scaled_weights()
    assert launches
    assert (errors <= 1e-6 * sizes).all()


def test_errors_do_not_add_up(launches: list[int]) -> None:
    """Each short sum is rounded towards zero, and what that loses is made up for."""
    assert abs(shrinkage(width=256, rows=600)["dW"]) < 1.5e-8
    assert launches


def test_a_weight_depends_on_its_channel_and_column_alone(launches: list[int]) -> None:
    """To the bit, and so do numbers that aren't finite."""
    x, g = draw((70, 96), 1, torch.float32), draw((70, 68), 2, torch.float32)
    others_x, others_g = x.clone(), g.clone()
    others_x[:, 1::2] *= draw((70, 48), 3, torch.float32) * 1000
    others_g[:, 1::2] *= draw((70, 34), 4, torch.float32) * 1000
    others_x[3, 5], others_x[60, 7], others_g[5, 9], others_g[69, 11] = (
        *[float("inf")] * 2,
        *[float("nan")] * 2,
    )
    found, beside_others = gradient(x, g), gradient(others_x, others_g)
    assert launches
    assert torch.equal(found[::2, ::2], beside_others[::2, ::2])
    wrong = ~torch.isfinite(beside_others)
    assert wrong[[5, 7]].all()
    assert wrong[:, [9, 11]].all()
    assert wrong.sum() == 2 * 96 + 2 * 68 - 4


@pytest.mark.parametrize("size", [1e28, 1e-28])
def test_large_and_small_numbers(size: float, launches: list[int]) -> None:
    """That have products with those of the other side, whatever lies between."""
    x, g = draw((70, 96), 1, torch.float32), draw((70, 68), 2, torch.float32)
    x = x.clamp(-1, 1) * size
    found, exact = gradient(x, g / size).double(), x.double().T @ (g / size).double() / 96**0.5
    assert launches
    assert float((found - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize(
    ("irreps", "takes"),
    [
        *((irreps, True) for irreps in WEIGHTS_IN_HALVES.values()),
        (("64x0e", "64x0e"), False),
        (("32x0e", "1280x0e"), False),
        (("128x0e+128x1o", "16x0e"), False),
        (("130x0e", "128x0e"), False),  # not copied 16 bytes at a time
        (("128x0e+1x1o", "128x0e"), False),
    ],
)
def test_which_are(irreps: tuple[str, str], takes: bool) -> None:
    """Whose tiles aren't nearly empty, on Hopper, in float32; of few rows another kernel's are used."""
    paths = paths_of(*irreps)
    for architecture, dtype in ((90, torch.float32), (90, torch.float64), (80, torch.float32)):
        context = PlanContext(dtype, torch.device("cpu"), Config(), architecture)
        files = {p.file for p in IndexedLinearKernels(paths, "", context).programs()}
        assert (FILE in files) == (takes and architecture == 90 and dtype == torch.float32)
        assert "indexed_linear_weights.cu" in files


@pytest.mark.parametrize("irreps", [*WEIGHTS_IN_HALVES.values(), ("256x7o", "256x7o")], ids=str)
def test_blocks_have_room_beside_one_another(irreps: tuple[str, str]) -> None:
    """Of a multiprocessor's 228 KiB, 1 of which is the system's for each block, and as much is left for barriers."""
    halved = weights_in_halves(paths_of(*irreps))
    assert LEAST.blocks * (halved.shared + 1024 + 1664) <= 228 * 1024


def every_wait() -> None:
    """More steps than slots and lots, powers of two that change, a last step that isn't full, and both orientations."""
    for x, g in ((132, 68), (64, 96)):
        rows = torch.linspace(1, 1000, 100, dtype=torch.float32)[:, None]
        here = draw((100, x), 1, torch.float32) * rows, draw((100, g), 2, torch.float32) * rows
        found, exact = gradient(*here).double(), here[0].double().T @ here[1].double() / x**0.5
        error = float((found - exact).norm() / exact.norm())
        assert error < 1e-6, f"error {error}"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(
    sanitizer: str, kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: 1)
    every_wait()


def without_vote(program: KernelProgram) -> KernelProgram:
    """By which threads wait for one another: each goes by what it has found itself."""
    if program.file != FILE:
        return program
    assert VOTE in program.source()
    return replace(program, code=program.source().replace(VOTE, "other"))


@pytest.mark.slow
@pytest.mark.parametrize("wait", [*barriers(FILE, WAITS), VOTE])
def test_a_missing_wait_is_a_race(
    wait: int | str, kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ThreadSanitizer says so, of each; or results are wrong."""
    change = without(FILE, wait, WAITS) if isinstance(wait, int) else without_vote
    kernels_on_host.sanitizer, kernels_on_host.change = "thread", change
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: 1)
    with race_shown():
        every_wait()
