"""Nodes sorted by species in kernels, against the same in torch operations, bit for bit."""

from __future__ import annotations

from dataclasses import fields

import torch
from mace_parts import node_attrs, one_hot

from e3nn_accel.backends.cuda.species import MOST_KINDS, SpeciesSort
from e3nn_accel.groupings import in_torch

CASES = (
    "no rows",
    "one row",
    "one species",
    "many rows",
    "many species",
    "too many species",
    "numbers that are none",
    "negative zeros",
    "tiny numbers",
    "columns first",
    "a row for all",
    "more dimensions",
)


def attrs_of(case: str) -> torch.Tensor:
    """node_attrs, float64."""
    few = one_hot([2, 0, 1, 0, 3, 2])
    odd = few.clone()
    if case == "numbers that are none":
        odd[1, 0], odd[2, 2], odd[4, 3] = float("nan"), float("nan"), float("inf")
        return odd
    if case == "negative zeros":
        return torch.where(few == 0, -few, few)
    return {
        "no rows": lambda: few[:0],
        "one row": lambda: few[:1],
        "one species": lambda: one_hot([0, 0, 0], 1) * torch.tensor([[1.0], [0], [2]]).double(),
        "many rows": lambda: node_attrs("zero rows", 777, 5),
        "many species": lambda: node_attrs("all species", 100, 1300),
        "too many species": lambda: node_attrs("all species", 3, MOST_KINDS + 1),
        "tiny numbers": lambda: few * 1e-310,
        "columns first": lambda: few.T.contiguous().T,
        "a row for all": lambda: few[:1].expand(9, -1),
        "more dimensions": lambda: few.view(2, 3, -1),
    }[case]()


def assert_sorted(sort: SpeciesSort, attrs: torch.Tensor) -> None:
    """All that a grouping holds is the same."""
    found, expected = sort.nodes(attrs), in_torch(attrs.clone())
    for field in fields(found):
        ours, stock = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(stock, torch.Tensor):
            assert ours.dtype == stock.dtype, field.name
            assert ours.is_contiguous(), field.name
            assert torch.equal(ours.nan_to_num(7.0), stock.nan_to_num(7.0)), field.name
        else:
            assert ours == stock, field.name
    assert found.attrs is not None
    assert found.attrs.data_ptr() != attrs.data_ptr() or not attrs.numel()
