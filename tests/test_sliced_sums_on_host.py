"""Linears of few rows whose long sums are cut into slices, a block each, on the CPU against float64 stock e3nn."""

from __future__ import annotations

import indexed_parity
import linear_parity
import pytest
import torch
from comparison import accelerated, draw
from e3nn import o3
from host_kernels import HostCompiler
from indexed_parity import built as product
from linear_parity import built, check
from mace_parts import node_attrs
from slow_cases import slow_but

from e3nn_accel.backends.cuda import indexed_linear_launch, indexed_linear_tables
from e3nn_accel.backends.cuda.indexed_linear_layout import STEPS_TO_CUT, slices_of
from e3nn_accel.backends.cuda.indexed_linear_rows import LaunchOfRows
from e3nn_accel.backends.cuda.indexed_linear_tables import LinearTables
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.descriptor import LinearDescriptor, TensorProductDescriptor
from e3nn_accel.health import registry

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]
H200 = 132
CASES = linear_parity.CASES | {
    "long": ("400x0e+20x1o+130x0e", "33x0e+4x1o+400x1o"),  # none of it reaches the last
    "fours": ("336x0e+36x2e", "64x0e+20x2e"),
}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows there are."""
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", 1 << 20)


def cut_into(slices: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whatever the rule is, and sums of any length; the longest sum of each launch, in steps."""
    found: list[int] = []
    monkeypatch.setattr(indexed_linear_tables, "STEPS_TO_CUT", 0)

    def this(blocks: int, steps: int, multiprocessors: int) -> int:
        assert blocks > 0
        found.append(steps)
        return slices

    monkeypatch.setattr(indexed_linear_launch, "slices_of", this)
    return found


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float32), ids=str)
@pytest.mark.parametrize("slices", slow_but([2, 3, 7, 50], 3, 50))
@pytest.mark.parametrize("case", slow_but(CASES, "several paths, unreachable", "long"))
def test_values_and_derivatives(
    case: str, slices: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices that begin within a path and end in another; some have no step at all."""
    found = cut_into(slices, monkeypatch)
    module = built(*CASES[case])
    check(module, draw((37, module.irreps_in.dim), 3).requires_grad_(), dtype)
    assert len(found) >= 2


@pytest.mark.parametrize("rows", slow_but([0, 1, 2, 31, 33, 64], 0, 33))
def test_numbers_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(4, monkeypatch)
    module = built("96x0e+70x1o", "64x0e+6x1o")
    check(module, draw((rows, module.irreps_in.dim), 3).requires_grad_(), torch.float32)


@pytest.mark.parametrize("attrs", ["one row mixed", "zero rows"])
@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float32), ids=str)
def test_species(attrs: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them in the same slices; rows of several, too, or of none."""
    found = cut_into(3, monkeypatch)
    shape = ("70x0e+5x1o+40x0e", "3x0e", "5x0e+33x1o+3x2e")
    indexed_parity.check(shape, node_attrs(attrs, 20, 3), dtype)
    assert max(found) == 5 + 3


def test_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits each time, and a row's whatever rows there are beside it."""
    cut_into(3, monkeypatch)
    module = built(*CASES["fours"]).float()
    x = draw((40, module.irreps_in.dim), 1, torch.float32)
    with accelerated(backend="cuda", self_check=False), torch.no_grad():
        out = module(x)
        assert torch.equal(out, module(x))
        assert torch.equal(out[3:17], module(x[3:17]))


@pytest.mark.parametrize(
    ("irreps", "rows", "slices"),
    [
        (("1280x0e", "64x0e"), 3072, 4),
        (("512x0e", "64x0e"), 3072, 4),
        (("256x0e+384x1o+384x2e+256x3o", "128x0e+128x1o+128x2e+128x3o"), 72, 3),
        (("128x0e+128x1o", "128x0e+128x1o"), 72, 1),
        (("64x0e", "1280x0e"), 300, 1),
        (("1280x0e", "64x0e"), 8000, 1),
    ],
    ids=str,
)
def test_rule(irreps: tuple[str, str], rows: int, slices: int) -> None:
    """As many blocks as a device keeps busy, of sums that are long."""
    side = paths(*irreps)
    kernels = LaunchOfRows.of(LinearTables(side, "float", few=True))
    assert kernels.sliced == (kernels.steps >= STEPS_TO_CUT)
    found = slices_of(kernels.blocks(rows), kernels.steps, H200) if kernels.sliced else 1
    assert found == slices


def test_a_device_that_is_full() -> None:
    assert slices_of(1000, 1 << 20, H200) == 1
    assert slices_of(1, 1 << 20, H200) == 3 * H200


def test_short_sums_know_nothing_of_slices() -> None:
    """Their kernels are what they were: a launch of few rows is mostly its beginning and its end."""
    for irreps, sliced in ((("128x0e", "64x0e"), False), (("1280x0e", "64x0e"), True)):
        side = paths(*irreps)
        assert not LinearTables(side, "float").sliced
        of_few = LinearTables(side, "float", few=True)
        assert of_few.sliced == sliced
        assert ("SLICED" in of_few.header()) == sliced


def test_blocks_that_have_something_to_do() -> None:
    """Of a species, tiles may be cut short; of rows that aren't told apart, the last one alone."""
    tables = LinearTables(paths("4x0e+4x1o", "4x0e+70x1o"), "float", few=True)
    linear = LaunchOfRows.of(tables)
    assert linear.blocks(72) == 3 + 2 * 8
    descriptor = registry().describe(product(("4x0e", "3x0e", "4x0e")), "tensor_product")
    assert isinstance(descriptor, TensorProductDescriptor)
    indexed = MatrixPaths.of(descriptor)
    assert isinstance(indexed, MatrixPaths)
    of_indexed = LaunchOfRows.of(LinearTables(indexed, "float", few=True))
    assert of_indexed.blocks(72) == 2 + 4


def paths(*irreps: str) -> MatrixPaths:
    """Of an ``o3.Linear``."""
    descriptor = registry().describe(o3.Linear(*irreps), "linear")
    assert isinstance(descriptor, LinearDescriptor)
    found = MatrixPaths.of_linear(descriptor)
    assert isinstance(found, MatrixPaths)
    return found


def exercise() -> None:
    """Both sides, several slices and classes."""
    indexed_parity.check(("40x0e+5x1o", "3x0e", "5x0e+33x1o"), node_attrs("one row mixed", 20, 3))
    module = built("40x0e+20x1o", "5x0e+33x1o")
    check(module, draw((40, module.irreps_in.dim), 1).requires_grad_(), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(
    sanitizer: str, kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(3, monkeypatch)
    kernels_on_host.sanitizer = sanitizer
    exercise()
