"""The gradient of o3.Linear's weights in float64 by warps that copy, on the CPU, where copies are as late as can be."""

from __future__ import annotations

import pytest
import torch
from comparison import draw
from host_kernels import HostCompiler, race_shown
from kernel_barriers import barriers, without
from linear_parity import WEIGHTS_STAGED, paths_of
from weight_blocks_parity import gradient, launches_of_few

from e3nn_accel.backends.cuda import indexed_linear_launch, linear_weights_staged
from e3nn_accel.backends.cuda.indexed_linear_launch import IndexedLinearKernels
from e3nn_accel.backends.cuda.linear_weights_staged import weights_staged
from e3nn_accel.config import Config
from e3nn_accel.plan import PlanContext

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]
FILE = "linear_weights_staged.cu"
WAITS = r"(wait_until_full|wait_until_empty|was_read)\([^;{]*\);"


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each gradient of weights by such blocks; of however few it is called here, in blocks of a step or two."""
    return launches_of_few(monkeypatch, linear_weights_staged)


def test_what_is_not_finite_stays_in_its_channel_and_column(launches: list[int]) -> None:
    """Also where a last step lacks nodes, whose places are zeros, and a tile channels, whose places are anything."""
    x, g = draw((70, 96), 1), draw((70, 68), 2)
    x[3, 5], x[60, 7], g[5, 9], g[69, 11] = float("inf"), float("inf"), *[float("nan")] * 2
    wrong = ~torch.isfinite(gradient(x, g))
    assert launches
    assert wrong[[5, 7]].all()
    assert wrong[:, [9, 11]].all()
    assert wrong.sum() == 2 * 96 + 2 * 68 - 4


@pytest.mark.parametrize(
    ("irreps", "takes"),
    [
        *((irreps, True) for irreps in WEIGHTS_STAGED.values()),
        (("64x0e", "64x0e"), False),
        (("64x0e", "128x0e"), False),  # half of a tile
        (("32x0e", "1280x0e"), False),
        (("129x0e+1x1o", "128x0e"), False),  # not copied 16 bytes at a time
        (("128x7o", "128x7o"), False),  # two steps have no room
    ],
)
def test_which_are(irreps: tuple[str, str], takes: bool) -> None:
    """Whose tiles aren't nearly empty, on Hopper, in float64; of few rows another kernel's are used."""
    paths = paths_of(*irreps)
    for architecture, dtype in ((90, torch.float64), (90, torch.float32), (80, torch.float64)):
        context = PlanContext(dtype, torch.device("cpu"), Config(), architecture)
        files = {p.file for p in IndexedLinearKernels(paths, "", context).programs()}
        assert (FILE in files) == (takes and architecture == 90 and dtype == torch.float64)
        assert "indexed_linear_weights.cu" in files


@pytest.mark.parametrize("irreps", WEIGHTS_STAGED.values(), ids=str)
def test_blocks_have_room(irreps: tuple[str, str]) -> None:
    """Of the 227 KiB that a block may have."""
    assert weights_staged(paths_of(*irreps)).shared + 512 <= 227 * 1024


def every_wait() -> None:
    """More steps than slots, a last one that isn't full, and both orientations."""
    for x, g in ((132, 68), (64, 192)):
        here = draw((250, x), 1), draw((250, g), 2)
        found, exact = gradient(*here), here[0].T @ here[1] / x**0.5
        error = float((found - exact).norm() / exact.norm())
        assert error < 1e-14, f"error {error}"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(
    sanitizer: str, kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: 1)
    every_wait()


@pytest.mark.slow
@pytest.mark.parametrize("wait", barriers(FILE, WAITS))
def test_a_missing_wait_is_a_race(
    wait: int, kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ThreadSanitizer says so, of each; or a turn never comes, or results are wrong."""
    kernels_on_host.sanitizer, kernels_on_host.change = "thread", without(FILE, wait, WAITS)
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: 1)
    with race_shown():
        every_wait()
