"""Time layouts of the linears' kernels by themselves, each beside the one that is chosen.

python tests/gpu/tune_linear.py "linear after conv" float32
python tests/gpu/tune_linear.py "linear after conv" float32 72       of so many rows
python tests/gpu/tune_linear.py "linear after conv" float32 0 tf32   of all, in that precision
python tests/gpu/tune_linear.py chosen float32                       every case, in the layout that is chosen
python tests/gpu/tune_linear.py slices float32                       of few rows, long sums uncut and cut
python tests/gpu/tune_linear.py parts float32                        by halves, without copies, without products
python tests/gpu/tune_linear.py species float32                      both ways, of 100 to 1000 rows of a species
python tests/gpu/tune_linear.py weights float64                      dW, by blocks that have a tile each, and without

What `layout_of` and `cut_of` say of an H100 was found by this. Times are the device's own, of calls
replayed by a CUDA graph; errors are relative, against the first layout's result.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch
from e3nn import o3
from tune_convolution import milliseconds

from e3nn_accel.backends.cuda import (
    indexed_linear_launch,
    indexed_linear_tables,
    linear_in_halves,
    linear_weights_in_halves,
    linear_weights_staged,
)
from e3nn_accel.backends.cuda.indexed_linear_launch import IndexedLinearKernels, OneCall
from e3nn_accel.backends.cuda.indexed_linear_layout import TILE, Layout
from e3nn_accel.backends.cuda.linear_in_halves import Cut, LinearInHalves
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config, Precision
from e3nn_accel.descriptor import LinearDescriptor, TensorProductDescriptor
from e3nn_accel.groupings import in_torch
from e3nn_accel.health import registry
from e3nn_accel.ops.weighted import KINDS
from e3nn_accel.plan import PlanContext


class Case(NamedTuple):
    """Irreps, rows, species, 0 for an ``o3.Linear``, and how many of these occur, 0 for all."""

    irreps_in: str
    irreps_out: str
    rows: int
    species: int = 0
    occurring: int = 0


HIDDEN, ALL = "128x0e+128x1o", "128x0e+128x1o+128x2e+128x3o"
CASES = {
    "linear after conv": Case("256x0e+384x1o+384x2e+256x3o", ALL, 5000),
    "linear, tutorial": Case(HIDDEN, HIDDEN, 10000),
    "skip connection": Case(HIDDEN, HIDDEN, 5000, 89),
    "skip connection, tutorial": Case(HIDDEN, HIDDEN, 10000, 20),
    "last radial layer": Case("64x0e", "1280x0e", 187000),
}
FEW_ROWS = {
    "gradient through a radial layer, 64 atoms": (Case("64x0e", "1280x0e", 3008), "to_input"),
    "the same of a first layer": (Case("64x0e", "512x0e", 3008), "to_input"),
    "linear after conv, 64 atoms": (CASES["linear after conv"]._replace(rows=72), "forward"),
}
"""Long sums, and which way."""
BY_SPECIES = {
    f"{species} species of {rows} rows": Case(HIDDEN, HIDDEN, species * rows, species)
    for species, rows in product((10, 20, 89), (100, 200, 300, 500, 1000))
} | {
    f"3 of 89 species, {rows} rows": Case(HIDDEN, HIDDEN, rows, 89, 3)
    for rows in (1000, 2000, 5000, 10000, 20000)
}
"""As many rows of each, and a small part of what a model knows, of which the rest isn't cut."""
ROWS_OF_WEIGHTS = (1000, 2000, 5000, 20000)
LAYOUTS = [Layout(*both) for both in product((32, 64, 128), (2, 3, 4))]
LAYOUTS_OF_DOUBLES = [
    Layout(64, 2, 64, 2), Layout(64, 2, 64, 3), Layout(64, 3, 64, 3), Layout(64, 2, 64, 4),
    Layout(64, 2, 128, 3), Layout(64, 2, 128, 4), Layout(64, 2, 128, 3, 2, 4), Layout(64, 1, 128, 4, 2, 4),
    Layout(128, 1, 128, 3, 4, 2), Layout(128, 2, 64, 3, 4, 2), Layout(128, 2, 64, 3, 2, 2),
    Layout(64, 2, 128, 3, copiers=4), Layout(64, 2, 128, 4, copiers=4), Layout(64, 2, 64, 4, copiers=4),
    Layout(64, 3, 64, 3, copiers=4),
]  # fmt: skip
CUTS = [
    Cut(64, 64, 16, 4, 4), Cut(64, 64, 32, 2, 3), Cut(64, 64, 32, 3, 3), Cut(64, 64, 32, 3, 4),
    Cut(64, 128, 16, 3, 3), Cut(64, 128, 32, 2, 2), Cut(64, 128, 32, 2, 3), Cut(64, 128, 32, 3, 3),
    Cut(128, 64, 32, 2, 2), Cut(128, 64, 32, 2, 3),
    Cut(64, 64, 32, 2, 4, True), Cut(64, 64, 32, 3, 4, True), Cut(64, 128, 32, 2, 2, True),
    Cut(64, 128, 32, 2, 3, True), Cut(64, 128, 32, 2, 3, True, 64), Cut(64, 128, 32, 2, 4, True, 64),
    Cut(64, 128, 32, 3, 3, True), Cut(128, 64, 32, 2, 3, True),
    Cut(128, 64, 32, 3, 3, True), Cut(128, 128, 32, 2, 2, True), Cut(128, 128, 32, 3, 2, True),
    Cut(64, 128, 32, 2, 1, True, 64, 3), Cut(64, 128, 32, 2, 1, True, 0, 3),
]  # fmt: skip


def call_of(case: Case, dtype: torch.dtype, precision: Precision) -> OneCall:
    """The kernels with rows of random species."""
    config = Config(backend="cuda", precision=precision)
    context = PlanContext(dtype, torch.device("cuda"), config)
    if not case.species:
        descriptor = registry().describe(o3.Linear(case.irreps_in, case.irreps_out), "linear")
        assert isinstance(descriptor, LinearDescriptor)
        paths = MatrixPaths.of_linear(descriptor)
        assert isinstance(paths, MatrixPaths)
        return OneCall(IndexedLinearKernels(paths, "", context))
    module = o3.FullyConnectedTensorProduct(case.irreps_in, f"{case.species}x0e", case.irreps_out)
    found = registry().describe(module, "tensor_product")
    assert isinstance(found, TensorProductDescriptor)
    paths = MatrixPaths.of(found)
    assert isinstance(paths, MatrixPaths)
    kinds = torch.randint(case.occurring or case.species, (case.rows,), device="cuda")
    attrs = torch.nn.functional.one_hot(kinds, case.species).to(dtype)
    by = in_torch(attrs)
    return OneCall(IndexedLinearKernels(paths, "", context), (attrs, by.order, by.first))


def replayed(run: Callable[[], object], calls: int = 10) -> float:
    """Milliseconds of a call without the host's."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return milliseconds(graph.replay) / calls


def time_kinds(
    case: Case,
    dtype: torch.dtype,
    precision: Precision,
    exact: dict[str, Any],
    label: object,
    kinds: Sequence[str] = KINDS,
) -> None:
    """Print a line for each kernel, with its difference from the first result of its kind."""
    torch.manual_seed(1)
    call = call_of(case, dtype, precision)
    paths = call.kernels.paths
    draw = lambda *shape: torch.randn(shape, device="cuda", dtype=dtype)  # noqa: E731
    x, g = draw(case.rows, paths.in_row), draw(case.rows, paths.out_row)
    w = draw(paths.weights)
    operands = {"forward": (x, w), "to_input": (g, w), "to_weight": (x, g)}
    for kind in kinds:
        try:
            out = getattr(call, kind)(*operands[kind]).double()
            time = replayed(lambda: getattr(call, kind)(*operands[kind]))  # noqa: B023
        except Exception as error:  # too much shared memory
            print(f"{kind:10s} {label}: {str(error)[:80]}")
            continue
        error = float((out - exact.setdefault(kind, out)).norm() / out.norm())
        print(f"{kind:10s} {label}: {time:.4f} ms, differs by {error:.0e}")


def by_halves(wanted: bool) -> Any:
    """All rows that aren't few, of species-indexed linears, go by halves, or by tf32."""
    least = 0 if wanted else 1 << 40
    return mock.patch.object(indexed_linear_launch, "least_rows", return_value=least)


def time_ways(
    case: Case, dtype: torch.dtype, precision: Precision, label: str, kinds: Sequence[str]
) -> None:
    """Both, twice, in turn."""
    exact: dict[str, Any] = {}
    for _ in range(2):
        for wanted in (False, True):
            with by_halves(wanted):
                way = "by halves" if wanted else "by tf32"
                time_kinds(case, dtype, precision, exact, f"{label}, {way}", kinds)


def time_weights(case: Case, dtype: torch.dtype, precision: Precision, label: str) -> None:
    """By indexed_linear_weights.cu; and with less and more for each block to do, where rows are few."""
    kernels = linear_weights_staged if dtype == torch.float64 else linear_weights_in_halves
    exact: dict[str, Any] = {}
    with mock.patch.object(kernels, "takes", return_value=False):
        time_kinds(case, dtype, precision, exact, f"{label}, without", ["to_weight"])
    chosen = kernels.LEAST
    for enough in (chosen.of_one // 2, chosen.of_one, 2 * chosen.of_one):
        with mock.patch.object(kernels, "LEAST", chosen._replace(of_one=enough)):
            time_kinds(
                case, dtype, precision, exact, f"{label}, {enough} to a block", ["to_weight"]
            )


OF_ONE_TILE = Cut(64, 128, 32, 2, 3, warpgroups=True)
PARTS = {
    "copies of W": "arrive_expecting(barrier, BYTES);\n"
    "            copy_in(to, from, BYTES, barrier);",
    "copies of x": "copy_async<TOGETHER>(left + node * pitch + at, valid ? from(i) : x, valid);",
    "products": "products_of_warpgroup<ACROSS>(chains, of.high, of.low, "
    "reinterpret_cast<const unsigned*>(right) + first * 32);",
}
"""Of linear_in_halves.cuh and its ring; a kernel that lacks some computes nothing, and shows what the others take."""
INSTEAD = {
    "copies of W": "arrive(barrier);",
    "products": """
    for (int j = 0; j < COLUMNS_AT_ONCE / 8; j++)
        for (int n = 0; n < 4; n++) chains[j][n] = __uint_as_float(of.high[0][n] ^ of.low[1][n]);
""",
}
"""What is waited for has to come; sums have to be made of what was cut."""


def without(parts: Sequence[str]) -> Any:
    """Kernels by halves that lack these parts, on Hopper."""
    whole = LinearInHalves.program

    def program(self: LinearInHalves, *arguments: str) -> KernelProgram:
        found = whole(self, *arguments)
        code = found.source()
        for part in parts:
            if code.count(PARTS[part]) != 1:
                raise ValueError(f"{found.file} has other {part}")
            code = code.replace(PARTS[part], INSTEAD.get(part, ";"))
        return replace(found, code=code)

    return mock.patch.object(LinearInHalves, "program", program)


def time_slices(dtype: torch.dtype, precision: Precision) -> None:
    """Long sums of few rows, uncut and cut."""
    for each, (case, kind) in FEW_ROWS.items():
        exact: dict[str, Any] = {}
        with mock.patch.object(indexed_linear_tables, "STEPS_TO_CUT", 1 << 30):
            time_kinds(case, dtype, precision, exact, f"{each}, uncut", [kind])
        time_kinds(case, dtype, precision, exact, f"{each}, cut", [kind])


def time_chosen(dtype: torch.dtype, precision: Precision) -> None:
    """Every case as it is cut; skip connections in float32 both ways, besides."""
    for each, case in CASES.items():
        time_kinds(case, dtype, precision, {}, each)
        if case.species and dtype == torch.float32 and precision == "float32":
            time_ways(case, dtype, precision, each, KINDS[:2])


def time_parts(dtype: torch.dtype, precision: Precision) -> None:
    """A kernel that lacks some of its parts, and all of them."""
    for count in range(len(PARTS) + 1):
        for parts in combinations(PARTS, count):
            cut_so = mock.patch.object(linear_in_halves, "cut_of", return_value=OF_ONE_TILE)
            with without(parts), cut_so:
                label = f"after conv without {', '.join(parts) or 'nothing'}"
                time_kinds(CASES["linear after conv"], dtype, precision, {}, label, ["forward"])


def time_species(dtype: torch.dtype, precision: Precision) -> None:
    """Skip connections of few to many rows of a species."""
    for each, case in BY_SPECIES.items():
        time_ways(case, dtype, precision, each, KINDS[:2])


def time_rows_of_weights(dtype: torch.dtype, precision: Precision) -> None:
    """Gradients of weights of few to many rows."""
    alike = {each: case for each, case in CASES.items() if not case.species}
    for (each, case), many in product(alike.items(), ROWS_OF_WEIGHTS):
        time_weights(case._replace(rows=many), dtype, precision, f"{each}, {many} rows")


BY_NAME = {
    "chosen": time_chosen,
    "slices": time_slices,
    "parts": time_parts,
    "species": time_species,
    "weights": time_rows_of_weights,
}


def time_layouts(case: Case, dtype: torch.dtype, precision: Precision) -> None:
    """One case in all layouts."""
    exact: dict[str, Any] = {}
    stock = indexed_linear_tables.layout_of
    for layout in LAYOUTS_OF_DOUBLES if dtype == torch.float64 else LAYOUTS:

        def this(
            paths: MatrixPaths,
            bytes_each: int,
            of_weights: bool,
            few: bool,
            architecture: int = 0,
            one: Layout = layout,
        ) -> Layout:
            if dtype == torch.float64 and (few or of_weights):
                return stock(paths, bytes_each, of_weights, few, architecture)
            return one._replace(rows=TILE) if of_weights else one

        tiles_of_tf32 = mock.patch.object(LinearInHalves, "takes", return_value=False)
        with tiles_of_tf32, mock.patch.object(indexed_linear_tables, "layout_of", this):
            time_kinds(case, dtype, precision, exact, layout)
    if dtype == torch.float32 and precision == "float32":
        for cut in CUTS:
            cut_so = mock.patch.object(linear_in_halves, "cut_of", lambda *of, cut=cut: cut)
            with cut_so, by_halves(True):
                time_kinds(case, dtype, precision, exact, cut, KINDS[:2])


def main(name: str, dtype_name: str, rows: str = "", precision: Precision = "float32") -> None:
    """Print a line for each kernel and layout."""
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), name, dtype_name, precision)
    if name in BY_NAME:
        BY_NAME[name](dtype, precision)
        return
    case = CASES[name]
    time_layouts(case._replace(rows=int(rows)) if int(rows or 0) else case, dtype, precision)


if __name__ == "__main__":
    main(*sys.argv[1:])
