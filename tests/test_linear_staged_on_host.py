"""o3.Linear on Hopper, with warps that copy for the others, on the CPU, where copies are as late as they may be."""

from __future__ import annotations

import pytest
import torch
from comparison import accelerated, draw
from host_kernels import HostCompiler, race_shown
from kernel_barriers import barriers, without
from linear_parity import STAGED, built, check, paths_of
from slow_cases import slow_but

from e3nn_accel.backends.cuda import indexed_linear_launch, linear_in_halves
from e3nn_accel.backends.cuda.indexed_linear_launch import IndexedLinearKernels
from e3nn_accel.backends.cuda.indexed_linear_tables import LinearTables
from e3nn_accel.backends.cuda.linear_in_halves import LinearInHalves
from e3nn_accel.config import Config
from e3nn_accel.plan import PlanContext

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]


@pytest.fixture(autouse=True)
def many_rows_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are many, and the device one that has bulk copies."""
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: 0)
    monkeypatch.setattr(indexed_linear_launch, "architecture_of", lambda device: 90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", slow_but([1, 64, 70, 150], 70))
@pytest.mark.parametrize("case", STAGED)
def test_values_and_derivatives(case: str, rows: int, dtype: torch.dtype) -> None:
    """A tile of one node, full tiles, and one that isn't; to the second derivative."""
    module = built(*STAGED[case])
    check(module, draw((rows, module.irreps_in.dim), 3).requires_grad_(), dtype)


@pytest.mark.parametrize("multiprocessors", [1, 2, 1000])
def test_blocks_that_stay(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has every so manyth tile, however many blocks there are; some have none."""
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", -1)
    module = built("128x0e+128x1o", "128x0e+256x1o")
    check(module, draw((150, module.irreps_in.dim), 3).requires_grad_(), torch.float32)


def without_copiers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float64 the kernels of other devices, of float32 those of blocks that don't stay."""
    if dtype == torch.float64:
        monkeypatch.setattr(indexed_linear_launch, "architecture_of", lambda device: 80)
    else:
        cut = linear_in_halves.Cut(64, 128, 32, 2, 3, warpgroups=True)
        monkeypatch.setattr(linear_in_halves, "cut_of", lambda *of: cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", STAGED)
def test_the_same_bits_as_without(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same products are added in the same order."""
    module = built(*STAGED[case]).to(dtype)
    x = draw((70, module.irreps_in.dim), 3, dtype).requires_grad_()
    found = []
    for _ in range(2):
        with accelerated(backend="cuda", self_check=False):
            out = module(x)
            found.append((out.detach(), *torch.autograd.grad(out.square().sum(), x)))
        without_copiers(dtype, monkeypatch)
    for ours, other in zip(*found, strict=True):
        assert torch.equal(ours, other)


def test_what_is_not_finite_stays_in_its_row() -> None:
    """In room that had another tile's rows before."""
    module = built("128x0e+128x1o", "128x0e+128x1o").float()
    x = draw((150, module.irreps_in.dim), 1, torch.float32)
    x[3, 0], x[5, 200] = float("inf"), float("nan")
    with accelerated(backend="cuda", self_check=False), torch.no_grad():
        finite = torch.isfinite(module(x)).all(1)
    assert finite.tolist() == [n not in (3, 5) for n in range(150)]


@pytest.mark.parametrize(
    ("irreps", "which"),
    [
        (("128x0e+128x1o", "128x0e+128x1o"), {"forward", "to_input"}),
        (("64x0e", "1280x0e"), {"forward", "to_input"}),  # of 64 columns
        (("48x0e", "1280x0e"), {"forward"}),
        (("8x0e", "128x0e"), set()),
        (("128x0e", "128x0e+4x1o"), {"forward", "to_input"}),
        (("128x0e+1x1o", "128x0e"), set()),  # rows of an odd length
    ],
)
def test_which_are(irreps: tuple[str, str], which: set[str]) -> None:
    """Those whose channels fill steps, whose columns fill tiles, and that are copied 16 bytes at a time."""
    kernels = IndexedLinearKernels(
        paths_of(*irreps), "", PlanContext(torch.float64, torch.device("cpu"), Config(), 90)
    )
    staged = {p.name for p in kernels.programs() if p.file == "linear_staged.cu"}
    names = {"forward": "linear_staged_double", "to_input": "linear_staged_input_double"}
    assert staged == {names[kind] for kind in which}


@pytest.mark.parametrize("irreps", [*STAGED.values(), ("256x7o", "256x7o")], ids=str)
def test_blocks_have_room_beside_one_another(irreps: tuple[str, str]) -> None:
    """Of a multiprocessor's 228 KiB, 1 of which is the system's for each block, and as much is left for barriers."""
    paths = paths_of(*irreps)
    for side in (paths, paths.turned):
        tables = LinearTables(side, "double", architecture=90)
        assert tables.layout.blocks * (tables.shared + 1280) <= 228 * 1024
        halves = LinearInHalves(side, 90)
        assert halves.cut.multipliers == 3 or not side.whole("columns", 128)
        assert halves.cut.blocks * (halves.shared + 1280) <= 228 * 1024


def test_no_devices_without_bulk_copies() -> None:
    """Nor those where a ring would cost blocks."""
    paths = paths_of(*STAGED["MACE"])
    for architecture in (0, 80, 89, 120):
        assert not LinearTables(paths, "double", architecture=architecture).staged
        assert not LinearInHalves(paths, architecture).cut.multipliers


FILES = {"linear_staged.cu": torch.float64, "linear_in_halves_staged.cu": torch.float32}
WAITS = r"(wait_until_full|wait_until_empty|meet|was_read)\([^;{]*\);"
"""Of a warp for another, one way and back, and of all that multiply for one another."""


def few_tiles(dtype: torch.dtype) -> None:
    """Values and derivatives of a sum of more steps than a ring has slots, of more tiles than there are warpgroups."""
    module = built("128x1o", "128x1o")
    check(module, draw((90, module.irreps_in.dim), 3).requires_grad_(), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("file", FILES)
def test_sanitizers_find_nothing(file: str, sanitizer: str, kernels_on_host: HostCompiler) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    few_tiles(FILES[file])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "wait"), [(file, n) for file in FILES for n in barriers(file, WAITS)]
)
def test_a_missing_wait_is_a_race(file: str, wait: int, kernels_on_host: HostCompiler) -> None:
    """ThreadSanitizer says so, of each; or a turn never comes."""
    kernels_on_host.sanitizer, kernels_on_host.change = "thread", without(file, wait, WAITS)
    with race_shown():
        few_tiles(FILES[file])
