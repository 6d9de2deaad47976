"""From a contraction's descriptor to the paths of its reduced basis, and their distribution over passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from e3nn_accel.descriptor import ContractionDescriptor
from e3nn_accel.symmetric_basis import Monomial, SymmetricBasis, symmetric_basis

Terms = tuple[tuple[Monomial, float], ...]


@dataclass(frozen=True)
class Path:
    """One polynomial of the reduced basis with all its components: one weight of each channel.

    Attributes:
        weight: Its place among all reduced weights.
        out: The first component of its output among those of a channel.
        components: Of each component of the output, the monomials and their coefficients.
    """

    weight: int
    out: int
    components: tuple[Terms, ...] = field(repr=False)

    @property
    def width(self) -> int:
        """Components of its output, 2l+1."""
        return len(self.components)


@dataclass(frozen=True)
class Pass:
    """Paths whose polynomials a thread has in registers at the same time."""

    paths: tuple[Path, ...]

    @property
    def rows(self) -> int:
        """Polynomials, a component counted as one."""
        return sum(path.width for path in self.paths)

    def terms(self) -> dict[Monomial, list[tuple[int, float]]]:
        """Of each monomial, the rows that it is a term of, and its coefficients."""
        found: dict[Monomial, list[tuple[int, float]]] = {}
        row = 0
        for path in self.paths:
            for component in path.components:
                for monomial, coefficient in component:
                    found.setdefault(monomial, []).append((row, coefficient))
                row += 1
        return found


@dataclass(frozen=True)
class Paths:
    """A contraction in its reduced basis.

    Attributes:
        bases: One for each weight of the descriptor, in order.
        widths: 2l+1 of each output.
        channels, components: As in the descriptor.
    """

    bases: tuple[SymmetricBasis, ...]
    widths: tuple[int, ...]
    channels: int
    components: int
    paths: tuple[Path, ...]

    @classmethod
    def of(cls, d: ContractionDescriptor, epsilon: float) -> Paths:
        """With constants good to ``epsilon``."""
        bases: list[SymmetricBasis] = []
        paths: list[Path] = []
        out = 0
        for output in d.outputs:
            for coupling in output.couplings:
                basis = symmetric_basis(coupling, epsilon)
                bases.append(basis)
                paths += _paths(basis, len(paths), out)
            out += 2 * output.l + 1
        widths = tuple(2 * output.l + 1 for output in d.outputs)
        return cls(tuple(bases), widths, d.channels, d.components, tuple(paths))

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
        """The highest."""
        return max((len(m) for basis in self.bases for m in basis.monomials), default=1)

    @cached_property
    def term_count(self) -> int:
        """Coefficients that aren't zero."""
        return sum(len(component) for path in self.paths for component in path.components)

    def passes(self, rows: int, extra: int = 0) -> tuple[Pass, ...]:
        """Paths in order, as many to a pass as have ``rows`` rows, each counted with ``extra`` more; at least one."""
        found: list[list[Path]] = []
        room = 0
        for path in self.paths:
            needed = path.width + extra
            if not found or needed > room:
                found.append([])
                room = rows
            found[-1].append(path)
            room -= needed
        return tuple(Pass(tuple(paths)) for paths in found)


def _paths(basis: SymmetricBasis, weight: int, out: int) -> Iterator[Path]:
    for n, coefficients in enumerate(basis.coefficients):
        components = tuple(
            tuple((m, float(c)) for m, c in zip(basis.monomials, row, strict=True) if c != 0)
            for row in coefficients
        )
        yield Path(weight + n, out, components)
