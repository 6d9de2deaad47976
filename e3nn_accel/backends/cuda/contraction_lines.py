"""Polynomials and their gradient as straight-line code.

Monomials hang in a tree, each on the one that lacks its last variable. A variable is a feature x[i], or a
polynomial z[k] of features that the same code computes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from e3nn_accel.backends.cuda.contraction_paths import Pass, Path, Terms
from e3nn_accel.symmetric_basis import Monomial

Children = dict[Monomial, list[Monomial]]
Rows = dict[Monomial, list[tuple[str, float]]]
"""Of each monomial, the sums that it is a term of, and its coefficients."""


def polynomials(one: Pass, components: int, section: int) -> Iterator[str]:
    """Lines that call ``use(row, B_row(x))`` for each polynomial of a pass."""
    names = _Names(one, components)
    blocks: list[list[str]] = []
    row = 0
    for path in one.paths:
        blocks += names.values_for(path)
        rows = range(row, row + path.width)
        sums = [f"b{n}" for n in rows]
        lines = [line for block in _sums(sums, path.components, names) for line in block]
        uses = [f"use({n}, b{n});" for n in rows]
        blocks.append(["{", f"T {', '.join(sums)};", *lines, *uses, "}"])
        row += path.width
    yield from names.declared()
    yield from _in_sections(blocks, section, names.forgotten)


def gradient(one: Pass, components: int, section: int) -> Iterator[str]:
    """Lines for dx += the gradient of sum_r y(r) B_r(x), by the product rule from the leaves of the trees.

    A variable that is a polynomial of features passes its derivative on after the last path that has it, so that
    few of them are in registers at the same time.
    """
    names = _Names(one, components)
    blocks: list[list[str]] = []
    row = 0
    for path in one.paths:
        blocks += names.values_for(path)
        factors = [f"y{n}" for n in range(row, row + path.width)]
        given = [f"const T {y} = y({y[1:]});" for y in factors]
        lines = _products(factors, path.components, names)
        blocks.append(["{", *given, *(line for block in lines for line in block), "}"])
        blocks += names.derivatives_after(path)
        row += path.width
    yield from names.declared()
    if one.features:
        yield f"T dz[{len(one.features)}] = {{}};"
    yield from _in_sections(blocks, section, names.forgotten)


class _Names:
    """What variables and monomials are called in the code of a pass."""

    def __init__(self, one: Pass, components: int) -> None:
        self._features, self._components = one.features, components
        self._place = {v: n for n, v in enumerate(one.features)}
        self._known: set[int] = set()
        self._last = {v: path for path in one.paths for v in path.variables}
        self.forgotten = "forget_all(x);" + (" forget_all(z);" if one.features else "")

    def declared(self) -> Iterator[str]:
        if self._features:
            yield f"T z[{len(self._features)}] = {{}};"

    def values_for(self, path: Path) -> Iterator[list[str]]:
        """Blocks of lines that compute the variables of a path that weren't computed yet."""
        new = [v for v in self._features if v in path.variables and v not in self._known]
        self._known.update(new)
        sums = [self.variable(v) for v in new]
        for block in _sums(sums, [self._features[v] for v in new], self):
            yield ["{", *block, "}"]

    def derivatives_after(self, path: Path) -> Iterator[list[str]]:
        """Blocks of lines that pass on the derivatives by variables that no other path has."""
        last = [v for v in self._features if self._last[v] is path]
        names = [self.derivative(v) for v in last]
        for block in _products(names, [self._features[v] for v in last], self):
            yield ["{", *block, "}"]

    def variable(self, v: int) -> str:
        return f"x[{v}]" if v < self._components else f"z[{self._place[v]}]"

    def derivative(self, v: int) -> str:
        return f"d{self.variable(v)}"

    def __call__(self, monomial: Monomial) -> str:
        return self.variable(monomial[0]) if len(monomial) == 1 else f"v{_suffix(monomial)}"


def _sums(names: list[str], sums: Iterable[Terms], variables: _Names) -> Iterator[list[str]]:
    """Blocks of lines, one for each first variable, that add up each of ``names``."""
    terms = _rows_of(names, sums)
    begun: set[str] = set()

    def add(name: str, a: str, b: str) -> str:
        if name in begun:
            return f"{name} = multiply_add({a}, {b}, {name});"
        begun.add(name)
        return f"{name} = multiply({a}, {b});"

    def visit(monomial: Monomial) -> Iterator[str]:
        of, below = terms.get(monomial, ()), children.get(monomial, ())
        if len(monomial) > 1:
            shorter, last = variables(monomial[:-1]), variables((monomial[-1],))
            if not below and all(abs(c) == 1 for _, c in of):  # the product is a term as it is
                for name, c in of:
                    yield add(name, shorter if c > 0 else f"multiply((real)-1, {shorter})", last)
                return
            yield f"const T {variables(monomial)} = multiply({shorter}, {last});"
        for name, c in of:
            yield add(name, f"(real){c!r}", variables(monomial))
        for child in below:
            yield from visit(child)

    children = _children(terms)
    blocks = [list(visit(root)) for root in children.get((), ())]
    absent = [f"{name} = T{{}};" for name in names if name not in begun]
    yield from ([absent, *blocks] if absent else blocks)


def _products(names: list[str], sums: Iterable[Terms], variables: _Names) -> Iterator[list[str]]:
    """Blocks of lines that add the derivatives of sum_n name * sum to those of the variables.

    t of a monomial is the derivative by it; with its factors v * u, the derivative by u gets v t and that by v
    gets t u.
    """
    terms = _rows_of(names, sums)

    def t_of(monomial: Monomial) -> str:
        return f"t{_suffix(monomial)}" if monomial[1:] else variables.derivative(monomial[0])

    def visit(monomial: Monomial) -> Iterator[str]:
        name, of = variables(monomial), children.get(monomial, ())
        if len(monomial) > 1 and of:
            last = variables((monomial[-1],))
            yield f"const T {name} = multiply({variables(monomial[:-1])}, {last});"
        t = t_of(monomial)
        begun = len(monomial) == 1  # the derivative by a variable, to which all add
        if not begun:
            yield f"T {t};"
        for y, c in terms.get(monomial, ()):
            yield (
                f"{t} = multiply_add((real){c!r}, {y}, {t});"
                if begun
                else f"{t} = multiply((real){c!r}, {y});"
            )
            begun = True
        for child in of:
            yield from visit(child)
            below, last = t_of(child), variables((child[-1],))
            by = variables.derivative(child[-1])
            add = f"multiply_add({last}, {below}, {t})" if begun else f"multiply({last}, {below})"
            yield f"{t} = {add}; {by} = multiply_add({name}, {below}, {by});"
            begun = True

    children = _children(terms)
    for root in children.get((), ()):
        yield list(visit(root))


def _in_sections(blocks: Iterable[list[str]], most: int, begin: str) -> Iterator[str]:
    """Blocks of lines one after the other, cut by branches that are always taken.

    LLVM's time for a straight line grows with its square: eight seconds for 1500 lines, a sixth of that
    in sections of 300. ``begin`` makes operands new in each, or else all products of them would be
    taken out of the loop.
    """
    sections: list[list[str]] = []
    for block in blocks:
        if not sections or len(sections[-1]) + len(block) > most:
            sections.append([])
        sections[-1] += block
    if len(sections) == 1:
        yield from sections[0]
        return
    loop = f"for (int section = 0; section < {len(sections)}; section++)"
    yield f'_Pragma("unroll 1") {loop} switch (section) {{'
    for n, lines in enumerate(sections):
        yield f"case {n}: {{"
        yield f"stay_together(); {begin}"
        yield from lines
        yield "} break;"
    yield "}"


def _rows_of(names: list[str], sums: Iterable[Terms]) -> Rows:
    found: Rows = {}
    for name, terms in zip(names, sums, strict=True):
        for monomial, coefficient in terms:
            found.setdefault(monomial, []).append((name, coefficient))
    return found


def _children(terms: Iterable[Monomial]) -> Children:
    """The tree in which a monomial hangs on the one that lacks its last variable."""
    nodes = {m[:n] for m in terms for n in range(1, len(m) + 1)}
    found: Children = {}
    for node in sorted(nodes):
        found.setdefault(node[:-1], []).append(node)
    return found


def _suffix(monomial: Monomial) -> str:
    return "_".join(map(str, monomial))
