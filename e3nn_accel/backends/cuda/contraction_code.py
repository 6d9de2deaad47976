"""What plan.cuh holds for contraction.cu: polynomials as straight-line code, or as tables.

Straight-line code is the fast one: coefficients are immediates, features and sums stay in registers.
Its length grows with the terms, and so does the compiler's time; beyond `MOST_LINES` the kernel loops
over tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from e3nn_accel.backends.cuda.contraction_paths import Pass, Path, Paths
from e3nn_accel.backends.cuda.contraction_schedule import Layout, Schedule
from e3nn_accel.symmetric_basis import Monomial

MOST_LINES = 6000
"""Multiply-adds of the longest function, before derivatives multiply them: some seconds for the compiler."""
MOST_TERMS = 1 << 16
"""Terms of a table, which is text that the compiler reads."""

Children = dict[Monomial, list[Monomial]]


def lines_of(paths: Paths) -> int:
    """Multiply-adds of the gradient, the longest function."""
    monomials = {m[:n] for b in paths.bases for m in b.monomials for n in range(1, len(m) + 1)}
    return paths.term_count + 3 * len(monomials)


def header(
    paths: Paths,
    passes: tuple[Pass, ...],
    schedule: Schedule,
    layout: Layout,
    real: str,
    tables: bool,
) -> str:
    """All that contraction.cu needs to know about a plan."""
    ends = [sum(paths.widths[: n + 1]) for n in range(len(paths.widths))]
    places = [
        f"{{{paths.channels * (end - width)}, {width}, {m}}}"
        for end, width in zip(ends, paths.widths, strict=True)
        for m in range(width)
    ]
    constants = {
        "THREADS": layout.threads,
        "TEAM": layout.team,
        "GROUP": layout.group,
        "CHUNKS": layout.chunks,
        "BLOCKS": schedule.blocks,
        "TOGETHER": int(schedule.together),
        "CHANNELS": paths.channels,
        "COMPONENTS": paths.components,
        "OUTPUTS": paths.outputs,
        "PATHS_OF_ALL": paths.weights,
        "TABLES": int(tables),
    }
    parts = [f"#define REAL {real}"]
    parts += [f"#define {name} {value}" for name, value in constants.items()]
    parts += ['#include "real.cuh"', '#include "contraction.cuh"']
    parts.append(f"__device__ constexpr Place PLACE[] = {{{', '.join(places)}}};")
    parts += _tables(paths) if tables else _functions(passes, schedule.section)
    return "\n".join(parts) + "\n"


def _functions(passes: tuple[Pass, ...], section: int) -> Iterator[str]:
    for n, one in enumerate(passes):
        listed = ", ".join(_places_of(one.paths))
        rows = ", ".join(_rows_of(one.paths))
        yield f"""struct Pass{n} {{
    enum {{ ROWS = {one.rows}, PATHS = {len(one.paths)} }};
    static __device__ __forceinline__ constexpr Path path(int q) {{
        constexpr Path PATH[] = {{{listed}}};
        return PATH[q];
    }}
    static __device__ __forceinline__ constexpr int rows() {{ return ROWS; }}
    static __device__ __forceinline__ constexpr Row row(int r) {{
        constexpr Row ROW[] = {{{rows}}};
        return ROW[r];
    }}
    template <class T>
    static __device__ __forceinline__ void polynomials(T (&x)[COMPONENTS], T (&b)[ROWS]) {{
{_body(_polynomials(one, section))}
    }}
    template <class T>
    static __device__ __forceinline__ void gradient(T (&x)[COMPONENTS], T (&y)[ROWS], T (&dx)[COMPONENTS]) {{
{_body(_gradient(one, section))}
    }}
}};"""
    calls = " ".join(f"f(Pass{n}{{}});" for n in range(len(passes)))
    choices = " ".join(f"if (n == {n}) f(Pass{n}{{}});" for n in range(len(passes)))
    function = "template <class F> __device__ __forceinline__ void"
    yield f"{function} each_pass(const F& f) {{ {calls} }}"
    yield f"{function} only_pass(int n, const F& f) {{ {choices} }}"


def _body(lines: Iterable[str]) -> str:
    return "\n".join(f"        {line}" for line in lines)


def _places_of(paths: Iterable[Path]) -> Iterator[str]:
    row = 0
    for path in paths:
        yield f"{{{path.weight}, {path.width}, {path.out}, {row}}}"
        row += path.width


def _rows_of(paths: Iterable[Path]) -> Iterator[str]:
    for q, path in enumerate(paths):
        yield from (f"{{{q}, {path.out + m}}}" for m in range(path.width))


def _polynomials(one: Pass, section: int) -> Iterator[str]:
    """Lines for b = B(x): each monomial is made once, of the one that lacks its last feature."""
    terms = one.terms()
    begun: set[int] = set()

    def visit(monomial: Monomial) -> Iterator[str]:
        if len(monomial) > 1:
            last = f"x[{monomial[-1]}]"
            yield f"const T {_name(monomial)} = multiply({_name(monomial[:-1])}, {last});"
        for row, c in terms.get(monomial, ()):
            if row in begun:
                yield f"b[{row}] = multiply_add((real){c!r}, {_name(monomial)}, b[{row}]);"
            else:
                begun.add(row)
                yield f"b[{row}] = multiply((real){c!r}, {_name(monomial)});"
        for child in children.get(monomial, ()):
            yield from visit(child)

    children = _children(terms)
    blocks = [list(visit(root)) for root in children.get((), ())]
    yield from (f"b[{row}] = T{{}};" for row in range(one.rows) if row not in begun)
    yield from _in_sections(blocks, section, "forget_all(x);")


def _gradient(one: Pass, section: int) -> Iterator[str]:
    """Lines for dx += the gradient of sum_r y[r] B_r(x), by the product rule from the leaves of the tree of monomials.

    t of a monomial is the derivative by it; with its factors v * x[k], dx[k] gets v t and t x[k] goes to v.
    """
    terms = one.terms()

    def visit(monomial: Monomial) -> Iterator[str]:
        name, of = _name(monomial), children.get(monomial, ())
        if len(monomial) > 1 and of:
            yield f"const T {name} = multiply({_name(monomial[:-1])}, x[{monomial[-1]}]);"
        t, begun = f"t{_suffix(monomial)}", False
        yield f"T {t};"
        for row, c in terms.get(monomial, ()):
            add = f"multiply_add((real){c!r}, y[{row}], {t})" if begun else None
            yield f"{t} = {add or f'multiply((real){c!r}, y[{row}])'};"
            begun = True
        for child in of:
            yield from visit(child)
            below, k = f"t{_suffix(child)}", child[-1]
            add = f"multiply_add(x[{k}], {below}, {t})" if begun else f"multiply(x[{k}], {below})"
            yield f"{t} = {add}; dx[{k}] = multiply_add({name}, {below}, dx[{k}]);"
            begun = True

    children = _children(terms)
    yield from _in_sections(
        [
            [*visit(root), f"dx[{root[0]}] = add(dx[{root[0]}], t{_suffix(root)});"]
            for root in children.get((), ())
        ],
        section,
        "forget_all(x); forget_all(y);",
    )


def _in_sections(blocks: Iterable[list[str]], most: int, begin: str) -> Iterator[str]:
    """Blocks of lines one after the other, cut by branches that are always taken.

    LLVM's time for a straight line grows with its square: eight seconds for the gradient of MACE's, a
    sixth of that in sections of 300 lines. ``begin`` makes operands new in each, or else all products of them would be
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


def _children(terms: Iterable[Monomial]) -> Children:
    """The tree in which a monomial hangs on the one that lacks its last feature."""
    nodes = {m[:n] for m in terms for n in range(1, len(m) + 1)}
    found: Children = {}
    for node in sorted(nodes):
        found.setdefault(node[:-1], []).append(node)
    return found


def _suffix(monomial: Monomial) -> str:
    return "_".join(map(str, monomial))


def _name(monomial: Monomial) -> str:
    return f"x[{monomial[0]}]" if len(monomial) == 1 else f"v{_suffix(monomial)}"


def _tables(paths: Paths) -> Iterator[str]:
    """Terms by row; a monomial of a lower degree is filled up with COMPONENTS, where a one stands."""
    degree = paths.degree
    terms, first = [], [0]
    for path in paths.paths:
        for component in path.components:
            for monomial, c in component:
                padded = (*monomial, *[paths.components] * (degree - len(monomial)))
                terms.append(f"{{(real){c!r}, {{{', '.join(map(str, padded))}}}}}")
            first.append(len(terms))
    widest = max((path.width for path in paths.paths), default=1)
    listed = ", ".join(_places_of(paths.paths))
    yield f"#define DEGREE {degree}\n#define WIDEST {widest}"
    yield "struct Term { real c; unsigned char of[DEGREE]; };"
    yield f"__device__ constexpr Term TERM[] = {{{', '.join(terms)}}};"
    yield f"__device__ constexpr int FIRST_TERM[] = {{{', '.join(map(str, first))}}};"
    yield f"__device__ constexpr Path PATH[] = {{{listed}}};"
    yield '#include "contraction_tables.cuh"'
