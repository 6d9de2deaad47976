"""Pairs of channels and their constants as the tables that kernels are compiled with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from e3nn_accel.backends.cuda.tensor_product_plan import Numbered, array, offset_of, pairs_of
from e3nn_accel.descriptor import ProductPath, TensorProductDescriptor


class Placed(NamedTuple):
    """A pair: where its channels start in rows of x and y, its weights, and where it goes.

    Attributes:
        out: Its first component in the result; `MixPart`: number of the output block.
        stride: From one of its components there to the next.
        segment: The matrix of the result that it is in.
    """

    x: int
    y: int
    out: int
    weight: int
    path: int
    stride: int
    segment: int


class Item(NamedTuple):
    """A component of a row and the pairs that meet there, first to end in the list of its kind."""

    at: int
    first: int
    end: int
    component: int
    segment: int


@dataclass
class PairTables:
    """Pairs and the constants of their paths, indexed by every component that they touch."""

    pairs: list[Placed] = field(default_factory=list)
    paths: list[ProductPath] = field(default_factory=list)

    def add(
        self, d: TensorProductDescriptor, n: Numbered, where: Iterable[tuple[int, int, int]]
    ) -> None:
        """Append the pairs of a path; ``where`` gives (out, stride, segment) of each."""
        p = n.path
        a, b = d.irreps_in1[p.i_in1], d.irreps_in2[p.i_in2]
        x0, y0 = offset_of(d.irreps_in1, p.i_in1), offset_of(d.irreps_in2, p.i_in2)
        step = p.path_shape[-1] if n.mixes else 1
        channels = pairs_of(p.mode, a.mul, b.mul)
        for q, ((u, v), place) in enumerate(zip(channels, where, strict=True)):
            weight = n.weight + q * step if n.weight >= 0 else -1
            self.pairs.append(
                Placed(
                    x0 + u * a.ir_dim,
                    y0 + v * b.ir_dim,
                    place[0],
                    weight,
                    len(self.paths),
                    *place[1:],
                )
            )
        self.paths.append(p)

    def extend(self, other: PairTables) -> None:
        """Append all pairs of another."""
        first = len(self.paths)
        self.pairs += [pair._replace(path=pair.path + first) for pair in other.pairs]
        self.paths += other.paths

    def extent(self, pair: Placed, axis: int) -> int:
        """Components of one of the pair's channels."""
        return self.paths[pair.path].coupling.shape[axis]

    def outputs(self) -> list[Item]:
        """In the order of memory; sorts the pairs by where they go."""
        self.pairs.sort(key=lambda p: (p.segment, p.out))
        items = []
        first = 0
        for n, pair in enumerate(self.pairs):
            here = (pair.segment, pair.out)
            if n + 1 == len(self.pairs) or here != (
                self.pairs[n + 1].segment,
                self.pairs[n + 1].out,
            ):
                for k in range(self.extent(pair, 2)):
                    items.append(Item(pair.out + k * pair.stride, first, n + 1, k, pair.segment))
                first = n + 1
        return sorted(items, key=lambda item: (item.segment, item.at))

    def inputs(self, axis: int) -> tuple[list[Item], list[int]]:
        """Components of the first (0) or second (1) input, and the pairs of each channel."""
        channels: dict[int, list[int]] = {}
        for n, pair in enumerate(self.pairs):
            channels.setdefault(pair[axis], []).append(n)
        items: list[Item] = []
        members: list[int] = []
        for at, pairs in sorted(channels.items()):
            first = len(members)
            members += pairs
            extent = self.extent(self.pairs[pairs[0]], axis)
            items += [Item(at + i, first, len(members), i, 0) for i in range(extent)]
        return items, members

    def entries(self, axis: int) -> tuple[list[tuple[int, int, str]], list[int], list[int]]:
        """Constants by their index ``axis``: entries, where each value's start, each path's first of those."""
        found: list[tuple[int, int, str]] = []
        first: list[int] = []
        starts: list[int] = []
        for path in self.paths:
            c = path.coupling
            starts.append(len(first))
            others = [n for n in range(3) if n != axis]
            rows = (
                list(zip(c.indices.tolist(), c.values.tolist(), strict=True))
                if path.path_weight
                else []
            )
            for index in range(c.shape[axis]):
                first.append(len(found))
                found += [
                    (at[others[0]], at[others[1]], repr(value * path.path_weight))
                    for at, value in rows
                    if at[axis] == index
                ]
            first.append(len(found))
        return found, first, starts

    def header(self, real: str) -> list[str]:
        """Tables to look constants up by path."""
        x_items, of_x = self.inputs(0)
        y_items, of_y = self.inputs(1)
        lines = [
            f"#define REAL {real}",
            f"#define PAIRS {len(self.pairs)}",
            f"#define X_ITEMS {len(x_items)}",
            f"#define Y_ITEMS {len(y_items)}",
            f"struct Entry {{ int a, b; {real} c; }};",
            "struct Pair { int x, y, out, weight, path; };",
            "struct Path { int k, i, j, d3, stride, segment; };",
            "struct Item { int at, first, end, component, segment; };",
        ]
        starts = []
        for axis, name in ((2, "OUT"), (0, "X"), (1, "Y")):
            entries, first, begin = self.entries(axis)
            starts.append(begin)
            lines += [
                array("Entry", f"ENTRY_{name}", entries or [(0, 0, "0.0")]),
                array("int", f"FIRST_{name}", first),
            ]
        of_path = {pair.path: pair for pair in self.pairs}
        paths = [
            (k, i, j, path.coupling.shape[2], of_path[n].stride, of_path[n].segment)
            for n, (path, k, i, j) in enumerate(zip(self.paths, *starts, strict=True))
        ]
        return [
            *lines,
            array("Path", "PATH", paths),
            array("Pair", "PAIR", [pair[:5] for pair in self.pairs]),
            array("Item", "X_ITEM", x_items),
            array("Item", "Y_ITEM", y_items),
            array("int", "PAIRS_OF_X", of_x),
            array("int", "PAIRS_OF_Y", of_y),
        ]

    def terms(self, axis: int) -> dict[int, list[tuple[int, int, str]]]:
        """All terms of each component of x (0), y (1) or of the pairs' values (2), in their order.

        Returns:
            For each component: places in rows of the two others, and the constant.
        """
        found: dict[int, list[tuple[int, int, str]]] = {}
        others = [n for n in range(3) if n != axis]
        constants = [
            list(
                zip(
                    p.coupling.indices.tolist(),
                    (p.coupling.values * p.path_weight).tolist(),
                    strict=True,
                )
            )
            for p in self.paths
        ]
        for pair in self.pairs:
            for i in range(self.extent(pair, axis)):
                found.setdefault(pair[axis] + i, [])
            for at, c in constants[pair.path]:
                a, b = (pair[other] + at[other] for other in others)
                found[pair[axis] + at[axis]].append((a, b, repr(c)))
        return dict(sorted(found.items()))

    def unrolled_header(self, real: str, team: int) -> list[str]:
        """Tables with all terms of every component."""
        lines = [
            f"#define REAL {real}",
            f"struct Entry {{ unsigned short a, b; {real} c; }};",
            "struct Item { int at, first, end; };",
        ]
        for axis, name in ((0, "X"), (1, "Y"), (2, "Z")):
            entries: list[tuple[int, int, str]] = []
            items = []
            for at, terms in self.terms(axis).items():
                items.append(Item(at, len(entries), len(entries) + len(terms), 0, 0))
                entries += terms
            lines += [
                f"#define {name}_ITEMS {len(items)}",
                f"#define LANES_{name} {lanes_for(items, team)}",
                array("Entry", f"{name}_ENTRY", entries or [(0, 0, "0.0")]),
                array("Item", f"{name}_ITEM", [item[:3] for item in items]),
            ]
            if name == "Z":
                lines.append(
                    array("int", "Z_FIRST", [item.first for item in items] + [len(entries)])
                )
        return [*lines, array("int", "WEIGHT_AT", [pair.weight for pair in self.pairs])]


def lanes_for(items: list[Item], team: int) -> int:
    """Threads that share an item, where there are fewer items than threads and many pairs in each."""
    longest = max(item.end - item.first for item in items)
    return next(
        n for n in (32, 16, 8, 4, 2, 1) if n == 1 or (n * len(items) <= team and n <= longest)
    )
