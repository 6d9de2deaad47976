"""Species-indexed linears of many rows in float32, whose kernels cut numbers into halves, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import accelerated, draw, usage
from host_kernels import HostCompiler
from indexed_parity import IN_HALVES, built, check, rows_of_any_company, scaled, shrinkage
from linear_parity import OTHER_CUTS
from mace_parts import ATTRS, node_attrs
from slow_cases import slow_but

from e3nn_accel.backends.cuda import indexed_linear_launch, linear_in_halves
from e3nn_accel.backends.cuda.indexed_linear_launch import IndexedLinearKernels
from e3nn_accel.backends.cuda.linear_in_halves import Cut, LinearInHalves, least_rows
from e3nn_accel.backends.cuda.matrix_paths import MatrixPath, MatrixPaths
from e3nn_accel.config import Config
from e3nn_accel.plan import PlanContext

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]
PARTS, ROWS = "parts of tiles", 90


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Whether transposed, and rows, of each call of the kernels; of however few they are called here."""
    found: list[tuple[bool, int]] = []
    rows = LinearInHalves.rows

    def counted(self: Any, kernels: Any, blocks: int, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append((self.side.transposed, x.shape[0]))
        return rows(self, kernels, blocks, x, *rest)

    monkeypatch.setattr(LinearInHalves, "rows", counted)
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", -1)
    monkeypatch.setattr(indexed_linear_launch, "least_rows", lambda species: 0)
    return found


def exercise(case: str, attrs: str = "one row mixed", rows: int = ROWS) -> None:
    """Values, first and second derivatives."""
    irreps = IN_HALVES[case]
    y = node_attrs(attrs, rows, int(irreps[1].split("x")[0]))
    check(irreps, y, torch.float32)


@pytest.mark.parametrize("case", slow_but(IN_HALVES, PARTS, "several paths"))
def test_values_and_derivatives(case: str, launches: list[tuple[bool, int]]) -> None:
    exercise(case)
    assert set(launches) == {(False, ROWS), (True, ROWS)}


@pytest.mark.parametrize("attrs", slow_but(ATTRS, "absent species", "random", "zero rows"))
def test_attrs(attrs: str, launches: list[tuple[bool, int]]) -> None:
    """Sorted or not, absent species, one for all rows, scaled rows, rows that aren't one-hot, zeros."""
    exercise("small", attrs)
    assert launches


@pytest.mark.parametrize("rows", [1, 2, 64, 300])
def test_numbers_of_rows(rows: int, launches: list[tuple[bool, int]]) -> None:
    """Fewer than species, whole tiles, several of a class."""
    exercise("small", "absent species", rows)
    assert launches


def test_every_row_of_one_species(launches: list[tuple[bool, int]]) -> None:
    exercise("small", "one species", 200)
    assert launches


@pytest.mark.parametrize("size", [2.5, -2.5, 1e-8])
def test_scaled_one_hot(size: float, launches: list[tuple[bool, int]]) -> None:
    """The non-zero counts, whatever it is."""
    check(IN_HALVES["small"], size * node_attrs("all species", ROWS, 4), torch.float32)
    assert launches


@pytest.mark.parametrize("cut", OTHER_CUTS)
def test_other_cuts(
    cut: Cut, monkeypatch: pytest.MonkeyPatch, launches: list[tuple[bool, int]]
) -> None:
    """That a device may be better off with."""
    monkeypatch.setattr(linear_in_halves, "cut_of", lambda *of: cut)
    exercise(PARTS)
    assert launches


def test_sizes_of_rows_columns_and_species(launches: list[tuple[bool, int]]) -> None:
    """None is lost beside others, in rows of several species neither."""
    errors, sizes = scaled()
    assert launches
    assert (errors <= 1e-6 * sizes).all()


def test_errors_do_not_add_up(launches: list[tuple[bool, int]]) -> None:
    """Tensor cores round towards zero, and so do those of the tests."""
    shares = shrinkage()
    assert launches
    assert max(map(abs, shares)) < 1.5e-8, shares


def test_rows_depend_on_nothing_but_themselves(launches: list[tuple[bool, int]]) -> None:
    """To the bit: outputs and gradients of some rows, by themselves and in other company."""
    pairs = rows_of_any_company()
    assert launches
    assert all(torch.equal(*found) for found in pairs)


def test_what_is_not_finite_stays_in_its_row(launches: list[tuple[bool, int]]) -> None:
    module = built(IN_HALVES["small"]).float()
    x, y = draw((ROWS, module.irreps_in1.dim), 1, torch.float32), node_attrs("all species", ROWS)
    x[3, 0], x[8, 1] = float("inf"), float("nan")
    with accelerated(backend="cuda", self_check=False), torch.no_grad():
        finite = module(x, y.float()).isfinite().all(1)
    assert launches
    assert finite.tolist() == [n not in (3, 8) for n in range(ROWS)]


@pytest.mark.parametrize(
    ("attrs", "cut"), [("absent species", {0, 3}), ("zero rows", {0, 1, 2, 3})]
)
def test_only_what_may_be_read_is_cut(
    attrs: str, cut: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of species that have rows; of all where a row isn't one-hot."""
    kept: list[torch.Tensor] = []

    def kept_rows(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        kept.append(like.new_full((rows, columns), float("nan")))
        return kept[-1]

    monkeypatch.setattr(linear_in_halves, "new_rows", kept_rows)
    module = built(IN_HALVES["small"]).float()
    x, y = draw((ROWS, module.irreps_in1.dim), 1, torch.float32), node_attrs(attrs, ROWS)
    with accelerated(backend="cuda", self_check=False), torch.no_grad():
        module(x, y.float())
    written = (kept[0].view(4, -1).view(torch.int32) != 0x7FC00000).any(1)
    assert set(written.nonzero().flatten().tolist()) == cut


def test_rows_of_a_species_decide(
    monkeypatch: pytest.MonkeyPatch, launches: list[tuple[bool, int]]
) -> None:
    """Whether cutting its weights pays; below, tensor cores take tf32."""
    monkeypatch.setattr(indexed_linear_launch, "least_rows", lambda species: 50 * species)
    exercise("small", "all species", 199)
    assert launches == []
    exercise("small", "all species", 200)
    assert set(launches) == {(False, 200), (True, 200)}


def test_least_rows() -> None:
    """A species has to have some, and there has to be work for a device."""
    assert [least_rows(species) for species in (0, 1, 14, 16)] == [0, 3000, 3000, 3200]


def test_other_calls_take_other_kernels(launches: list[tuple[bool, int]]) -> None:
    """Of float64, and of rows that can't be copied four numbers at a time."""
    check(IN_HALVES["small"], node_attrs("all species", ROWS), torch.float64)
    check(("33x0e", "3x0e", "8x0e"), node_attrs("all species", ROWS, 3), torch.float32)
    assert launches == []


def test_weights_that_would_take_too_much_room() -> None:
    """With their halves; a single matrix may."""

    def paths(species: int) -> MatrixPaths:
        path = MatrixPath(0, 1024, 0, 1024, 1, 0, 1.0)
        return MatrixPaths((path,), 1024, 1024, species, max(1, species) * 1024**2)

    taken = [LinearInHalves.takes(paths(species), 0) for species in (0, 15, 16)]
    assert taken == [True, True, False]


def test_all_programs_are_known_before_the_first_run() -> None:
    """By halves, by tf32 below the rows that pay for cutting weights, and for few rows."""
    path = MatrixPath(0, 64, 0, 64, 1, 0, 1.0)
    context = PlanContext(torch.float32, torch.device("cpu"), Config())
    kernels = IndexedLinearKernels(MatrixPaths((path,), 64, 64, 3, 3 * 64**2), "", context)
    assert [program.name for program in kernels.programs()] == [
        "indexed_linear_float",
        "indexed_linear_input_float",
        "indexed_linear_weights_float",
        "indexed_linear_in_halves",
        "indexed_linear_in_halves_input",
        "indexed_linear_few_float",
        "indexed_linear_input_few_float",
    ]


def test_gradient_of_weights_loads_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the same kernel whichever way rows are taken."""
    loaded: list[str] = []
    programs = IndexedLinearKernels._programs

    def noted(self: Any, way: Any) -> Any:
        loaded.append(way)
        return programs(self, way)

    module, y = built(IN_HALVES["small"]).float(), node_attrs("all species", ROWS).float()
    x = draw((ROWS, module.irreps_in1.dim), 1, torch.float32).requires_grad_()
    with accelerated(backend="cuda", self_check=False):
        module(x, y)  # planned
        monkeypatch.setattr(IndexedLinearKernels, "_programs", noted)
        torch.autograd.grad(module(x, y).sum(), (x, module.weight))
        assert usage(module) == {("tensor_product", "cuda"): 2}
    assert loaded == []


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(sanitizer: str, kernels_on_host: HostCompiler) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    exercise("small")
    exercise("small", "random")
    if sanitizer == "address":  # the other would take ten minutes
        exercise(PARTS)
