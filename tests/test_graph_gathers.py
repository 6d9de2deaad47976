"""Rows taken many times over, and what the operations of one capture share."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from e3nn_accel import groupings
from e3nn_accel.graphs.gathers import FewRows


def test_gradients_are_torchs() -> None:
    """First and second, of rows of any shape, some of them never taken."""
    torch.manual_seed(0)
    rows = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    index = torch.randint(4, (600,))
    weights = torch.randn(600, 3, 2, dtype=torch.float64)

    def derivatives() -> list[torch.Tensor]:
        taken = rows[index]
        (first,) = torch.autograd.grad((taken.pow(3) * weights).sum(), rows, create_graph=True)
        return [taken, first, *torch.autograd.grad(first.pow(2).sum(), rows)]

    expected = derivatives()
    with FewRows():
        found = derivatives()
    assert "Gather" in type(found[0].grad_fn).__name__
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_what_is_not_finite_stays_in_its_row() -> None:
    rows, index = torch.zeros(2, 3, requires_grad=True), torch.arange(400) % 2
    with FewRows():
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
    ],
    ids=["no gradient", "few uses", "many rows", "mask", "number", "slices"],
)
def test_other_indexing_is_torchs(rows: torch.Tensor, index: object) -> None:
    with FewRows():
        taken = rows[index]  # type: ignore[index]
    assert "Gather" not in type(taken.grad_fn).__name__
    assert torch.equal(taken, rows[index])  # type: ignore[index]


def test_other_modes_see_what_they_saw() -> None:
    """A mode of the caller's is asked, too."""
    seen = []

    class Listener(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Listener(), FewRows():
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
