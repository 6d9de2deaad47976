"""Rows of node_attrs grouped by species, for plans in torch operations.

With few atoms, finding the species takes longer than multiplying with their matrices, and what counts
is the number of torch calls: those of few rows are counted in Python.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from e3nn_accel.groupings import captured, shared

Groups = tuple[tuple[int, int, int], ...]

FEW_ROWS = 128
"""Measured on a CPU: up to here Python counts faster than torch, from two hundred rows on slower."""


@dataclass(frozen=True)
class Species:
    """Rows sorted by the column of their single non-zero.

    Attributes:
        rows: How many.
        order: [rows], the rows in sorted order, or None where they came sorted.
        inverse: [rows], where each row went, or None likewise.
        values: [rows], the non-zeros in sorted order, or None where all are one.
        column: [rows], the species of each row in the caller's order.
        bounds: (species, first row, last row + 1) in sorted order.
    """

    rows: int
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    values: torch.Tensor | None
    column: torch.Tensor
    bounds: Groups

    def groups(self, rows_each: int) -> Groups:
        """The same where each row became ``rows_each`` rows."""
        if rows_each == 1:
            return self.bounds
        return tuple(
            (kind, first * rows_each, last * rows_each) for kind, first, last in self.bounds
        )


def species_of(attrs: torch.Tensor) -> Species | None:
    """Group rows [.., species] by their single non-zero.

    None where a row has another number of them, and while a CUDA graph is captured, which can't wait to know.
    """
    return None if captured(attrs) else shared(attrs, "species", _find)


def _find(attrs: torch.Tensor) -> Species | None:
    if attrs.dim() != 2:
        attrs = attrs.reshape(-1, attrs.shape[-1])
    rows = attrs.shape[0]
    if not rows:
        nowhere = torch.zeros(0, dtype=torch.int64, device=attrs.device)
        return Species(0, None, None, None, nowhere, ())
    # as many non-zeros as rows and one in each row: found by size, whatever its sign
    values, columns = attrs.max(1)
    if int(torch.count_nonzero(attrs)) != rows:
        return None
    few = rows <= FEW_ROWS
    ones = values.tolist().count(1) == rows if few else bool((values == 1).all())
    if not ones:
        columns = attrs.abs().argmax(1)
        values = attrs.gather(1, columns.unsqueeze(1)).squeeze(1)
        if not bool((values != 0).all()):
            return None
    order, inverse, bounds = _sort_few(columns) if few else _sort_many(columns)
    if ones:
        return Species(rows, order, inverse, None, columns, bounds)
    sorted_values = values if order is None else values[order]
    return Species(rows, order, inverse, sorted_values, columns, bounds)


Sorted = tuple[torch.Tensor | None, torch.Tensor | None, Groups]
"""Order, inverse and bounds of `Species`."""


def _sort_few(columns: torch.Tensor) -> Sorted:
    kinds = columns.tolist()
    counts = Counter(kinds)
    bounds, first = [], 0
    for kind in sorted(counts):
        bounds.append((kind, first, first + counts[kind]))
        first += counts[kind]
    if len(bounds) == 1 or kinds == sorted(kinds):
        return None, None, tuple(bounds)
    order = columns.argsort(stable=True)
    return order, order.argsort(), tuple(bounds)


def _sort_many(columns: torch.Tensor) -> Sorted:
    by_species, order = torch.sort(columns, stable=True)
    kinds, counts = torch.unique_consecutive(by_species, return_counts=True)
    bounds, first = [], 0
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        bounds.append((kind, first, first + count))
        first += count
    if torch.equal(by_species, columns):
        return None, None, tuple(bounds)
    numbers = torch.arange(len(order), device=order.device)
    return order, torch.empty_like(order).scatter_(0, order, numbers), tuple(bounds)
