"""Layouts and weights: every conversion there and back, differentiable, by views where possible."""

from __future__ import annotations

from typing import Any

import pytest
import strategies
import torch
from comparison import draw
from hypothesis import given
from hypothesis import strategies as st

from e3nn_accel import layout
from e3nn_accel.irreps import MulIr, dim_of

ROWS = 3
Irreps = tuple[MulIr, ...]


def random_irreps(**options: Any) -> st.SearchStrategy[Irreps]:
    return strategies.irreps(**options).map(lambda blocks: tuple(MulIr(*b) for b in blocks))


def rows_of(irreps: Irreps, seed: int = 0) -> torch.Tensor:
    return draw((ROWS, dim_of(irreps)), seed)


@given(random_irreps())
def test_blocks_there_and_back(irreps: Irreps) -> None:
    """Blocks have their shapes, share memory with the rows, and join to the same rows."""
    x = rows_of(irreps)
    blocks = layout.split_blocks(x, irreps)
    assert [tuple(b.shape) for b in blocks] == [(ROWS, i.mul, i.ir_dim) for i in irreps]
    assert all(
        b.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        for b in blocks
        if b.numel()
    )
    assert torch.equal(layout.join_blocks(blocks, ROWS, x), x)


@given(random_irreps())
def test_ir_mul_there_and_back(irreps: Irreps) -> None:
    """Component by component: channel u of component m moves from u * (2l+1) + m to m * mul + u."""
    x = rows_of(irreps)
    flipped = layout.rows_ir_mul(x, irreps)
    assert torch.equal(layout.rows_mul_ir(flipped, irreps), x)
    assert torch.equal(layout.rows_ir_mul(layout.rows_mul_ir(x, irreps), irreps), x)
    start = 0
    for block in irreps:
        for u in range(block.mul):
            for m in range(block.ir_dim):
                expected = x[:, start + u * block.ir_dim + m]
                assert torch.equal(flipped[:, start + m * block.mul + u], expected)
        start += block.dim


@pytest.mark.parametrize("strided", ["columns", "rows", "expanded"])
def test_strided_rows(strided: str) -> None:
    """Nothing assumes contiguous rows."""
    irreps = (MulIr(2, 1, -1), MulIr(3, 0, 1), MulIr(1, 2, 1))
    dim = dim_of(irreps)
    x = {
        "columns": draw((ROWS, 2 * dim), 1)[:, ::2],
        "rows": draw((dim, ROWS), 1).T,
        "expanded": draw((1, dim), 1).expand(ROWS, dim),
    }[strided]
    assert not x.is_contiguous()
    assert torch.equal(layout.rows_ir_mul(x, irreps), layout.rows_ir_mul(x.contiguous(), irreps))
    assert torch.equal(layout.join_blocks(layout.split_blocks(x, irreps), ROWS, x), x)


def test_layouts_are_differentiable() -> None:
    """First and second derivatives against finite differences."""
    irreps = (MulIr(2, 1, -1), MulIr(1, 2, 1))
    x = rows_of(irreps).requires_grad_()
    for convert in (layout.rows_ir_mul, layout.rows_mul_ir):
        assert torch.autograd.gradcheck(lambda t, c=convert: c(t, irreps), x)
        assert torch.autograd.gradgradcheck(lambda t, c=convert: c(t, irreps) ** 2, x)


SHAPES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=4)


@given(SHAPES, st.sampled_from([(), (4,), (2, 3)]))
def test_weights_there_and_back(shapes: list[tuple[int, ...]], leading: tuple[int, ...]) -> None:
    """Flat weights, shared or a row each, into paths and back, without a copy on the way in."""
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    weight = draw((*leading, numel), 1)
    parts = layout.split_weights(weight, shapes)
    assert [tuple(p.shape) for p in parts] == [(*leading, *shape) for shape in shapes]
    storage = weight.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in parts if p.numel())
    if parts:
        assert torch.equal(layout.join_weights(parts, shapes), weight)


@given(st.sampled_from([(), (1,), (4,), (2, 1), (2, 4)]))
def test_flat_rows(shape: tuple[int, ...]) -> None:
    """Rows broadcast as torch broadcasts leading dimensions."""
    leading = torch.broadcast_shapes(shape, (2, 4))
    x = draw((*shape, 5), 1)
    assert torch.equal(layout.flat_rows(x, leading, 5), x.expand(2, 4, 5).reshape(8, 5))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_reduced_weights(paths: int, reduced: int, seed: int) -> None:
    """Reducing after expanding gives the reduced weights back."""
    reduced = min(reduced, paths)
    projection = draw((paths, reduced), seed)
    weight = draw((2, reduced, 3), seed + 1)
    back = layout.reduce_weights(layout.expand_weights(weight, projection), projection)
    limit = 1e-12 * float(torch.linalg.cond(projection)) ** 2
    assert float((back - weight).norm()) <= limit * float(weight.norm())
