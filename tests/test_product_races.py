"""Barriers of the kernels for tensor products: enough of them, and none for nothing; changes of basis, which have none.

As test_kernel_races.py has it for convolutions. Blocks have several rows one after the other, warps have idle lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from comparison import Derivatives, accelerated, assert_close, draw, poisoned_memory
from host_kernels import HostCompiler, race_shown
from host_launch import HostError
from kernel_barriers import barriers, without
from product_parity import Product, check
from test_contraction_basis_on_host import test_value_and_gradients as check_basis

from e3nn_accel.backends.cuda import tensor_product, tensor_product_launch, tensor_product_staged
from e3nn_accel.backends.cuda.tensor_product_launch import ProductLaunch
from e3nn_accel.compile import KernelProgram

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host")]

CHANNELS, PAIRS = "tensor_product_channels.cu", "tensor_product.cu"
MIXED, STAGED = "tensor_product_mixed.cu", "tensor_product_mixed_staged.cu"
BASIS = "contraction_basis.cu"


@dataclass(frozen=True)
class Case:
    """A product that one kernel file computes.

    Attributes:
        rows: More than the blocks have at a time, and no multiple of it.
        team: Threads that own a row, where that is a choice: a warp or a block.
    """

    file: str
    product: Product
    rows: int
    team: int = 0


UVU = tuple(
    (i, j, ir, "uvu", True, 0)
    for i, j, ir in [(1, 1, "1e"), (0, 1, "1o"), (1, 0, "1o"), (1, 1, "0e"), (0, 0, "0e")]
)
"""The first result needs what several threads have made."""
SHORT = ((0, 0, "1e", "uuu", True, 0), (0, 0, "2e", "uvuv", False, 0))
LONG = ((0, 0, "0e", "uvuv", True, 0),)


def mixing(scalars: int, vectors: int) -> tuple[tuple[int, int, str, str, bool, int], ...]:
    """Paths to so many channels."""
    paths = [(0, 0, "0e", scalars), (1, 1, "0e", scalars), (0, 1, "1o", vectors), (1, 1, "1e", vectors)]  # fmt: skip
    return tuple((i, j, ir, "uvw", True, width) for i, j, ir, width in paths)


CASES = {
    "channels": Case(CHANNELS, Product("40x0e+36x1o", "0e+1o", UVU), 37),
    "channels, shared weights": Case(CHANNELS, Product("40x0e+36x1o", "0e+1o", UVU, "shared"), 37),
    "pairs by warps": Case(PAIRS, Product("12x1o", "12x1o", SHORT), 17, 32),
    "pairs by warps, shared weights": Case(PAIRS, Product("12x1o", "12x1o", SHORT, "shared"), 17, 32),
    "pairs by blocks": Case(PAIRS, Product("65x0e", "16x0e", LONG), 5, 128),
    "mixed by warps": Case(MIXED, Product("6x0e+5x1o", "0e+1o", mixing(7, 5)), 17, 32),
    "mixed by blocks": Case(MIXED, Product("30x0e+12x1o", "0e+1o", mixing(20, 10)), 5, 128),
    "by bulk copies": Case(STAGED, Product("12x0e+10x1o", "0e+1o", mixing(12, 10)), 9),
}  # fmt: skip
BLOCKS = 2

BARRIERS = {
    CHANNELS: r"__sync(threads|warp)\(\);",
    PAIRS: r"meet\(\);",
    MIXED: r"meet\(\);",
    STAGED: r"__syncthreads\(\);",
}
"""What is one in each file."""
WAITS = r"wait\(s\.full[^;]*;|wait_for_groups<[^>]*>\(\);"
"""For rows that come and leave."""


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str]]:
    """Few blocks, which go through the rows; notes parts and kinds of kernels that are launched."""
    seen: list[tuple[Any, str]] = []
    grid = ProductLaunch.grid

    def noted(self: ProductLaunch, part: Any, kind: str, *of: Any) -> Any:
        seen.append((part, kind))
        return grid(self, part, kind, *of)

    monkeypatch.setattr(ProductLaunch, "grid", noted)
    monkeypatch.setattr(tensor_product_launch, "MOST_BLOCKS", BLOCKS)
    monkeypatch.setattr(tensor_product_launch, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(tensor_product_staged, "RESIDENCES", ((BLOCKS, 2),))
    monkeypatch.setattr(tensor_product_staged, "SHORTEST", 0)
    monkeypatch.setattr(tensor_product_staged, "FEWEST_PAIRS", 0)
    return seen


@pytest.fixture
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Plans are made for the compute capability that its file is for."""
    found = CASES[request.param]
    capability = 90 if found.file == STAGED else 0
    monkeypatch.setattr(tensor_product, "architecture_of", lambda device: capability)
    return found


def exercise(case: Case) -> None:
    """What all barriers of the file are reached by, as short as it may be."""
    if case.file in (CHANNELS, STAGED):
        check(case.product, case.rows, torch.float64)
    else:  # dx last: a lane has each number alone, and so no shuffles that keep lanes together
        first_derivatives(case, "xw")
    if case.file == STAGED:
        first_derivatives(case, "w")  # weights aren't read


def first_derivatives(case: Case, wanted: str) -> None:
    """Value and gradients against stock e3nn."""
    module = case.product.build()
    operands = case.product.operands(module, case.rows, torch.float64, wanted)

    def found() -> Derivatives:
        leaves = {name: t for name, t in operands.items() if t.requires_grad}
        out = case.product.call(module, operands)
        gradients = torch.autograd.grad(out, list(leaves.values()), draw(tuple(out.shape), 5))
        return Derivatives({"value": out.detach(), **dict(zip(leaves, gradients, strict=True))})

    expected = found()
    with accelerated(self_check=False), poisoned_memory():
        ours = found()
    assert_close(ours, expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, indirect=True)
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sanitizers_find_nothing(
    case: Case,
    sanitizer: str,
    dtype: torch.dtype,
    kernels_on_host: HostCompiler,
    launched: list[tuple[Any, str]],
) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    check(case.product, case.rows, dtype)
    kinds = {"forward", "backward"} | ({"double"} if case.file in (CHANNELS, STAGED) else set())
    assert {(part.file, kind) for part, kind in launched} == {(case.file, kind) for kind in kinds}
    assert all(case.team in (0, getattr(part, "team", 0)) for part, _ in launched)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sanitizers_find_nothing_in_changes_of_basis(
    sanitizer: str, dtype: torch.dtype, kernels_on_host: HostCompiler
) -> None:
    """Two blocks of threads, of which the second isn't full."""
    kernels_on_host.sanitizer = sanitizer
    check_basis(dtype)


EACH = [
    (name, number)
    for name, case in CASES.items()
    if case.product.weights == "row"  # shared ones have the same barriers
    for number in barriers(case.file, BARRIERS[case.file])
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "barrier"), EACH, indirect=["case"])
@pytest.mark.parametrize("sanitizer", ["", "thread"], ids=["fibers", "thread"])
def test_no_barrier_is_for_nothing(
    case: Case, barrier: int, sanitizer: str, kernels_on_host: HostCompiler
) -> None:
    """Fibers take their turns so that a missing one changes the result; among real threads it is a race."""
    kernels_on_host.sanitizer = sanitizer
    kernels_on_host.change = without(case.file, barrier, BARRIERS[case.file])
    with race_shown():
        exercise(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["by bulk copies"], indirect=True)
@pytest.mark.parametrize("wait", barriers(STAGED, WAITS))
def test_no_wait_is_for_nothing(case: Case, wait: int, kernels_on_host: HostCompiler) -> None:
    """Among fibers, where copies take place as late as they may."""
    kernels_on_host.change = without(case.file, wait, WAITS)
    with race_shown():
        exercise(case)


BEYOND = {
    "channels": ("int here = (int)min((long long)ROWS, rows - base)", "int here = ROWS"),
    "pairs by warps": ("row < rows;", "row <= rows;"),
    "mixed by blocks": ("row < rows;", "row <= rows;"),
    "by bulk copies": ("rows - blockIdx.x + gridDim.x - 1", "rows - blockIdx.x + gridDim.x"),
}
"""Changes with which a block goes beyond the last row."""


@pytest.mark.slow
@pytest.mark.parametrize("case", BEYOND, indirect=True)
def test_a_row_too_many_is_found(
    case: Case, request: pytest.FixtureRequest, kernels_on_host: HostCompiler
) -> None:
    """By AddressSanitizer, in each file."""
    right, wrong = BEYOND[request.node.callspec.params["case"]]
    kernels_on_host.sanitizer, kernels_on_host.change = "address", instead(case.file, right, wrong)
    with pytest.raises(HostError, match="heap-buffer-overflow"):
        first_derivatives(case, "xw")


@pytest.mark.slow
def test_a_species_too_many_is_found(kernels_on_host: HostCompiler) -> None:
    """The same of changes of basis, whose last block isn't full."""
    kernels_on_host.sanitizer = "address"
    kernels_on_host.change = instead(BASIS, "if (s >= species) return;", "")
    with pytest.raises(HostError, match="heap-buffer-overflow"):
        check_basis(torch.float64)


def instead(file: str, right: str, wrong: str) -> Callable[[KernelProgram], KernelProgram]:
    """Another text in a kernel file."""

    def change(program: KernelProgram) -> KernelProgram:
        source = program.source()
        if program.file != file:
            return program
        assert right in source
        return replace(program, code=source.replace(right, wrong))

    return change
