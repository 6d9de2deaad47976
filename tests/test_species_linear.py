"""Products with one-hot scalars: a matrix for each species, the full product for other rows."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import comparison
import pytest
import torch
from comparison import Operands, accelerated, assert_close, derivatives, draw, poisoned_memory
from mace_parts import ATTRS, node_attrs, one_hot
from strategies import Case

from e3nn_accel.ops.indexed_linear import indexed_linear
from e3nn_accel.ops.permute_rows import rows_to_slots
from e3nn_accel.species import FEW_ROWS, species_of

pytestmark = pytest.mark.usefixtures("eager_e3nn", "float64")

TOLERANCE = 1e-12
SPECIES = 4


def skip_tp(in1: str, species: int, out: str, weights: str = "internal") -> Case:
    """MACE's skip connection."""
    return Case("FullyConnectedTensorProduct", (in1, f"{species}x0e", out), (), weights)


SMALL = skip_tp("3x0e+2x1o+2x0e", SPECIES, "2x1o+3x0e")


def leaves(case: Case, module: Any, y: torch.Tensor, trained: bool = True) -> Operands:
    """Features, scalars as given, weights."""
    x = draw((*y.shape[:-1], module.irreps_in1.dim), 3).requires_grad_()
    found = {"x": x, "y": y, **dict(module.named_parameters())}
    if case.weights == "shared":
        found["weight"] = draw((module.weight_numel,), 4).requires_grad_(trained)
    return found


def check(case: Case, y: torch.Tensor, trained: bool = True) -> None:
    """Values, first and second derivatives; the indexed linear is what was planned."""
    module = case.build().requires_grad_(trained)
    operands = leaves(case, module, y, trained)
    expected = derivatives(functools.partial(case.call, module), operands)
    with accelerated(), poisoned_memory():
        found = derivatives(functools.partial(case.call, module), operands)
        comparison.assert_ran_on_torch(module, "tensor_product", 1)
        assert comparison.strategy(module) == f"indexed linear over {module.irreps_in2.dim} species"
    assert_close(found, expected, TOLERANCE, case.slices(module))


both_trained = pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])


@both_trained
@pytest.mark.parametrize("attrs", ATTRS)
@pytest.mark.parametrize("gradient", [False, True], ids=["constant", "wants gradient"])
def test_attrs(attrs: str, gradient: bool, trained: bool) -> None:
    """Sorted or not, absent species, scaled rows, rows that aren't one-hot; their gradient too."""
    check(SMALL, node_attrs(attrs, 9, SPECIES).requires_grad_(gradient), trained)


@both_trained
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows(rows: int, trained: bool) -> None:
    """No row, one row, fewer rows than species."""
    check(SMALL, node_attrs("all species", rows, SPECIES), trained)


@pytest.mark.parametrize("attrs", ATTRS)
def test_many_rows(attrs: str) -> None:
    """More rows than are counted in Python."""
    check(SMALL, node_attrs(attrs, FEW_ROWS + 9, SPECIES))


@both_trained
@pytest.mark.parametrize(
    "case",
    [
        skip_tp("2x0e+3x1o", 89, "3x0e+2x1o"),
        skip_tp("3x0e+2x1o+1x2e", SPECIES, "2x2e+1x3o+3x0e"),
        skip_tp("2x0o+1x1e", SPECIES, "3x0o+2x1e"),
        skip_tp("2x0e+3x1o", SPECIES, "3x0e+2x1o", "shared"),
        skip_tp("2x0e+0x1o", SPECIES, "3x0e+2x1o+0x0e"),
        skip_tp("5x1o", 2, "1x1o"),
    ],
    ids=["many species", "unreachable", "odd parity", "external", "no channels", "one block"],
)
def test_shapes(case: Case, trained: bool) -> None:
    """Many species, outputs that nothing reaches, external weights, empty blocks."""
    species = int(case.args[1].split("x")[0])
    check(case, node_attrs("all species", 12, species), trained)


@both_trained
@pytest.mark.parametrize("species", [[0, 0, 1], [1, 0, 1, 0]], ids=["sorted", "unsorted"])
def test_single_channels(species: list[int], trained: bool) -> None:
    """One channel of a vector, whose transpose keeps its strides."""
    check(skip_tp("4x0e+1x1o+1x2e", 2, "3x0e+2x1o+1x2e"), one_hot(species, 2), trained)


def test_odd_scalars() -> None:
    """Parity-odd one-hot scalars couple to the other parity."""
    check(
        Case("FullyConnectedTensorProduct", ("2x0e+1x1o", "3x0o", "2x0o+2x1e")),
        one_hot([2, 0, 1, 1], 3),
    )


@pytest.mark.parametrize("shape", [(2, 3), (), (2, 0)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    """Rows of any leading shape."""
    rows = torch.Size(shape).numel()
    check(SMALL, node_attrs("all species", rows, SPECIES).reshape(*shape, SPECIES))


def test_one_species_for_all_rows() -> None:
    """Scalars that broadcast against the features."""
    module = SMALL.build()
    o = {"x": draw((6, module.irreps_in1.dim), 1), "y": one_hot([2], SPECIES)}
    expected = SMALL.call(module, o)
    with accelerated():
        torch.testing.assert_close(SMALL.call(module, o), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_attrs_changed_in_place(changed: int) -> None:
    """Species are looked at for every call: counted writes, uncounted ones, and numpy's."""
    module = SMALL.build()
    x, y = draw((5, module.irreps_in1.dim), 1), one_hot([0, 1, 2, 3, 1], SPECIES)
    other = one_hot([3, 3, 0, 1, 2], SPECIES)
    write = (y.copy_, y.data.copy_, lambda t: y.numpy().__setitem__(slice(None), t.numpy()))[
        changed
    ]
    expected = module(x, other)
    with accelerated():
        module(x, y)
        write(other)
        torch.testing.assert_close(module(x, y), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("step", [1, 2])
def test_weights_within_other_memory(step: int) -> None:
    """External weights needn't begin where their memory does, nor be contiguous."""
    case = skip_tp("2x0e+3x1o", SPECIES, "3x0e+2x1o", "shared")
    module, y = case.build(), node_attrs("all species", 6, SPECIES)
    x = draw((6, module.irreps_in1.dim), 1)
    weight = draw((5 + step * module.weight_numel,), 2)[5::step]
    expected = module(x, y, weight)
    with accelerated(), poisoned_memory():
        torch.testing.assert_close(module(x, y, weight), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_training_after_inference() -> None:
    """Planned and grouped in inference mode, then used with gradients."""
    module, y = SMALL.build(), node_attrs("all species", 6, SPECIES)
    operands = leaves(SMALL, module, y)
    expected = derivatives(functools.partial(SMALL.call, module), operands)
    with accelerated():
        with torch.inference_mode():
            SMALL.call(module, operands)
        found = derivatives(functools.partial(SMALL.call, module), operands)
    assert_close(found, expected, TOLERANCE)


def test_rows_that_arent_finite() -> None:
    """A row's NaN stays in its row."""
    module, y = SMALL.build(), node_attrs("all species", 6, SPECIES)
    x = draw((6, module.irreps_in1.dim), 1)
    x[2] = float("nan")
    with accelerated():
        finite = module(x, y).isfinite().all(1)
    assert finite.tolist() == [n != 2 for n in range(6)]


@pytest.mark.parametrize(
    ("attrs", "expected"),
    [("all species", True), ("scaled one-hot", True), ("zero rows", False), ("random", False)],
)
def test_what_counts_as_one_hot(attrs: str, expected: bool) -> None:
    """A single non-zero of any value; no or several non-zeros don't."""
    assert (species_of(node_attrs(attrs, 6, SPECIES)) is not None) == expected


def test_gradgradcheck_of_the_module() -> None:
    """Second derivatives against finite differences."""
    case = skip_tp("2x0e+1x1o", 2, "1x0e+1x1o", "shared")
    module, y = case.build(), one_hot([1, 0, 1], 2)
    operands = leaves(case, module, y)
    with accelerated():
        assert torch.autograd.gradgradcheck(
            lambda x, w: module(x, y, w), (operands["x"], operands["weight"])
        )


# The operations on their own


def indexed_operands(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return draw((rows, 3), 1).requires_grad_(), draw((3, 4, 2), 2).requires_grad_()


GROUPS = {
    "some": ((0, 0, 2), (3, 2, 6)),
    "one": ((1, 0, 6),),
    "all": ((0, 0, 1), (1, 1, 2), (2, 2, 5), (3, 5, 6)),
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_indexed_linear(groups: tuple[tuple[int, int, int], ...]) -> None:
    """Each row meets its class's matrix; derivatives against finite differences."""
    x, w = indexed_operands()
    kinds = torch.cat([torch.full((last - first,), kind) for kind, first, last in groups])
    with poisoned_memory():
        found = indexed_linear(x, w, groups, 0.3)
        expected = 0.3 * torch.einsum("ri,iro->ro", x, w[:, kinds])
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert torch.autograd.gradcheck(lambda a, b: indexed_linear(a, b, groups, 0.3), (x, w))
        assert torch.autograd.gradgradcheck(lambda a, b: indexed_linear(a, b, groups, 0.3), (x, w))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2))[1:])
def test_indexed_linear_computes_what_is_wanted(wanted: tuple[bool, bool]) -> None:
    """A gradient is the same whichever others are asked for."""
    x, w = (
        t.detach().requires_grad_(flag) for t, flag in zip(indexed_operands(), wanted, strict=True)
    )
    out = indexed_linear(x, w, GROUPS["some"], 0.3)
    direction = draw((6, 2), 5)
    asked = [t for t in (x, w) if t.requires_grad]
    every = indexed_operands()
    reference = torch.autograd.grad(indexed_linear(*every, GROUPS["some"], 0.3), every, direction)
    expected = [g for g, flag in zip(reference, wanted, strict=True) if flag]
    for found, other in zip(torch.autograd.grad(out, asked, direction), expected, strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("strided", ["x", "weight"])
def test_indexed_linear_strides(strided: str) -> None:
    """Operands needn't be contiguous."""
    x, w = (t.detach() for t in indexed_operands())
    given = (
        (x.T.contiguous().T, w)
        if strided == "x"
        else (x, w.transpose(0, 2).contiguous().transpose(0, 2))
    )
    groups = GROUPS["some"]
    torch.testing.assert_close(
        indexed_linear(*given, groups, 2.0), indexed_linear(x, w, groups, 2.0)
    )


SLOTS = {
    "padded": ([2, 0, 4, 1, 4, 3], 4),
    "full": ([2, 0, 1, 3], 4),
    "no rows": ([0, 0], 0),
    "nothing": ([], 0),
}


@pytest.mark.parametrize(("source", "rows"), SLOTS.values(), ids=SLOTS)
def test_rows_to_slots(source: list[int], rows: int) -> None:
    """Rows lie in their slots, other slots are zero; derivatives to the second order."""
    index = torch.tensor(source, dtype=torch.int64)
    slot = torch.tensor([source.index(n) for n in range(rows)], dtype=torch.int64)
    x = draw((rows, 3), 1).requires_grad_()
    with poisoned_memory():
        found = rows_to_slots(x, index, slot)
        padded = torch.cat([x, x.new_zeros(1, 3)])
        assert torch.equal(found, padded[index])
        if rows:
            assert torch.autograd.gradcheck(lambda t: rows_to_slots(t, index, slot), x)
            assert torch.autograd.gradgradcheck(lambda t: rows_to_slots(t, index, slot) ** 2, x)
