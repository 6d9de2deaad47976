"""The species-indexed linear's kernels on the CPU against float64 stock e3nn, to the second derivative."""

from __future__ import annotations

import linear_parity
import pytest
import small_models
import torch
from comparison import accelerated, draw, usage
from e3nn import o3
from host_kernels import HostCompiler, race_shown
from indexed_parity import SHAPES, check, compare
from kernel_barriers import barriers, without
from mace_parts import ATTRS, node_attrs, one_hot
from slow_cases import slow_but

import e3nn_accel
from e3nn_accel.backends.cuda import indexed_linear, indexed_linear_launch
from e3nn_accel.config import Config
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.patches.tensor_product import e3nn_accel_describe
from e3nn_accel.plan import Plan, PlanContext, Refusal

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]

SPECIES = 4
SMALL = ("3x0e+2x1o+2x0e", f"{SPECIES}x0e", "2x1o+3x0e")


@pytest.mark.parametrize("attrs", slow_but(ATTRS, "random", "one row mixed"))
def test_attrs(attrs: str) -> None:
    """Sorted or not, absent species, scaled rows, rows that aren't one-hot, rows of zeros."""
    check(SMALL, node_attrs(attrs, 9, SPECIES))


@pytest.mark.parametrize("attrs", slow_but(["all species", "random", "zero rows"], "all species"))
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


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [
        pytest.param(1, torch.float64, marks=pytest.mark.slow),
        (5, torch.float32),
        (33, torch.float64),
        pytest.param(128, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_channels(channels: int, dtype: torch.dtype) -> None:
    """A tile is 64 wide, and sums over 16 at a time."""
    irreps = f"{channels}x0e+{channels}x1o"
    check((irreps, "3x0e", irreps), node_attrs("one row mixed", 7, 3), dtype)


@pytest.mark.parametrize("case", slow_but(SHAPES, "many species", "several paths", "no channels"))
def test_shapes(case: str) -> None:
    irreps = SHAPES[case]
    species = o3.Irreps(irreps[1]).dim
    check(irreps, node_attrs("one row mixed", 12, species))


@pytest.mark.parametrize("shape", [(2, 3), (), (2, 0)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    rows = torch.Size(shape).numel()
    check(SMALL, node_attrs("all species", rows, SPECIES).reshape(*shape, SPECIES))


def test_operands_that_broadcast_and_are_not_contiguous() -> None:
    """One species for all rows, columns of wider tensors, weights with strides."""
    module = o3.FullyConnectedTensorProduct(*SMALL, shared_weights=True, internal_weights=False)
    rows = {
        "x": draw((module.irreps_in1.dim, 6), 1).T,
        "w": draw((module.weight_numel, 2), 2)[:, 0],
    }
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
    with accelerated(self_check=False, backend="cuda"):
        found = third()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * float(b.abs().max()))


def test_self_check_passes() -> None:
    module, y = o3.FullyConnectedTensorProduct(*SMALL), node_attrs("all species", 6, SPECIES)
    with accelerated(self_check=True, backend="cuda"):
        module(draw((6, module.irreps_in1.dim), 3), y)
        assert usage(module) == {("tensor_product", "cuda"): 1}


def test_attrs_changed_in_place() -> None:
    """Rows are sorted anew."""
    module, x = o3.FullyConnectedTensorProduct(*SMALL), draw((5, 11), 1)
    y, other = one_hot([0, 1, 2, 3, 1], SPECIES), one_hot([3, 3, 0, 1, 2], SPECIES)
    expected = module(x, other)
    with accelerated(self_check=False, backend="cuda"):
        module(x, y)
        y.copy_(other)
        torch.testing.assert_close(module(x, y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float32), ids=str)
def test_few_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut finely, they give the same to the bit."""
    module = o3.FullyConnectedTensorProduct("33x0e+5x1o+3x3o", "3x0e", "5x0e+33x1o+2x3o").to(dtype)
    y = node_attrs("one row mixed", 70, 3).to(dtype)
    x = draw((70, module.irreps_in1.dim), 3, dtype).requires_grad_()

    def results() -> list[torch.Tensor]:
        with accelerated(self_check=False, backend="cuda"):
            out = module(x, y)
            assert usage(module) == {("tensor_product", "cuda"): 1}
            return [out, *torch.autograd.grad(out.square().sum(), (x, module.weight))]

    cut = []
    for multiprocessors in (0, 1 << 20):
        monkeypatch.setattr(
            indexed_linear_launch,
            "multiprocessors",
            lambda device: multiprocessors,  # noqa: B023
        )
        cut.append(results())
    assert all(torch.equal(few, many) for few, many in zip(*cut, strict=True))


def test_a_row_that_is_not_finite() -> None:
    """A row's NaN stays in its row."""
    module, y = o3.FullyConnectedTensorProduct(*SMALL), node_attrs("one row mixed", 6, SPECIES)
    x = draw((6, module.irreps_in1.dim), 1)
    x[2] = float("nan")
    with accelerated(self_check=False, backend="cuda"):
        assert module(x, y).isfinite().all(1).tolist() == [n != 2 for n in range(6)]


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
        "indexed_linear_few_double",
        "indexed_linear_input_few_double",
        "species_double",
    ]


FILES = ("indexed_linear.cu", "indexed_linear_weights.cu")


def exercise() -> None:
    """Several tiles, sums and classes, and a single matrix for all rows."""
    check(("33x0e+5x1o", "3x0e", "5x0e+33x1o"), node_attrs("one row mixed", 70, 3))
    linear = linear_parity.built("33x0e+5x1o", "5x0e+33x1o")
    x = draw((70, linear.irreps_in.dim), 1).requires_grad_()
    linear_parity.check(linear, x, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(sanitizer: str, kernels_on_host: HostCompiler) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    exercise()


@pytest.mark.slow
@pytest.mark.parametrize(("file", "barrier"), [(file, n) for file in FILES for n in barriers(file)])
def test_a_missing_barrier_is_a_race(
    file: str, barrier: int, kernels_on_host: HostCompiler
) -> None:
    """ThreadSanitizer says so, of each."""
    kernels_on_host.sanitizer, kernels_on_host.change = "thread", without(file, barrier)
    with race_shown():
        exercise()


@pytest.mark.slow
def test_a_whole_mace_trained_on_forces() -> None:
    """Energy, forces and the gradients of a loss of both, with every self-check."""
    model, batch = small_models.mace(), small_models.molecules()

    def run() -> tuple[torch.Tensor, ...]:
        out = model(dict(batch), training=True)
        loss = out["energy"].sum() + out["forces"].pow(2).sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return (out["energy"], out["forces"], *(g for g in found if g is not None))

    expected = run()
    with accelerated(self_check=True, backend="cuda"):
        for ours, stock in zip(run(), expected, strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-10)
        rows = e3nn_accel.report().rows
        assert "cuda" in {r.backend for r in rows if r.operation == "tensor_product"}


def planned(*irreps: str) -> Plan | Refusal:
    """By the cuda backend."""
    module = o3.FullyConnectedTensorProduct(*irreps)
    descriptor = e3nn_accel_describe(module, "tensor_product")
    assert isinstance(descriptor, TensorProductDescriptor)
    context = PlanContext(torch.float64, torch.device("cpu"), Config())
    return indexed_linear.plan(descriptor, context)
