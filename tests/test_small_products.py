"""Vectors by a matrix each, as MACE strains positions and shifts, and copies of many tensors at once."""

from __future__ import annotations

import pytest
import torch

from e3nn_accel import gathers
from e3nn_accel.gathers import QuickGathers
from e3nn_accel.graphs.copying import copy_all
from e3nn_accel.ops.small_products import EQUATION

pytestmark = pytest.mark.once


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_einsum(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, first and second derivatives are torch's; and it is our function that gives them."""
    torch.manual_seed(0)
    vectors, matrices, direction = (
        torch.randn(rows, *shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3,), (3, 3), (3,))
    )
    used, own = [], gathers.vectors_by_matrices
    monkeypatch.setattr(gathers, "vectors_by_matrices", lambda *of: (used.append(of), own(*of))[1])

    def derivatives() -> list[torch.Tensor]:
        out = torch.einsum(EQUATION, vectors, matrices)
        first = torch.autograd.grad(out, (vectors, matrices), direction, create_graph=True)
        functional = sum(t.pow(3).sum() for t in first)
        assert isinstance(functional, torch.Tensor)
        return [
            out,
            *first,
            *torch.autograd.grad(functional, (vectors, matrices, direction)),
        ]

    expected = derivatives()
    assert not used
    with QuickGathers():
        found = derivatives()
    assert len(used) == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_other_einsums_are_torchs() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3, 3)
    with QuickGathers():
        for equation, operands in (("bi,bj->bij", (a, a)), ("be,bce->bc", (a, b)), ("be->b", (a,))):
            expected = torch.einsum(equation, *operands)
            assert torch.equal(torch.functional.einsum(equation, *operands), expected)


def test_copies_of_several_dtypes_and_strides() -> None:
    sources = [
        torch.randn(4, 3),
        torch.randn(3, 4).T,
        torch.arange(12).view(2, 6),
        torch.arange(5),
        torch.randn(2, dtype=torch.float64),
        torch.randn(0, 3),
        torch.randn(1, 3).expand(4, 3),
    ]
    wide = torch.zeros(2, 9, dtype=torch.int64)
    targets = [torch.full(s.shape, -1, dtype=s.dtype) for s in sources]
    targets[2] = wide[:, :6]
    copy_all(targets, sources)
    assert all(map(torch.equal, targets, sources))
    assert not wide[:, 6:].any()
