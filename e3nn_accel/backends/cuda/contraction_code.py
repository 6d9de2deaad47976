"""What plan.cuh holds for contraction.cu: polynomials as straight-line code, or as tables.

Straight-line code is the fast one: coefficients are immediates, features and sums stay in registers.
Its length grows with the terms, and so does the compiler's time; beyond `MOST_LINES` the kernel loops
over tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from e3nn_accel.backends.cuda.contraction_lines import gradient, polynomials
from e3nn_accel.backends.cuda.contraction_paths import Pass, Path, Paths
from e3nn_accel.backends.cuda.contraction_schedule import Layout, Schedule

MOST_LINES = 6000
"""Multiply-adds of the longest function, before derivatives multiply them: some seconds for the compiler."""
MOST_TERMS = 1 << 16
"""Terms of a table, which is text that the compiler reads."""


def lines_of(paths: Paths) -> int:
    """Multiply-adds of the gradient, the longest function."""
    return paths.term_count + 3 * (paths.products + paths.components)


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
    parts += _tables(paths) if tables else _functions(passes, paths.components, schedule.section)
    return "\n".join(parts) + "\n"


def _functions(passes: tuple[Pass, ...], components: int, section: int) -> Iterator[str]:
    for n, one in enumerate(passes):
        listed = ", ".join(_places_of(one.paths))
        rows = ", ".join(_rows_of(one.paths))
        yield f"""struct Pass{n} {{
    enum {{ PATHS = {len(one.paths)} }};
    static __device__ __forceinline__ constexpr Path path(int q) {{
        constexpr Path PATH[] = {{{listed}}};
        return PATH[q];
    }}
    static __device__ __forceinline__ constexpr Row row(int r) {{
        constexpr Row ROW[] = {{{rows}}};
        return ROW[r];
    }}
    template <class T, class Use>
    static __device__ __forceinline__ void polynomials(T (&x)[COMPONENTS], const Use& use) {{
{_body(polynomials(one, components, section))}
    }}
    template <class T, class Y>
    static __device__ __forceinline__ void gradient(T (&x)[COMPONENTS], const Y& y, T (&dx)[COMPONENTS]) {{
{_body(gradient(one, components, section))}
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
        yield from (f"{{{q}, {path.weight}, {path.out + m}}}" for m in range(path.width))


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
    listed = ", ".join(_places_of(paths.paths))
    yield f"#define DEGREE {degree}"
    yield "struct Term { real c; unsigned char of[DEGREE]; };"
    yield f"__device__ constexpr Term TERM[] = {{{', '.join(terms)}}};"
    yield f"__device__ constexpr int FIRST_TERM[] = {{{', '.join(map(str, first))}}};"
    yield f"__device__ constexpr Path PATH[] = {{{listed}}};"
    yield '#include "contraction_tables.cuh"'
