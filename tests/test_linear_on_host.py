"""o3.Linear's kernels on the CPU against float64 stock e3nn, to the second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import accelerated, draw, usage
from e3nn import o3
from linear_parity import CASES, built, check, rows_alone_and_together, shrinkage
from slow_cases import slow_but

from e3nn_accel.backends.cuda import CudaBackend, indexed_linear_launch
from e3nn_accel.backends.cuda.indexed_linear_tables import LinearTables
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.config import Config
from e3nn_accel.descriptor import LinearDescriptor
from e3nn_accel.patches.linear import e3nn_accel_describe
from e3nn_accel.plan import PlanContext, Refusal

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]


@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case: str) -> None:
    module = built(*CASES[case])
    check(module, draw((70, module.irreps_in.dim), 3).requires_grad_(), torch.float64)


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float32), ids=str)
def test_few_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut finely, for a device of many multiprocessors."""
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: 1 << 20)
    module = built(*CASES["wide"])
    check(module, draw((70, module.irreps_in.dim), 3).requires_grad_(), dtype)


@pytest.mark.parametrize("multiprocessors", [0, 1 << 20], ids=["many rows", "few"])
def test_rows_depend_on_nothing_but_themselves(
    multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: so padding changes nothing."""
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: multiprocessors)
    module = built("33x0e+17x1o", "33x0e+17x1o").float()
    x = draw((70, module.irreps_in.dim), 1, torch.float32)
    assert all(torch.equal(*found) for found in rows_alone_and_together(module, x))


def test_single_precision() -> None:
    module = built(*CASES["MACE"])
    check(module, draw((300, module.irreps_in.dim), 3).requires_grad_(), torch.float32)


@pytest.mark.parametrize("irreps", ["128x0e+128x1o+128x2e+128x3o", "128x7o", "9x0e+5x2e", "640x0e"])
def test_shared_memory_of_any_device(irreps: str) -> None:
    """float64's slots fit into the 99 KiB that a block has on the smallest devices with tensor cores for it."""
    descriptor = e3nn_accel_describe(built(irreps, irreps), "linear")
    assert isinstance(descriptor, LinearDescriptor)
    paths = MatrixPaths.of_linear(descriptor)
    assert isinstance(paths, MatrixPaths)
    taken = [
        LinearTables(side, "double", of_weights, few).shared
        for side in (paths, paths.turned)
        for of_weights, few in ((False, False), (False, True), (True, False))
    ]
    assert all(0 < size <= 99 * 1024 for size in taken), taken


def test_biases() -> None:
    """Of some of the scalars; outputs without a path have nothing but theirs."""
    module = built("3x0e+2x1o", "2x0e+3x1o+4x0e+1x0o", biases=[True, False, True, False])
    check(module, draw((5, 9), 3).requires_grad_(), torch.float64)


def test_errors_of_single_precision_do_not_add_up() -> None:
    """As they would if nothing made up for tensor cores that round towards zero: it is 6e-8 then."""
    assert max(map(abs, shrinkage(rows=300).values())) < 1.5e-8


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), ()])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    module = built(*CASES["MACE"])
    check(module, draw((*shape, module.irreps_in.dim), 3).requires_grad_(), torch.float64)


@pytest.mark.parametrize("kind", ["linear", "many rows", "skip connection"])
@pytest.mark.parametrize("wrong", ["shorter", "longer", "weights"])
def test_wrong_shapes(kind: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock's own errors, before and after calls that are right: a kernel doesn't see where a row ends."""
    if kind == "many rows":
        monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: 0)
    skip = kind == "skip connection"
    module: Any = (
        o3.FullyConnectedTensorProduct("4x0e+4x1o", "3x0e", "4x0e+4x1o")
        if skip
        else o3.Linear("4x0e+4x1o", "4x0e+4x1o")
    ).float()
    attrs = (torch.nn.functional.one_hot(torch.arange(5) % 3, 3).float(),) if skip else ()
    weight = module.weight.data

    def call(columns: int, weights: int = 0) -> torch.Tensor:
        module.weight.data = weight[: len(weight) + weights]
        found: torch.Tensor = module(torch.ones(5, columns, dtype=torch.float32), *attrs)
        return found

    wrong_call = {"shorter": (12,), "longer": (20,), "weights": (16, -1)}[wrong]
    with pytest.raises(Exception) as stock:
        call(*wrong_call)
    with accelerated(backend="cuda", self_check=False):
        for _ in range(2):
            with pytest.raises(type(stock.value)) as ours:
                call(*wrong_call)
            assert str(ours.value) == str(stock.value)
            call(16)
        assert (module_kind(module), "cuda") in usage(module)


def module_kind(module: Any) -> str:
    """Its operation."""
    return "linear" if isinstance(module, o3.Linear) else "tensor_product"


def test_weights_from_outside_and_columns_of_wider_rows() -> None:
    module = built(*CASES["MACE"], shared_weights=True, internal_weights=False)
    x = draw((module.irreps_in.dim, 5), 1).T.requires_grad_()
    w = draw((module.weight_numel, 2), 2)[:, 0].requires_grad_()
    check(module, x, torch.float64, w=w)


@pytest.mark.parametrize("leading", [(0,), (7,), (2, 3), ()])
@pytest.mark.parametrize("columns", slow_but([(2, 3), (3, 1), (1, 2)], (2, 3)))
def test_feature_columns(columns: tuple[int, int], leading: tuple[int, ...]) -> None:
    f_in, f_out = columns
    module = built(
        "5x0e+17x1o", "9x0e+4x1o+2x0e", f_in=f_in, f_out=f_out, biases=[True, False, True]
    )
    x = draw((*leading, f_in, module.irreps_in.dim), 3).requires_grad_()
    check(module, x, torch.float64)


def test_feature_columns_that_lie_apart() -> None:
    module = built("16x0e+16x1o", "16x0e+16x1o", f_in=2, f_out=2)
    x = draw((2, 70, module.irreps_in.dim), 3).transpose(0, 1).requires_grad_()
    check(module, x, torch.float64)
    check(module, x, torch.float32)


@pytest.mark.parametrize("leading", slow_but([(0,), (1,), (7,), (2, 3), ()], (0,), (2, 3)))
def test_weights_of_each_row(leading: tuple[int, ...]) -> None:
    module = o3.Linear(
        "5x0e+17x1o+5x0e", "9x0e+4x1o+2x2e", shared_weights=False, internal_weights=False
    )
    x = draw((*leading, module.irreps_in.dim), 3).requires_grad_()
    w = draw((*leading, module.weight_numel), 4).requires_grad_()
    check(module, x, torch.float64, w=w)


@pytest.mark.parametrize(
    "kind", slow_but(["columns of wider rows", "a row for all", "expanded"], "expanded")
)
def test_weights_of_rows_in_other_memory(kind: str) -> None:
    module = o3.Linear("5x0e+17x1o", "9x0e+4x1o", shared_weights=False, internal_weights=False)
    x, numel = draw((7, module.irreps_in.dim), 3).requires_grad_(), module.weight_numel
    w = {
        "columns of wider rows": draw((7, numel + 3), 4)[:, 1:-2],
        "a row for all": draw((1, numel), 4),
        "expanded": draw((1, numel), 4).expand(7, numel),
    }[kind]
    check(module, x, torch.float64, w=w.requires_grad_())
    check(module, x, torch.float32, w=w)


def test_weights_of_each_row_of_an_ordinary_size() -> None:
    module = o3.Linear("64x0e+64x1o", "64x0e+32x1o", shared_weights=False, internal_weights=False)
    x = draw((30, module.irreps_in.dim), 3).requires_grad_()
    check(module, x, torch.float32, w=draw((30, module.weight_numel), 4).requires_grad_())


@pytest.mark.parametrize(
    ("module", "architecture", "reason"),
    [
        (("2x0e", "2x0e", {"f_in": 40, "f_out": 41}), 0, "1640 paths"),
        (("2x0e", "2x1o", {}), 0, "no path"),
        (("2x0e", "2x0e", {}), 75, "compute capability 7.5"),
    ],
    ids=["too many columns", "no path", "Turing"],
)
def test_refusals(module: tuple[str, str, dict[str, Any]], architecture: int, reason: str) -> None:
    irreps_in, irreps_out, given = module
    descriptor = e3nn_accel_describe(o3.Linear(irreps_in, irreps_out, **given), "linear")
    assert descriptor is not None
    context = PlanContext(torch.float64, torch.device("cpu"), Config(), architecture)
    refused = CudaBackend().plan(descriptor, context)
    assert isinstance(refused, Refusal)
    assert reason in refused.reason
