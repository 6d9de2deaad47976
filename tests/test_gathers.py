"""Rows taken many times over, and what the operations of one capture share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from e3nn_accel import gathers, groupings
from e3nn_accel.gathers import QuickGathers

Take = Callable[[torch.Tensor], torch.Tensor]

pytestmark = pytest.mark.once


def of_few_rows(rows: torch.Tensor) -> torch.Tensor:
    """As a structure's strain is taken for each of its edges; some rows never."""
    return rows[torch.arange(600) % 4]


def of_ends(rows: torch.Tensor) -> torch.Tensor:
    """As positions are, for edges in no order; some indices count from the end, some nodes have no edge."""
    generator = torch.Generator().manual_seed(1)
    edge_index = torch.randint(-4, 4, (2, 100), generator=generator)
    return rows[edge_index[1]] - 2 * rows[edge_index[0]]


def of_each(rows: torch.Tensor) -> torch.Tensor:
    """As an atom's energy is, by its head."""
    return rows[torch.arange(len(rows)), torch.tensor([0, 2, 2, -1, 1])]


def of_strain(rows: torch.Tensor) -> torch.Tensor:
    """As a structure's cell is for its atoms' edges; a structure without edges, negative numbers."""
    generator = torch.Generator().manual_seed(1)
    edge_index = torch.randint(-6, 6, (2, 100), generator=generator)
    batch = torch.tensor([0, 0, -1, 1, 1, 1])
    return rows[batch] @ torch.eye(2) + rows[batch[edge_index[0]]][:6]


def of_no_edges(rows: torch.Tensor) -> torch.Tensor:
    edge_index = torch.zeros((2, 0), dtype=torch.int64)
    return rows[edge_index[0]] + rows[edge_index[1]]


def of_edges_that_stride(rows: torch.Tensor) -> torch.Tensor:
    """Neither index nor rows are contiguous."""
    edge_index = torch.randint(5, (100, 2), generator=torch.Generator().manual_seed(1)).T
    return rows.transpose(0, 1).contiguous().transpose(0, 1)[edge_index[1]]


CASES: dict[str, tuple[Take, tuple[int, ...]]] = {
    "few rows": (of_few_rows, (5, 3, 2)),
    "one row": (lambda rows: rows[torch.zeros(7, dtype=torch.int64)], (1, 3)),
    "few rows, from the end": (lambda rows: rows[torch.tensor([-1, 0, -2, 1])], (3, 2)),
    "ends": (of_ends, (5, 3)),
    "ends, matrices": (of_ends, (5, 2, 2)),
    "ends, numbers": (of_ends, (5,)),
    "ends, strided": (of_edges_that_stride, (5, 3)),
    "no edges": (of_no_edges, (5, 3)),
    "strain": (of_strain, (4, 2, 2)),
    "strain of one": (lambda rows: of_strain(rows[[0, 0, 0]]), (1, 2, 2)),
    "heads": (of_each, (5, 3)),
}


@pytest.mark.parametrize(("take", "shape"), CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_torchs(take: Take, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """First, second and third, each from a function of the one before."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    rows = torch.randn(shape, requires_grad=True)
    weights = torch.randn(take(rows).shape)

    def derivatives() -> list[torch.Tensor]:
        found = [take(rows)]
        (first,) = torch.autograd.grad((found[0].sin() * weights).mean(), rows, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), rows, create_graph=True)
        (third,) = torch.autograd.grad(second.sin().sum(), rows)
        return [*found, first, second, third]

    try:
        expected = derivatives()
        with QuickGathers():
            found = derivatives()
    finally:
        torch.set_default_dtype(default)
    assert "_Taken" in nodes_of(found[0])
    assert "_Taken" not in nodes_of(expected[0])
    assert torch.equal(found[0], expected[0])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def nodes_of(out: torch.Tensor) -> str:
    """Names of the functions of autograd's graph."""
    names, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        names.add(type(node).__name__)
        left += [following for following, _ in node.next_functions if following is not None]
    return " ".join(sorted(names))


@pytest.mark.parametrize(("take", "shape"), CASES.values(), ids=list(CASES))
def test_gradcheck(take: Take, shape: tuple[int, ...]) -> None:
    """By finite differences, whether the gradient's own gradients are recorded or not."""
    torch.manual_seed(0)
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def quickly(rows: torch.Tensor) -> torch.Tensor:
        with QuickGathers():
            return take(rows)

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.autograd.gradcheck(quickly, rows)
        torch.autograd.gradgradcheck(quickly, rows)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize(("take", "shape"), CASES.values(), ids=list(CASES))
def test_many_gradients_at_once(take: Take, shape: tuple[int, ...]) -> None:
    """As vmap finds rows of a Jacobian, and of a Hessian."""
    torch.manual_seed(0)
    rows = torch.randn(shape, requires_grad=True)

    def jacobians() -> list[torch.Tensor]:
        taken = take(rows)
        basis = torch.randn((3, *taken.shape), generator=torch.Generator().manual_seed(2))
        (by_vmap,) = torch.autograd.grad(
            taken, rows, basis, is_grads_batched=True, retain_graph=True
        )
        (first,) = torch.autograd.grad(taken.pow(3).sum(), rows, create_graph=True)
        directions = torch.stack([rows.detach(), torch.ones_like(rows)])
        (hessian,) = torch.autograd.grad(first, rows, directions, is_grads_batched=True)
        return [by_vmap, hessian]

    expected = jacobians()
    with QuickGathers():
        found = jacobians()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "take",
    [
        lambda rows: rows[torch.tensor([0, 1, 5, 0])],
        lambda rows: rows[torch.tensor([0, 1, -4, 0])],
        lambda rows: rows[torch.tensor([[0, 1], [2, 3]])[1]],
        lambda rows: rows[torch.tensor([0, 7, 1])[torch.tensor([[0, 1, 2, 0]] * 2)[0]]],
        lambda rows: rows[torch.arange(3), torch.tensor([0, 2, 1])],
    ],
    ids=["few", "few, negative", "ends", "strain", "heads"],
)
def test_wrong_indices_are_torchs_errors(take: Take) -> None:
    rows = torch.zeros((3, 2), requires_grad=True)
    with pytest.raises(IndexError) as expected:
        take(rows)
    with QuickGathers(), pytest.raises(IndexError) as found:
        take(rows)
    assert str(found.value) == str(expected.value)


ONLY_ONE: dict[str, tuple[Take, tuple[int, ...]]] = {
    "a head": (lambda rows: rows[torch.arange(4), torch.tensor([0, -1, 0, 0])], (4, 1)),
    "a scale": (lambda rows: rows[torch.tensor([0, -1, 0])], (1,)),
    "a scale of nothing": (lambda rows: rows[torch.zeros(0, dtype=torch.int64)], (1,)),
    "the whole": (lambda rows: rows.narrow(1, 0, 3), (2, 3)),
    "the whole, by its last": (lambda rows: rows.narrow(-1, 0, 3), (2, 3)),
}


@pytest.mark.parametrize(("take", "shape"), ONLY_ONE.values(), ids=list(ONLY_ONE))
def test_the_only_choice_is_a_view(take: Take, shape: tuple[int, ...]) -> None:
    """Nothing is copied, forward or back."""
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def quickly(rows: torch.Tensor) -> torch.Tensor:
        with QuickGathers():
            return take(rows)

    found = quickly(rows)
    assert torch.equal(found, take(rows))
    assert found.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    assert not nodes_of(found) or {
        "IndexBackward0",
        "NarrowBackward0",
        "SliceBackward0",
    }.isdisjoint(nodes_of(found).split())
    torch.autograd.gradcheck(quickly, rows)
    torch.autograd.gradgradcheck(quickly, rows)


@pytest.mark.parametrize(
    "take",
    [
        lambda rows: rows[torch.arange(4), torch.tensor([0, 1, 0, 0])],
        lambda rows: rows[torch.arange(4), torch.tensor([0, -2, 0, 0])],
        lambda rows: rows[:1, 0][torch.tensor([0, 1])],
        lambda rows: rows.narrow(1, 0, 2),
        lambda rows: rows.narrow(2, 0, 1),
    ],
)
def test_what_is_none_is_torchs_error(take: Take) -> None:
    rows = torch.zeros((4, 1), requires_grad=True)
    with pytest.raises((IndexError, RuntimeError)) as expected:
        take(rows)
    with QuickGathers(), pytest.raises(expected.type) as found:
        take(rows)
    assert str(found.value) == str(expected.value)


def test_a_part_is_torchs() -> None:
    """And what isn't asked for by numbers."""
    rows = torch.randn(2, 3)
    with QuickGathers():
        assert torch.equal(rows.narrow(1, 0, 2), rows[:, :2])
        assert torch.equal(rows.narrow(1, torch.tensor(0), 3), rows)
        assert torch.equal(rows.narrow(dim=1, start=0, length=3), rows)


def test_an_index_changed_since_is_torchs_error() -> None:
    """Not another gradient."""
    rows, index = torch.zeros((2, 3), requires_grad=True), torch.zeros(4, dtype=torch.int64)
    with QuickGathers():
        taken = rows[index]
    index.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        taken.sum().backward()  # type: ignore[no-untyped-call]


def test_nothing_is_copied_out_of_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where copies of the gradient would be too large, torch's own is used."""
    rows, index = torch.zeros((4, 3), requires_grad=True), torch.arange(200) % 4
    monkeypatch.setattr(gathers, "COPIES", 200 * 12)
    with QuickGathers():
        assert "_Taken" in nodes_of(rows[index])
    monkeypatch.setattr(gathers, "COPIES", 200 * 12 - 1)
    with QuickGathers():
        assert "_Taken" not in nodes_of(rows[index])


def test_what_is_not_finite_stays_in_its_row() -> None:
    rows, index = torch.zeros(2, 3, requires_grad=True), torch.arange(400) % 2
    with QuickGathers():
        taken = rows[index]
    g = torch.ones_like(taken)
    g[0, 0] = float("nan")
    (gradient,) = torch.autograd.grad(taken, rows, g)
    assert gradient.isnan().tolist() == [[True, False, False], [False] * 3]


@pytest.mark.parametrize(
    ("rows", "index"),
    [
        (torch.zeros(2, 3), torch.zeros(400, dtype=torch.int64)),
        (torch.zeros(2, 3, requires_grad=True), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(99, 3, requires_grad=True), torch.zeros(9000, dtype=torch.int64)),
        (torch.zeros(2, 3, requires_grad=True).half(), torch.zeros(400, dtype=torch.int64)),
        (torch.zeros(400, 3, requires_grad=True), torch.ones(400, dtype=torch.bool)),
        (torch.zeros(2, 3, requires_grad=True), 1),
        (torch.zeros(2, 3, requires_grad=True), (slice(None), 0)),
        (torch.zeros(3, 2, requires_grad=True), (torch.tensor([0, 0, 2]), torch.tensor([1, 1, 0]))),
    ],
    ids=["no gradient", "few uses", "many rows", "half", "mask", "number", "slices", "pairs"],
)
def test_other_indexing_is_torchs(rows: torch.Tensor, index: object) -> None:
    with QuickGathers():
        taken = rows[index]  # type: ignore[index]
    assert "_Taken" not in type(taken.grad_fn).__name__
    assert torch.equal(taken, rows[index])  # type: ignore[index]


def test_other_modes_see_what_they_saw() -> None:
    """A mode of the caller's is asked, too."""
    seen = []

    class Listener(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Listener(), QuickGathers():
        torch.zeros(2, requires_grad=True)[torch.zeros(400, dtype=torch.int64)]
    assert seen


@pytest.mark.parametrize(
    ("index", "value", "made_a_tensor"),
    [
        ((torch.arange(3), slice(None), torch.tensor([1, 0, 1])), 1, True),
        ((slice(None), torch.tensor([1, 0])), 2.5, True),
        ((0, 1), 1, False),
        (torch.tensor([0, 2]), 1, True),
        (torch.tensor([True, False, True]), 1, False),
        ((torch.arange(3), slice(None), torch.tensor([1, 0, 1])), torch.ones(4), False),
    ],
)
def test_a_number_written_by_index_is_no_tensor_of_the_host(
    index: Any, value: Any, made_a_tensor: bool
) -> None:
    """Which is what torch makes of it for a device, and waits for; as MACE masks the readouts of other heads."""
    written: list[Any] = []

    class Seen(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func is torch.Tensor.__setitem__:
                written.append(args[2])
            return func(*args, **(kwargs or {}))

    found, expected = torch.zeros(3, 4, 2), torch.zeros(3, 4, 2)
    expected[index] = value
    with Seen(), QuickGathers():
        found[index] = value
    assert torch.equal(found, expected)
    (seen,) = written
    assert (isinstance(seen, torch.Tensor) and not isinstance(value, torch.Tensor)) == made_a_tensor
    if made_a_tensor:
        assert (seen.dtype, seen.device, seen.dim()) == (found.dtype, found.device, 0)


def test_found_once_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same tensor, unchanged; again in the next capture, and always where none is known to begin."""
    monkeypatch.setattr(groupings, "captured", lambda tensor: True)
    finds = []

    def find(tensor: torch.Tensor) -> torch.Tensor:
        finds.append(tensor)
        return tensor + 1

    tensor = torch.zeros(3)

    def count() -> int:
        finds.clear()
        for _ in range(2):
            groupings.shared(tensor, "one", find)
        groupings.shared(tensor, "other", find)
        tensor.add_(1)
        assert torch.equal(groupings.shared(tensor, "one", find), tensor + 1)
        return len(finds)

    for _ in range(2):
        with groupings.one_capture():
            assert count() == 3
    assert count() == 4
