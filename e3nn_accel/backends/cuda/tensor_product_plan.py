"""From a tensor product's descriptor to parts, each the tables that one kernel is compiled with.

Every mode is a list of pairs of channels and a rule where a pair goes, so modes are data here and
nothing in the kernels. A product is cut by its output blocks: those whose paths all go channel by
channel (and are wide enough) to ``tensor_product_channels.cu``, the rest to ``tensor_product.cu``,
once for the pairs that go to an output as they are and once for those that weights of each row mix.

Pairs that weights shared by all rows mix are an output themselves, laid out for a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple, Protocol

from e3nn_accel.descriptor import ProductPath, TensorProductDescriptor
from e3nn_accel.irreps import Irreps, dim_of

MIXING = ("uvw", "uuw", "u<vw")
"""Modes whose weights have an index of the output's channels."""
PAIR_LIMIT = 16384
"""Pairs of channels of a part: its tables are text that a compiler reads."""
SHARED_BYTES = 46 * 1024
PARTIAL_SUMS = 1 << 22
"""Numbers that the gradients of shared weights may take before they are added up."""


class Residence(NamedTuple):
    """Of a kernel whose blocks stay and go through the rows.

    Attributes:
        blocks: Of a multiprocessor.
        slots: Rows of weights that a block has in shared memory, or on their way.
        shared: Bytes of dynamic shared memory of a block.
    """

    blocks: int
    slots: int
    shared: int


class Part(Protocol):
    """One kernel file with its tables."""

    @property
    def file(self) -> str:
        """The ``.cu`` file."""
        ...

    @property
    def swapped(self) -> bool:
        """Whether the kernel's first input is the product's second."""
        ...

    @property
    def threads(self) -> int:
        """Of a block."""
        ...

    @property
    def rows(self) -> int:
        """That a block takes at a time."""
        ...

    @property
    def chunks(self) -> int:
        """Blocks that share a row; each has its own dy."""
        ...

    @property
    def sums(self) -> int:
        """Partial sums of dw that a block makes where weights are shared."""
        ...

    @property
    def covered(self) -> int:
        """Components of the output that it sets."""
        ...

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        ...

    @property
    def has_double(self) -> bool:
        """Whether it has a kernel for second derivatives."""
        ...

    def residence(self, kind: str) -> Residence | None:
        """Of the kernel for "forward", "backward" or "double"; None where a block has its rows and ends."""
        ...

    def reached(self, operand: int) -> int:
        """Components of the kernel's first (0) or second (1) input that play a part."""
        ...

    def header(self, kind: str, real: str) -> str:
        """The text of ``plan.cuh`` for "forward", "backward" or "double"."""
        ...


class Numbered(NamedTuple):
    """A path with the offset of its weights in a row of them, -1 without weights."""

    path: ProductPath
    weight: int

    @property
    def mixes(self) -> bool:
        """Whether weights sum over the pairs."""
        return self.path.has_weight and self.path.mode in MIXING

    @property
    def weights(self) -> int:
        """How many it has."""
        return prod(self.path.path_shape) if self.path.has_weight else 0


def numbered(d: TensorProductDescriptor) -> list[Numbered]:
    """The paths that compute anything."""
    found, offset = [], 0
    for path in d.paths:
        n = Numbered(path, offset if path.has_weight else -1)
        if 0 not in path.path_shape and d.irreps_out[path.i_out].dim:
            found.append(n)
        offset += n.weights
    return found


def offset_of(irreps: Irreps, block: int) -> int:
    """Where a block starts in a row."""
    return sum(b.dim for b in irreps[:block])


def pairs_of(mode: str, mul1: int, mul2: int) -> Iterator[tuple[int, int]]:
    """(u, v) in the order of the weights."""
    if mode in ("uuw", "uuu"):
        return ((u, u) for u in range(mul1))
    if mode in ("uvu<v", "u<vw"):
        return ((u, v) for u in range(mul1) for v in range(u + 1, mul2))
    return ((u, v) for u in range(mul1) for v in range(mul2))


def channel_of(mode: str, u: int, v: int, q: int) -> int:
    """The output's channel that pair number q goes to."""
    return {"uvu": u, "uuu": u, "uvv": v, "uuw": 0}.get(mode, q)


class Segment(NamedTuple):
    """One of the matrices that a result consists of: numbers of a row before it, and in it."""

    base: int
    size: int


class Block(NamedTuple):
    """Pairs that weights shared by all rows mix into one output block, as a matrix of the result."""

    i_out: int
    segment: int
    paths: tuple[Numbered, ...]
    pairs: int


def rows_of(d: TensorProductDescriptor) -> dict[str, int]:
    """Sizes of the rows in memory."""
    return {
        "X_ROW": dim_of(d.irreps_in1),
        "Y_ROW": dim_of(d.irreps_in2),
        "WEIGHT_ROW": d.weight_numel,
        "SHARED_WEIGHTS": int(d.shared_weights),
    }


def defines(sizes: dict[str, int]) -> list[str]:
    """Preprocessor constants."""
    return [f"#define {name} {value}" for name, value in sizes.items()]


def for_each(name: str, values: Iterable[tuple[int, ...]]) -> str:
    """A macro that applies another one to each of these."""
    applied = " ".join(f"OF({', '.join(map(str, value))})" for value in values)
    return f"#define {name}(OF) {applied}"


def array(kind: str, name: str, values: list, inner: str = "") -> str:  # type: ignore[type-arg]
    """A constant table."""

    def text(value: object) -> str:
        return (
            "{" + ", ".join(map(text, value)) + "}"
            if isinstance(value, list | tuple)
            else str(value)
        )

    return f"__device__ constexpr {kind} {name}[]{inner} = {text(values)};"


def pair_count(d: TensorProductDescriptor, n: Numbered) -> int:
    """Pairs of channels of a path."""
    mul1, mul2 = d.irreps_in1[n.path.i_in1].mul, d.irreps_in2[n.path.i_in2].mul
    if n.path.mode in ("uuw", "uuu"):
        return mul1
    return mul1 * (mul1 - 1) // 2 if n.path.mode in ("uvu<v", "u<vw") else mul1 * mul2
