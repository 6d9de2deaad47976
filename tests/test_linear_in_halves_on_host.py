"""o3.Linear of many rows in float32, whose kernel cuts numbers into halves of their precision, on the CPU."""

from __future__ import annotations

from typing import Any

import indexed_parity
import pytest
import torch
from comparison import accelerated, draw
from e3nn import o3
from host_kernels import HostCompiler, race_shown
from kernel_barriers import barriers, without
from linear_parity import (
    IN_HALVES,
    OTHER_CUTS,
    built,
    check,
    rows_alone_and_together,
    scaled,
    shrinkage,
)
from mace_parts import node_attrs
from slow_cases import slow_but

from e3nn_accel.backends.cuda import indexed_linear_launch, linear_in_halves
from e3nn_accel.backends.cuda.linear_in_halves import Cut, LinearInHalves
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.health import registry

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]
FILE = "linear_in_halves.cu"


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the kernel; of however few it is called here."""
    found: list[int] = []
    rows = LinearInHalves.rows

    def counted(self: Any, kernels: Any, blocks: int, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(x.shape[0])
        return rows(self, kernels, blocks, x, *rest)

    monkeypatch.setattr(LinearInHalves, "rows", counted)
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", -1)
    return found


def exercise(case: str, rows: int = 70) -> None:
    """Values, first and second derivatives."""
    module = built(*IN_HALVES[case])
    check(module, draw((rows, module.irreps_in.dim), 3).requires_grad_(), torch.float32)


@pytest.mark.parametrize("rows", slow_but([1, 70, 300], 70))
@pytest.mark.parametrize(
    "case", slow_but(IN_HALVES, "whole tiles", "parts of tiles", "scalars", "long sums")
)
def test_values_and_derivatives(case: str, rows: int, launches: list[int]) -> None:
    exercise(case, rows)
    assert launches
    assert set(launches) == {rows}


@pytest.mark.parametrize("cut", OTHER_CUTS)
def test_other_cuts(cut: Cut, monkeypatch: pytest.MonkeyPatch, launches: list[int]) -> None:
    """That a device may be better off with."""
    monkeypatch.setattr(linear_in_halves, "cut_of", lambda *of: cut)
    exercise("parts of tiles")
    assert launches


@pytest.mark.parametrize(("columns", "at_once"), [(64, 0), (128, 0), (128, 64)])
def test_warpgroups_add_the_same_products(
    columns: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same order, to the bit, whoever fetches columns for tensor cores, and however many at once."""
    module = built(*IN_HALVES["parts of tiles"]).float()
    x = draw((70, module.irreps_in.dim), 3, torch.float32)

    def found(warpgroups: bool) -> torch.Tensor:
        cut = Cut(64, columns, 32, 3, 3, warpgroups, at_once if warpgroups else 0)
        monkeypatch.setattr(linear_in_halves, "cut_of", lambda *of: cut)
        with accelerated(backend="cuda", self_check=False), torch.no_grad():
            out: torch.Tensor = module(x)
        return out

    assert torch.equal(found(False), found(True))


def test_hopper_alone_has_warpgroups() -> None:
    """Which machine code for others can't have."""
    paths = MatrixPaths.of_linear(
        registry().describe(o3.Linear("64x0e", "128x0e"), "linear")  # type: ignore[arg-type]
    )
    assert isinstance(paths, MatrixPaths)
    for architecture in (0, 80, 89, 90, 100, 120):
        program = LinearInHalves(paths, architecture).program("", "")
        assert program.features_of == (90 if architecture == 90 else 0)


def test_short_sums_have_more_blocks() -> None:
    """On Hopper, of a gradient whose sums are of 128 channels, and not of an output whose are longer."""
    found = registry().describe(o3.Linear("256x0e+380x1o", "124x0e+128x1o"), "linear")
    paths = MatrixPaths.of_linear(found)  # type: ignore[arg-type]
    assert isinstance(paths, MatrixPaths)
    assert (paths.longest, paths.turned.longest) == (380, 128)
    cuts = [linear_in_halves.cut_of(side, 90) for side in (paths, paths.turned)]
    assert [(cut.blocks, cut.columns_at_once) for cut in cuts] == [(3, 0), (4, 64)]


def test_sizes_of_rows_and_columns(launches: list[int]) -> None:
    """None is lost beside others: numbers are multiplied by powers of two before they are cut."""
    errors, sizes = scaled()
    assert launches
    assert (errors <= 1e-6 * sizes).all()


@pytest.mark.parametrize(("width", "most"), [(16, 5e-9), (64, 1.5e-8)])
def test_errors_do_not_add_up(width: int, most: float, launches: list[int]) -> None:
    """Of sums of one large product and of two, which lose more by rounding towards zero."""
    shares = shrinkage(width=width)
    assert launches
    assert max(map(abs, shares.values())) < most, shares


def test_what_is_not_finite_stays_in_its_row(launches: list[int]) -> None:
    module = built("64x0e", "64x0e").float()
    x = draw((70, 64), 1, torch.float32)
    x[3, 0], x[5, 1] = float("inf"), float("nan")
    x[7].view(torch.int32)[2] = 0x7FFFFFFF  # a NaN whose bits are all set
    x[9], x[11] = 3e38, 1e-45
    with accelerated(backend="cuda", self_check=False), torch.no_grad():
        finite = torch.isfinite(module(x))
    assert launches
    assert finite.all(1).tolist() == [n not in (3, 5, 7, 9) for n in range(70)]
    assert not finite[[3, 5, 7]].any()


def test_rows_depend_on_nothing_but_themselves() -> None:
    """To the bit: a row's power of two is its own, and whether sums have their last bit set."""
    module = built("64x0e+16x1o", "64x0e+64x1o").float()
    x = draw((70, module.irreps_in.dim), 1, torch.float32)
    with accelerated(backend="cuda", self_check=False), torch.no_grad():
        assert torch.equal(module(x)[20:65], module(x[20:65]))
    assert all(torch.equal(*found) for found in rows_alone_and_together(module, x))


def test_other_calls_take_other_kernels(launches: list[int]) -> None:
    """Of float64, and of rows that can't be copied four numbers at a time."""
    module = built(*IN_HALVES["scalars"])
    check(module, draw((70, 64), 3).requires_grad_(), torch.float64)
    module = built("33x0e", "64x0e")
    check(module, draw((70, 33), 3).requires_grad_(), torch.float32)
    assert launches == []


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(
    sanitizer: str, kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    exercise("parts of tiles")
    exercise("scalars")
    monkeypatch.setattr(linear_in_halves, "cut_of", lambda *of: Cut(64, 128, 32, 2, 3, True))
    exercise("parts of tiles")


@pytest.mark.slow
@pytest.mark.parametrize("barrier", barriers(FILE))
def test_a_missing_barrier_is_a_race(
    barrier: int, kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ThreadSanitizer says so, of each, in rows that are sorted by species, which have more of them.

    At last as on Hopper, where copies of W have one of their own, which does the work of another.
    """
    kernels_on_host.sanitizer, kernels_on_host.change = "thread", without(FILE, barrier)
    monkeypatch.setattr(indexed_linear_launch, "least_rows", lambda species: 0)
    attrs = node_attrs("one row mixed", 90)
    attrs[::9] = draw((4,), 5)
    with race_shown():
        indexed_parity.check(indexed_parity.IN_HALVES["small"], attrs, torch.float32)
        monkeypatch.setattr(linear_in_halves, "cut_of", lambda *of: Cut(64, 64, 32, 3, 4, True))
        indexed_parity.check(indexed_parity.IN_HALVES["small"], attrs, torch.float32)
