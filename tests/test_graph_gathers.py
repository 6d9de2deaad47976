"""Rows taken many times over, and what the operations of one capture share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.overrides import TorchFunctionMode

from e3nn_accel import groupings
from e3nn_accel.graphs import gathers
from e3nn_accel.graphs.gathers import QuickGathers


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


@pytest.mark.parametrize(
    ("take", "shape", "function"),
    [
        (of_few_rows, (5, 3, 2), "_OfFewRows"),
        (of_ends, (5, 3), "_OfEnds"),
        (of_ends, (5, 2, 2), "_OfEnds"),
        (of_ends, (5,), "_OfEnds"),
        (of_each, (5, 3), "_OneOfEach"),
    ],
)
def test_gradients_are_torchs(
    take: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    function: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First and second."""
    torch.manual_seed(0)
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(take(rows).shape, dtype=torch.float64)
    used = []
    own = getattr(gathers, function).apply
    monkeypatch.setattr(
        getattr(gathers, function), "apply", lambda *of: (used.append(of), own(*of))[1]
    )

    def derivatives() -> list[torch.Tensor]:
        taken = take(rows)
        (first,) = torch.autograd.grad((taken.pow(3) * weights).sum(), rows, create_graph=True)
        return [taken, first, *torch.autograd.grad(first.pow(2).sum(), rows)]

    expected = derivatives()
    assert not used
    with QuickGathers():
        found = derivatives()
    assert used
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


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
        (torch.zeros(2, 3, requires_grad=True), torch.zeros(100, dtype=torch.int64)),
        (torch.zeros(40, 3, requires_grad=True), torch.zeros(9000, dtype=torch.int64)),
        (torch.zeros(400, 3, requires_grad=True), torch.ones(400, dtype=torch.bool)),
        (torch.zeros(2, 3, requires_grad=True), 1),
        (torch.zeros(2, 3, requires_grad=True), (slice(None), 0)),
        (torch.zeros(3, 2, requires_grad=True), (torch.tensor([0, 0, 2]), torch.tensor([1, 1, 0]))),
    ],
    ids=["no gradient", "few uses", "many rows", "mask", "number", "slices", "pairs"],
)
def test_other_indexing_is_torchs(rows: torch.Tensor, index: object) -> None:
    with QuickGathers():
        taken = rows[index]  # type: ignore[index]
    assert "Of" not in type(taken.grad_fn).__name__
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
