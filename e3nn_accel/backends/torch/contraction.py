"""Symmetric contraction: all monomials once, one matrix product for all outputs, weights last.

Features are laid out [component, node * channel], so that every monomial is a product of two rows:
degree 2 of two features, degree 3 of a degree-2 monomial and a feature, and so on. One matrix product
with the constant coefficients of the reduced basis (`symmetric_basis`) gives all polynomials
B[p, m, node * channel]; each node's weights, projected to that basis, then sum over p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from e3nn_accel.descriptor import ContractionDescriptor
from e3nn_accel.layout import reduce_weights
from e3nn_accel.plan import PlanContext
from e3nn_accel.species import species_of
from e3nn_accel.symmetric_basis import Monomial, SymmetricBasis, symmetric_basis

Run = Callable[..., torch.Tensor]

COLUMNS = {"cpu": 4096}
MOST_COLUMNS = 262144
"""Node-channels at a time. On a CPU the monomials of one chunk (a few hundred rows) stay in the cache;
elsewhere launches cost more than that, and a chunk only bounds memory (half a GB in float32)."""


@dataclass(frozen=True)
class _Table:
    """Which rows to multiply for the monomials of one degree."""

    lower: torch.Tensor
    feature: torch.Tensor


@dataclass(frozen=True)
class _Part:
    """One output and degree: its share of the polynomials, and how to reduce its weights."""

    output: int
    reduced: int
    rows: int
    projection: torch.Tensor


def plan(d: ContractionDescriptor, context: PlanContext) -> tuple[str, Run]:
    """A function (x, node_attrs, *weights) -> [nodes, sum of channels * (2l+1)]."""
    epsilon = float(torch.finfo(context.dtype).eps)
    bases = [
        (n, symmetric_basis(c, epsilon))
        for n, output in enumerate(d.outputs)
        for c in output.couplings
    ]
    monomials = _closed({m for _, basis in bases for m in basis.monomials})
    rows_by_degree = [
        sorted(m for m in monomials if len(m) == degree) for degree in range(1, _order(d) + 1)
    ]
    tables = [_table(lower, upper, context) for lower, upper in pairwise(rows_by_degree)]
    column = {m: n for n, m in enumerate(m for rows in rows_by_degree for m in rows)}
    parts = [_part(n, basis, context) for n, basis in bases]
    coefficients = _constant(np.concatenate([_rows(basis, column) for _, basis in bases]), context)

    def polynomials(x: torch.Tensor) -> torch.Tensor:
        """B [reduced * (2l+1) of all parts, columns] of features [components, columns]."""
        degrees = [x.index_select(0, first) if len(first) != len(x) else x]
        for table in tables:
            degrees.append(
                degrees[-1].index_select(0, table.lower) * x.index_select(0, table.feature)
            )
        return coefficients @ (torch.cat(degrees) if len(degrees) > 1 else degrees[0])

    first = torch.tensor(
        [m[0] for m in rows_by_degree[0]], dtype=torch.int64, device=context.device
    )

    columns = COLUMNS.get(context.device.type, MOST_COLUMNS)

    def run(x: torch.Tensor, node_attrs: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        nodes, channels = x.shape[0], d.channels
        node_weights = [
            _weights_of_nodes(node_attrs, w, part.projection)
            for w, part in zip(weights, parts, strict=True)
        ]
        step = max(columns // max(channels, 1), 1)
        chunks = [
            _contract(
                polynomials, x[a : a + step], [w[a : a + step] for w in node_weights], d, parts
            )
            for a in range(0, max(nodes, 1), step)
        ]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    paths = sum(part.reduced for part in parts)
    original = sum(shape[1] for shape in d.weight_shapes)
    return f"{original} paths reduced to {paths}, {len(column)} monomials", run


def _contract(
    polynomials: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    weights: list[torch.Tensor],
    d: ContractionDescriptor,
    parts: list[_Part],
) -> torch.Tensor:
    """Some nodes: x [nodes, channels, components], weights [nodes, reduced, channels] of each part."""
    nodes = x.shape[0]
    columns = nodes * d.channels
    b = polynomials(x.reshape(columns, d.components).T.contiguous())
    sums: list[torch.Tensor | None] = [None] * len(d.outputs)
    for part, w, share in zip(parts, weights, b.split([part.rows for part in parts]), strict=True):
        if part.reduced == 0:
            continue
        per_column = w.transpose(0, 1).reshape(part.reduced, 1, columns)
        out = (per_column * share.view(part.reduced, part.rows // part.reduced, columns)).sum(0)
        before = sums[part.output]
        sums[part.output] = out if before is None else before + out
    flat = []
    for output, out in zip(d.outputs, sums, strict=True):
        width = 2 * output.l + 1
        out = x.new_zeros((width, columns)) if out is None else out
        flat.append(out.T.reshape(nodes, d.channels * width))
    return torch.cat(flat, dim=-1)


def _weights_of_nodes(
    node_attrs: torch.Tensor, weight: torch.Tensor, projection: torch.Tensor
) -> torch.Tensor:
    """[nodes, reduced, channels]: each node's own weights in the reduced basis.

    Linear in node_attrs, as stock is: a row that isn't one-hot, or a wanted gradient, gets the sum.
    """
    one_hot = (
        None if node_attrs.requires_grad and torch.is_grad_enabled() else species_of(node_attrs)
    )
    if one_hot is None or one_hot.values is not None:
        reduced = reduce_weights(weight, projection)
        return (node_attrs @ reduced.flatten(1)).view(len(node_attrs), *reduced.shape[1:])
    if len(node_attrs) < len(weight):
        return reduce_weights(weight.index_select(0, one_hot.column), projection)
    return reduce_weights(weight, projection).index_select(0, one_hot.column)


def _order(d: ContractionDescriptor) -> int:
    return max((len(output.couplings) for output in d.outputs), default=1)


def _closed(monomials: set[Monomial]) -> set[Monomial]:
    """With every monomial the one that lacks its last feature, down to degree 1."""
    closed = set(monomials)
    for monomial in monomials:
        closed.update(monomial[:degree] for degree in range(1, len(monomial)))
    return closed


def _table(lower: list[Monomial], upper: list[Monomial], context: PlanContext) -> _Table:
    row = {m: n for n, m in enumerate(lower)}

    def index(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=context.device)

    return _Table(index([row[m[:-1]] for m in upper]), index([m[-1] for m in upper]))


def _part(output: int, basis: SymmetricBasis, context: PlanContext) -> _Part:
    reduced, width, _ = basis.coefficients.shape
    return _Part(output, reduced, reduced * width, _constant(basis.projection, context))


def _rows(basis: SymmetricBasis, column: dict[Monomial, int]) -> np.ndarray:
    reduced, width, _ = basis.coefficients.shape
    rows = np.zeros((reduced, width, len(column)))
    rows[:, :, [column[m] for m in basis.monomials]] = basis.coefficients
    return rows.reshape(reduced * width, len(column))


def _constant(values: np.ndarray, context: PlanContext) -> torch.Tensor:
    return torch.as_tensor(values, dtype=context.dtype, device=context.device)
