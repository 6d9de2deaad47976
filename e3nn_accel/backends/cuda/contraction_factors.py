"""The reduced basis of a contraction by products of products: the same polynomials in half the multiply-adds.

Any basis of the span will do, since the weights are mapped to it. Written in monomials, as MACE's couplings
are, vectors of degree three have hundreds of terms. But all of them are couplings (P x)_L of
a quadratic covariant P = (x x)_l with the features again, by the same 3j symbols that MACE's are made of: with
the components of a few P as further variables, a coupling has one term for each non-zero of a small tensor, and
many are plain products, as of a scalar P. So those that cost least are taken, as long as they are in the span
and independent. Where they don't span all of it, since degrees aren't known, or constants were
rounded more coarsely than the arithmetic, or the degree is above three, MACE's own polynomials stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from e3nn_accel.compat import wigner_3j
from e3nn_accel.symmetric_basis import FLOOR, ROUNDINGS, Monomial, SymmetricBasis

Polynomial = dict[Monomial, float]
Covariant = tuple[Polynomial, ...]
"""A polynomial for each of its 2l+1 components."""
NEGLIGIBLE = 1e-9
"""Of e3nn's 3j symbols, what is zero."""
APART = 0.05
"""Of a candidate's norm, what must lie outside the span of those that were taken: weights are mapped to a basis
that is nearly dependent with a loss of digits."""


@dataclass(frozen=True)
class Family:
    """A quadratic covariant: (features of irrep a, features of irrep b), coupled to l."""

    a: int
    b: int
    l: int  # noqa: E741


class Factors:
    """Which quadratic covariants are computed, as variables beside the features.

    Args:
        degrees: l of each irrep among the features of a channel, in order.
    """

    def __init__(self, degrees: Sequence[int]) -> None:
        self.degrees = tuple(degrees)
        ends = np.cumsum([0, *(2 * l + 1 for l in self.degrees)]).tolist()  # noqa: E741
        self.components = ends[-1]
        self._irreps = [
            (l, _variables(first, l))
            for l, first in zip(self.degrees, ends, strict=False)  # noqa: E741
        ]
        self._families: dict[Family, Covariant] = {}
        self._first: dict[Family, int] = {}
        self.features: list[Polynomial] = []
        """Of each further variable, what it is of the features."""

    def refactored(
        self,
        basis: SymmetricBasis,
        l: int,  # noqa: E741
        epsilon: float,
    ) -> tuple[list[Covariant], NDArray[np.float64]] | None:
        """Polynomials in features and further variables, and the projection to them; None where there are none."""
        order = max((len(m) for m in basis.monomials), default=0)
        if order not in (2, 3) or any(len(m) != order for m in basis.monomials):
            return None
        span = _Span(basis, max(ROUNDINGS * epsilon, FLOOR))
        taken: list[Covariant] = []
        candidates = list(self._quadratic(l) if order == 2 else self._cubic(l))
        while len(taken) < len(basis.coefficients):
            for candidate in sorted(candidates, key=self._cost):
                candidates.remove(candidate)
                if span.take(candidate.expanded):
                    taken.append(self._use(candidate))
                    break
            else:
                return None
        return taken, basis.projection @ span.of_basis()

    def _covariant(self, family: Family) -> Covariant:
        if family not in self._families:
            (l1, a), (l2, b) = self._irreps[family.a], self._irreps[family.b]
            self._families[family] = _coupled(a, l1, b, l2, family.l)
        return self._families[family]

    def _every_family(self, most: int) -> Iterator[Family]:
        for a, b in combinations_with_replacement(range(len(self.degrees)), 2):
            l1, l2 = self.degrees[a], self.degrees[b]
            for l in range(abs(l1 - l2), min(l1 + l2, most) + 1):  # noqa: E741
                if any(self._covariant(Family(a, b, l))):
                    yield Family(a, b, l)

    def _quadratic(self, l: int) -> Iterator[_Candidate]:  # noqa: E741
        for family in self._every_family(l):
            if family.l == l:
                yield _Candidate(family, None, self._covariant(family), 2 * l + 1)

    def _cubic(self, l: int) -> Iterator[_Candidate]:  # noqa: E741
        for family in self._every_family(l + max(self.degrees, default=0)):
            for c, (of, features) in enumerate(self._irreps):
                if abs(family.l - of) <= l <= family.l + of:
                    placeholders = _variables(self.components, family.l)
                    coupling = _coupled(placeholders, family.l, features, of, l)
                    cost = sum(1 if abs(x) == 1 else 2 for p in coupling for x in p.values())
                    expanded = tuple(self._expanded(p, self._covariant(family)) for p in coupling)
                    yield _Candidate(family, c, expanded, cost)

    def _expanded(self, polynomial: Polynomial, covariant: Covariant) -> Polynomial:
        """In features alone: terms are products of a feature and a component of ``covariant``."""
        sums: defaultdict[Monomial, float] = defaultdict(float)
        for (feature, variable), c in polynomial.items():
            for monomial, inner in covariant[variable - self.components].items():
                sums[tuple(sorted((feature, *monomial)))] += c * inner
        return {m: c for m, c in sums.items() if abs(c) > NEGLIGIBLE}

    def _cost(self, candidate: _Candidate) -> int:
        """Multiply-adds, about: forward, with those of the family where nothing else has it."""
        if candidate.family in self._first:
            return candidate.cost
        return candidate.cost + sum(len(p) + 1 for p in self._covariant(candidate.family))

    def _use(self, candidate: _Candidate) -> Covariant:
        """In terms of the family's variables."""
        family = candidate.family
        if family not in self._first:
            self._first[family] = self.components + len(self.features)
            self.features += self._covariant(family)
        variables = _variables(self._first[family], family.l)
        if candidate.irrep is None:
            return variables
        of, features = self._irreps[candidate.irrep]
        return _coupled(variables, family.l, features, of, (len(candidate.expanded) - 1) // 2)


@dataclass(frozen=True)
class _Candidate:
    """A covariant: a family's own, or that times the features of an irrep.

    Attributes:
        expanded: As polynomials of the features.
        cost: Multiply-adds of the coupling.
    """

    family: Family
    irrep: int | None
    expanded: Covariant
    cost: int


class _Span:
    """What a basis spans, and how much of it by those that were taken."""

    def __init__(self, basis: SymmetricBasis, tolerance: float) -> None:
        self._column = {m: n for n, m in enumerate(basis.monomials)}
        self._shape = basis.coefficients.shape[1:]
        rows = basis.coefficients.reshape(len(basis.coefficients), -1)
        self._rows, self._tolerance = rows, tolerance
        self._orthonormal = np.linalg.qr(rows.T)[0]
        self._taken: list[NDArray[np.float64]] = []
        self._directions = np.zeros((0, rows.shape[1]))

    def take(self, covariant: Covariant) -> bool:
        """Unless it is outside of the span, or dependent on others."""
        found = np.zeros(self._shape)
        if len(covariant) != len(found) or not any(covariant):
            return False
        largest = max(abs(c) for p in covariant for c in p.values())
        for m, polynomial in enumerate(covariant):
            for monomial, c in polynomial.items():
                if monomial in self._column:
                    found[m, self._column[monomial]] = c
                elif abs(c) > self._tolerance * largest:
                    return False
        row = found.ravel()
        norm = np.linalg.norm(row)
        outside = row - self._orthonormal @ (self._orthonormal.T @ row)
        if np.abs(outside).max() > self._tolerance * np.abs(row).max():
            return False
        rest = row - self._directions.T @ (self._directions @ row)
        if np.linalg.norm(rest) < APART * norm:
            return False
        rest -= self._directions.T @ (self._directions @ rest)  # what rounding left
        self._taken.append(row)
        self._directions = np.vstack([self._directions, rest / np.linalg.norm(rest)])
        return True

    def of_basis(self) -> NDArray[np.float64]:
        """The basis in terms of those that were taken: basis = matrix @ taken."""
        taken = np.array(self._taken)
        return np.linalg.lstsq(taken.T, self._rows.T, rcond=None)[0].T.astype(np.float64)


def _variables(first: int, l: int) -> Covariant:  # noqa: E741
    return tuple({(first + i,): 1.0} for i in range(2 * l + 1))


@cache
def _symbols(l1: int, l2: int, l: int) -> list[tuple[int, int, int, float]]:  # noqa: E741
    symbols = wigner_3j(l1, l2, l).numpy()
    places = np.argwhere(np.abs(symbols) > NEGLIGIBLE).tolist()
    return [(i, j, k, float(symbols[i, j, k])) for i, j, k in places]


def _coupled(a: Covariant, l1: int, b: Covariant, l2: int, l: int) -> Covariant:  # noqa: E741
    """(a b)_l, scaled so that as many coefficients as possible are 1."""
    sums: list[defaultdict[Monomial, float]] = [defaultdict(float) for _ in range(2 * l + 1)]
    for i, j, k, symbol in _symbols(l1, l2, l):
        for m1, c1 in a[i].items():
            for m2, c2 in b[j].items():
                sums[k][tuple(sorted(m1 + m2))] += symbol * c1 * c2
    kept = [{m: c for m, c in p.items() if abs(c) > NEGLIGIBLE} for p in sums]
    sizes: defaultdict[float, int] = defaultdict(int)
    for p in kept:
        for c in p.values():
            sizes[round(abs(c), 9)] += 1
    if not sizes:
        return tuple({} for _ in kept)
    unit = max(sizes, key=lambda size: sizes[size])
    exact = next(abs(c) for p in kept for c in p.values() if round(abs(c), 9) == unit)
    return tuple({m: _near_one(c / exact) for m, c in p.items()} for p in kept)


def _near_one(c: float) -> float:
    return round(c) if abs(abs(c) - 1) < NEGLIGIBLE else c
