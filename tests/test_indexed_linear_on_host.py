"""The species-indexed linear's kernels on the CPU against float64 stock e3nn, to the second derivative."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import (
    Derivatives,
    Operands,
    accelerated,
    assert_close,
    derivatives,
    draw,
    poisoned_memory,
    strategy,
    usage,
)
from e3nn import o3
from mace_parts import ATTRS, node_attrs, one_hot
from product_parity import TOLERANCE

from e3nn_accel.backends.cuda import indexed_linear
from e3nn_accel.config import Config
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.groupings import species_order_of
from e3nn_accel.patches.tensor_product import e3nn_accel_describe
from e3nn_accel.plan import Plan, PlanContext, Refusal

pytestmark = pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host")

SPECIES = 4
SMALL = ("3x0e+2x1o+2x0e", f"{SPECIES}x0e", "2x1o+3x0e")


def check(
    irreps: tuple[str, str, str], y: torch.Tensor, dtype: torch.dtype = torch.float64, **given: Any
) -> None:
    """Values, first and second derivatives, each block's, path's and species's by itself."""
    torch.manual_seed(1)
    module = o3.FullyConnectedTensorProduct(*irreps, **given)
    x = draw((*y.shape[:-1], module.irreps_in1.dim), 3).requires_grad_()
    compare(module, {"x": x, "y": y}, dtype)


def compare(module: Any, operands: Operands, dtype: torch.dtype = torch.float64) -> None:
    """On these operands and the module's weights, rounded to the dtype."""
    ours = copy.deepcopy(module).to(dtype)
    here, exact = operands, operands
    if dtype != torch.float64:
        here = {k: t.detach().to(dtype).requires_grad_(t.requires_grad) for k, t in here.items()}
        exact = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in here.items()}
        with torch.no_grad():  # the same numbers, rounded once
            module.weight.copy_(ours.weight)

    def call(of: Any, o: Operands) -> torch.Tensor:
        out: torch.Tensor = of(o["x"], o["y"], *([o["w"]] if "w" in o else []))
        return out

    expected = derivatives(lambda o: call(module, o), exact | dict(module.named_parameters()))
    with accelerated(self_check=False), poisoned_memory():
        found = derivatives(lambda o: call(ours, o), here | dict(ours.named_parameters()))
        assert usage(ours) == {("tensor_product", "cuda"): 1}
        assert strategy(ours).startswith("indexed linear over")
    assert {t.dtype for t in found.tensors.values()} == {dtype}
    pieces = slices_of(module)
    for name, tolerance in zip(("value", ""), TOLERANCE[dtype], strict=True):
        a, b = (
            Derivatives({n: t.double() for n, t in d.tensors.items() if not name or n == name})
            for d in (found, expected)
        )
        assert_close(a, b, tolerance, pieces)
    _each_species(module, found, expected, TOLERANCE[dtype][1])


def slices_of(module: Any) -> dict[str, list[slice]]:
    """Blocks of rows, paths of weights."""
    paths, start = [], 0
    for instruction in module.instructions:
        size = torch.Size(instruction.path_shape).numel()
        paths.append(slice(start, start + size))
        start += size
    out = list(module.irreps_out.slices())
    return {
        "x": list(module.irreps_in1.slices()),
        "value": out,
        "direction": out,
        "weight": paths,
        "w": paths,
    }


def _each_species(
    module: Any, found: Derivatives, expected: Derivatives, tolerance: float
) -> None:
    """A species has few rows: its weights' gradient is compared with its own size, zero with zero."""
    for name in ("d weight", "d w"):
        if name in expected.tensors:
            for instruction, piece in zip(
                module.instructions, slices_of(module)["weight"], strict=True
            ):
                a, b = (
                    d.tensors[name][piece].reshape(instruction.path_shape).double().transpose(0, 1)
                    for d in (found, expected)
                )
                for ours, stock in zip(a, b, strict=True):
                    assert float((ours - stock).norm()) <= 4 * tolerance * float(stock.norm())


@pytest.mark.parametrize("attrs", ATTRS)
def test_attrs(attrs: str) -> None:
    """Sorted or not, absent species, scaled rows, rows that aren't one-hot, rows of zeros."""
    check(SMALL, node_attrs(attrs, 9, SPECIES))


@pytest.mark.parametrize("attrs", ["all species", "random", "zero rows"])
def test_single_precision(attrs: str) -> None:
    check(SMALL, node_attrs(attrs, 9, SPECIES), torch.float32)


def test_scaled_one_hot() -> None:
    """The non-zero counts, whatever it is."""
    check(SMALL, 2.5 * node_attrs("all species", 9, SPECIES))
    check(SMALL, -2.5 * node_attrs("all species", 9, SPECIES))


@pytest.mark.parametrize("rows", [0, 1, 2, 70])
def test_numbers_of_rows(rows: int) -> None:
    """None, fewer than species, more than a tile."""
    check(SMALL, node_attrs("absent species", rows, SPECIES))


@pytest.mark.parametrize("rows", [600])
def test_slices_of_rows(rows: int) -> None:
    """The gradient of the weights is added up over slices."""
    attrs = node_attrs("all species", rows, 2)
    attrs[::9] = draw((2,), 5)
    check(("2x0e+1x1o", "2x0e", "2x0e+1x1o"), attrs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 5, 33, 128])
def test_channels(channels: int, dtype: torch.dtype) -> None:
    """A tile is 64 wide, and sums over 16 at a time."""
    irreps = f"{channels}x0e+{channels}x1o"
    check((irreps, "3x0e", irreps), node_attrs("one row mixed", 7, 3), dtype)


@pytest.mark.parametrize(
    "irreps",
    [
        ("2x0e+3x1o", "89x0e", "3x0e+2x1o"),
        ("3x0e+2x1o+1x2e", "3x0e", "2x2e+1x3o+3x0e"),
        ("2x0e+3x2e+2x0e+4x2e", "3x0e", "3x0e+70x2e+2x0e"),
        ("2x0e+0x1o", "3x0e", "3x0e+2x1o+0x0e"),
        ("2x0o+1x1e", "3x0o", "3x0e+2x1o"),
        ("3x7o+2x5e", "3x0e", "2x5e+2x7o"),
    ],
    ids=["many species", "unreachable", "several paths", "no channels", "odd scalars", "degrees"],
)
def test_shapes(irreps: tuple[str, str, str]) -> None:
    species = o3.Irreps(irreps[1]).dim
    check(irreps, node_attrs("one row mixed", 12, species))


@pytest.mark.parametrize("shape", [(2, 3), (), (2, 0)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    rows = torch.Size(shape).numel()
    check(SMALL, node_attrs("all species", rows, SPECIES).reshape(*shape, SPECIES))


def test_operands_that_broadcast_and_are_not_contiguous() -> None:
    """One species for all rows, columns of wider tensors, weights with strides."""
    module = o3.FullyConnectedTensorProduct(*SMALL, shared_weights=True, internal_weights=False)
    rows = {"x": draw((module.irreps_in1.dim, 6), 1).T, "w": draw((module.weight_numel, 2), 2)[:, 0]}
    leaves = {name: t.requires_grad_() for name, t in rows.items()}
    for y in (one_hot([2], SPECIES), draw((SPECIES, 6), 3).T):
        compare(module, {**leaves, "y": y})


def test_gradient_of_the_scalars() -> None:
    """By the general plan in torch operations."""
    check(SMALL, node_attrs("all species", 6, SPECIES).requires_grad_())


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_only_the_gradient_that_is_asked_for(wanted: str) -> None:
    module = o3.FullyConnectedTensorProduct(*SMALL)
    module.weight.requires_grad_(wanted == "weight")
    x = draw((6, module.irreps_in1.dim), 3).requires_grad_(wanted == "x")
    compare(module, {"x": x, "y": node_attrs("all species", 6, SPECIES)})


def test_third_derivatives() -> None:
    """The three kernels are each other's derivatives."""
    module = o3.FullyConnectedTensorProduct(
        "2x0e+1x1o", "2x0e", "2x0e+1x1o", shared_weights=True, internal_weights=False
    )
    leaves = draw((3, 5), 1).requires_grad_(), draw((module.weight_numel,), 2).requires_grad_()
    y = one_hot([1, 0, 1], 2)

    def third() -> tuple[torch.Tensor, ...]:
        value = module(leaves[0], y, leaves[1]).pow(3).sum()
        for _ in range(2):
            found = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((t * t.detach().cos()).sum() for t in found)
        return torch.autograd.grad(value, leaves)

    expected = third()
    with accelerated(self_check=False):
        found = third()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * float(b.abs().max()))


def test_self_check_passes() -> None:
    module, y = o3.FullyConnectedTensorProduct(*SMALL), node_attrs("all species", 6, SPECIES)
    with accelerated(self_check=True):
        module(draw((6, module.irreps_in1.dim), 3), y)
        assert usage(module) == {("tensor_product", "cuda"): 1}


def test_attrs_changed_in_place() -> None:
    """Rows are sorted anew."""
    module, x = o3.FullyConnectedTensorProduct(*SMALL), draw((5, 11), 1)
    y, other = one_hot([0, 1, 2, 3, 1], SPECIES), one_hot([3, 3, 0, 1, 2], SPECIES)
    expected = module(x, other)
    with accelerated(self_check=False):
        module(x, y)
        y.copy_(other)
        torch.testing.assert_close(module(x, y), expected, rtol=1e-12, atol=1e-12)


def test_a_row_that_is_not_finite() -> None:
    """A row's NaN stays in its row."""
    module, y = o3.FullyConnectedTensorProduct(*SMALL), node_attrs("one row mixed", 6, SPECIES)
    x = draw((6, module.irreps_in1.dim), 1)
    x[2] = float("nan")
    with accelerated(self_check=False):
        assert module(x, y).isfinite().all(1).tolist() == [n != 2 for n in range(6)]


def test_classes() -> None:
    """Rows with a single non-zero of any sign by its column, all others last."""
    attrs = torch.tensor([[0, 0, -2], [0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]]).double()
    found = species_order_of(attrs)
    assert found.order.tolist() == [2, 0, 4, 1, 3]
    assert found.first.tolist() == [0, 1, 1, 3, 5]
    assert found.order.dtype == found.first.dtype == torch.int32


def test_refusal_of_high_degrees() -> None:
    refused = planned("1x8e", "2x0e", "1x8e")
    assert isinstance(refused, Refusal)
    assert "degree 8" in refused.reason


def test_programs_are_known_before_the_first_run() -> None:
    found = planned(*SMALL)
    assert isinstance(found, Plan)
    names = [program.name for program in found.programs]
    assert names == [
        "indexed_linear_double",
        "indexed_linear_input_double",
        "indexed_linear_weights_double",
    ]


def planned(*irreps: str) -> Plan | Refusal:
    """By the cuda backend."""
    module = o3.FullyConnectedTensorProduct(*irreps)
    descriptor = e3nn_accel_describe(module, "tensor_product")
    assert isinstance(descriptor, TensorProductDescriptor)
    context = PlanContext(torch.float64, torch.device("cpu"), Config())
    return indexed_linear.plan(descriptor, context)
