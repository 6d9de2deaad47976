"""From a contraction's descriptor to the paths of its reduced basis, and their distribution over passes.

Variables are the features of a channel, and after them the quadratic covariants of `contraction_factors`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from e3nn_accel.backends.cuda.contraction_factors import Factors, Polynomial
from e3nn_accel.descriptor import ContractionDescriptor
from e3nn_accel.symmetric_basis import Monomial, symmetric_basis

Terms = tuple[tuple[Monomial, float], ...]


@dataclass(frozen=True)
class Path:
    """One polynomial of the reduced basis with all its components: one weight of each channel.

    Attributes:
        weight: Its place among all reduced weights.
        out: The first component of its output among those of a channel.
        components: Of each component of the output, the monomials of variables and their coefficients.
    """

    weight: int
    out: int
    components: tuple[Terms, ...] = field(repr=False)

    @property
    def width(self) -> int:
        """Components of its output, 2l+1."""
        return len(self.components)

    @cached_property
    def variables(self) -> frozenset[int]:
        """Those that occur."""
        return frozenset(v for terms in self.components for m, _ in terms for v in m)


@dataclass(frozen=True)
class Pass:
    """Paths whose weights a thread has in registers at the same time, and the variables that they need.

    Attributes:
        paths: Some of them.
        features: Of each variable beside the features of the channel that occurs: its index, its terms.
    """

    paths: tuple[Path, ...]
    features: dict[int, Terms] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Polynomials, a component counted as one."""
        return sum(path.width for path in self.paths)


@dataclass(frozen=True)
class Paths:
    """A contraction in its reduced basis.

    Attributes:
        projections: One [original, reduced] for each weight of the descriptor, in order.
        widths: 2l+1 of each output.
        channels, components: As in the descriptor.
        features: Of each variable beside the features of a channel, what it is of them.
    """

    projections: tuple[NDArray[np.float64], ...]
    widths: tuple[int, ...]
    channels: int
    components: int
    paths: tuple[Path, ...]
    features: tuple[Terms, ...] = ()

    @classmethod
    def of(cls, d: ContractionDescriptor, epsilon: float) -> Paths:
        """With constants good to ``epsilon``."""
        factors = Factors(d.degrees)
        projections: list[NDArray[np.float64]] = []
        paths: list[Path] = []
        out = 0
        for output in d.outputs:
            for coupling in output.couplings:
                basis = symmetric_basis(coupling, epsilon)
                found = factors.refactored(basis, output.l, epsilon)
                if found is None:
                    covariants = [_components(c, basis.monomials) for c in basis.coefficients]
                    projection = basis.projection
                else:
                    covariants, projection = [_terms(c) for c in found[0]], found[1]
                projections.append(projection)
                first = len(paths)
                paths += [Path(first + n, out, c) for n, c in enumerate(covariants)]
            out += 2 * output.l + 1
        widths = tuple(2 * output.l + 1 for output in d.outputs)
        features = _terms(factors.features)
        return cls(tuple(projections), widths, d.channels, d.components, tuple(paths), features)

    @cached_property
    def outputs(self) -> int:
        """Components of a channel's result."""
        return sum(self.widths)

    @cached_property
    def weights(self) -> int:
        """Reduced weights of a channel."""
        return len(self.paths)

    @cached_property
    def degree(self) -> int:
        """The highest, in variables."""
        return max((len(m) for terms in self._all() for m, _ in terms), default=1)

    @cached_property
    def term_count(self) -> int:
        """Coefficients that aren't zero."""
        return sum(map(len, self._all()))

    @cached_property
    def products(self) -> int:
        """Multiplications of variables."""
        return len({m[:n] for terms in self._all() for m, _ in terms for n in range(2, len(m) + 1)})

    def expanded(self) -> Paths:
        """The same polynomials in the features of the channel alone."""
        paths = tuple(
            replace(path, components=tuple(map(self._expanded, path.components)))
            for path in self.paths
        )
        return replace(self, paths=paths, features=())

    def passes(self, room: int, each: int, of_variable: int) -> tuple[Pass, ...]:
        """As many paths to a pass as there is room for, at least one; those that need the same follow one another.

        Args:
            room: Words.
            each: That a path takes.
            of_variable: That a variable beside the features takes, however many paths need it.
        """
        found: list[tuple[list[Path], set[int]]] = []
        for path in sorted(self.paths, key=lambda path: max(path.variables)):
            needed = {v for v in path.variables if v >= self.components}
            if found:
                paths, variables = found[-1]
                words = (len(paths) + 1) * each + len(variables | needed) * of_variable
            if not found or words > room:
                found.append(([], set()))
            found[-1][0].append(path)
            found[-1][1].update(needed)
        return tuple(
            Pass(tuple(paths), {v: self.features[v - self.components] for v in sorted(variables)})
            for paths, variables in found
        )

    def _all(self) -> Iterator[Terms]:
        yield from self.features
        for path in self.paths:
            yield from path.components

    def _expanded(self, terms: Terms) -> Terms:
        found: defaultdict[Monomial, float] = defaultdict(float)
        for monomial, coefficient in terms:
            product: dict[Monomial, float] = {(): coefficient}
            for v in monomial:
                inner = v < self.components
                factor: Terms = (((v,), 1.0),) if inner else self.features[v - self.components]
                wider: defaultdict[Monomial, float] = defaultdict(float)
                for (m1, c1), (m2, c2) in itertools.product(product.items(), factor):
                    wider[tuple(sorted(m1 + m2))] += c1 * c2
                product = wider
            for m, c in product.items():
                found[m] += c
        return tuple(found.items())


def _components(
    coefficients: NDArray[np.float64], monomials: tuple[Monomial, ...]
) -> tuple[Terms, ...]:
    return tuple(
        tuple((m, float(c)) for m, c in zip(monomials, row, strict=True) if c != 0)
        for row in coefficients
    )


def _terms(polynomials: Iterable[Polynomial]) -> tuple[Terms, ...]:
    return tuple(tuple(p.items()) for p in polynomials)
