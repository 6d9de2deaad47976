"""The reduced symmetric basis of a symmetric contraction.

MACE's couplings U_nu[m, i1..inu, k] are contracted with the same features nu times, so only their
symmetric part counts: a coefficient for each monomial x_i1 .. x_inu. As polynomials most of MACE's
paths depend on each other: for 0e+1o+2e+3o and nu = 3, 23 paths span 8 for l=0 and 51 span 12 for
l=1. A subset of sparse, independent paths is kept, and the others are written in terms of it, which
turns any weights in MACE's basis into weights of the reduced one (`layout.reduce_weights`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from e3nn_accel.descriptor import Coupling

ROUNDINGS = 8
"""Roundings that the sums of products behind a coupling coefficient may have gathered."""
FLOOR = 2e-14
"""What e3nn's own 3j symbols are good to; below it, float64 paths would seem independent by noise alone."""

Monomial = tuple[int, ...]
"""Indices of the features in it, ascending."""


@dataclass(frozen=True)
class SymmetricBasis:
    """Independent polynomials of one degree.

    Attributes:
        monomials: The monomials that occur.
        coefficients: [reduced, 2l+1, monomials].
        projection: [paths, reduced]; original path = sum of projection * reduced path.
    """

    monomials: tuple[Monomial, ...]
    coefficients: NDArray[np.float64]
    projection: NDArray[np.float64]


@lru_cache(maxsize=256)
def symmetric_basis(coupling: Coupling, epsilon: float) -> SymmetricBasis:
    """Reduce one coupling tensor.

    Args:
        coupling: U of shape [2l+1] + [components] * nu + [paths].
        epsilon: Rounding unit of the arithmetic that will use the basis. What is dependent only up
            to the rounding of a float32 file is independent for float64 arithmetic: results then
            equal those of the stored constants, at the price of more paths.

    Returns:
        A basis that spans every path to within a few ``epsilon`` of the largest coefficient.
    """
    negligible = max(ROUNDINGS * epsilon, FLOOR)
    monomials, table = _polynomials(coupling, negligible)
    if not monomials:
        return SymmetricBasis(
            (), np.zeros((0, coupling.shape[0], 0)), np.zeros((coupling.shape[-1], 0))
        )
    paths = len(table)
    rows = table.reshape(paths, -1)
    tolerance = negligible * np.abs(rows).max()
    kept, directions = _independent_rows(rows, tolerance)
    coordinates = rows @ directions.T
    projection: NDArray[np.float64] = np.linalg.solve(coordinates[kept].T, coordinates.T).T.astype(
        np.float64
    )
    projection[kept] = np.eye(len(kept))
    return SymmetricBasis(monomials, table[kept], projection)


def _polynomials(
    coupling: Coupling, negligible: float
) -> tuple[tuple[Monomial, ...], NDArray[np.float64]]:
    """Coefficients [paths, 2l+1, monomials] of each path, summed over the orders of the same features."""
    sums: defaultdict[tuple[Monomial, int, int], float] = defaultdict(float)
    for index, value in zip(coupling.indices.tolist(), coupling.values.tolist(), strict=True):
        m, *features, path = index
        sums[tuple(sorted(features)), m, path] += value
    largest = max(map(abs, sums.values()), default=0.0)
    terms = {key: value for key, value in sums.items() if abs(value) > negligible * largest}
    monomials = tuple(sorted({monomial for monomial, _, _ in terms}))
    column = {monomial: n for n, monomial in enumerate(monomials)}
    table = np.zeros((coupling.shape[-1], coupling.shape[0], len(monomials)))
    for (monomial, m, path), value in terms.items():
        table[path, m, column[monomial]] = value
    return monomials, table


def _independent_rows(
    rows: NDArray[np.float64], tolerance: float
) -> tuple[list[int], NDArray[np.float64]]:
    """Rows that span all, sparse ones first, and orthonormal directions of what they span.

    What is left of the other rows outside that span is below the tolerance.
    """
    order = np.argsort((np.abs(rows) > tolerance).sum(1), kind="stable")
    kept: list[int] = []
    directions = np.zeros((0, rows.shape[1]))
    for n in order.tolist():
        rest = rows[n].copy()
        for _ in range(2):  # twice is enough for an orthogonal rest
            rest -= directions.T @ (directions @ rest)
        if np.abs(rest).max() > tolerance:
            kept.append(n)
            directions = np.vstack([directions, rest / np.linalg.norm(rest)])
    return sorted(kept), directions
