"""How the threads of a block share a row of pairs whose weights lie in shared memory.

Forward, lanes go along the columns of an output block and warps share its pairs; backward, a thread has pairs of its
own. Both are found once, compiled in, and balanced by the steps that a warp takes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from e3nn_accel.launch import COPY_BYTES

THREADS, WARP = 256, 32
WARPS = THREADS // WARP
BANKS, WORD = 32, 4


class Run(NamedTuple):
    """Pairs of one path into an output block: their weights [pairs, mul] lie together, and so do their values."""

    weight: int
    pairs: int
    z: int


class Output(NamedTuple):
    """An output block.

    Attributes:
        at: Where it starts in a row of the output.
        mul: Channels.
        d3: Components of each.
        accumulate: Whether another part has written it before, 0 or 1.
        runs: Of the paths into it.
    """

    at: int
    mul: int
    d3: int
    accumulate: int
    runs: tuple[Run, ...]

    @property
    def pairs(self) -> int:
        """Of all paths."""
        return sum(run.pairs for run in self.runs)

    @property
    def dim(self) -> int:
        """Numbers of a row of the output."""
        return self.mul * self.d3

    def vector(self, real_bytes: int) -> int:
        """Columns that a lane reads at once: all its weights have to begin at a multiple."""
        starts = [self.mul, *(run.weight for run in self.runs)]
        most = COPY_BYTES // real_bytes
        return next(v for v in (4, 2, 1) if v <= most and all(at % v == 0 for at in starts))


class Cut(NamedTuple):
    """How warps go through an output block forward.

    Attributes:
        vector: Columns that a lane reads at once.
        lanes: Side by side along the columns; a warp takes ``32 // lanes`` pairs at a time.
        shares: Warps among which the pairs are dealt.
        steps: Of a warp, in each share and for each group of columns.
    """

    vector: int
    lanes: int
    shares: int
    steps: float

    @property
    def side_by_side(self) -> int:
        """Pairs that a warp takes at a time."""
        return WARP // self.lanes

    @property
    def slices(self) -> int:
        """Partial sums of each number of the result."""
        return self.shares * self.side_by_side


def cuts(outputs: list[Output], real_bytes: int) -> list[Cut]:
    """Of the output blocks: as many warps each as it has of the work."""
    whole = []
    for of in outputs:
        vector = of.vector(real_bytes)
        lanes = min(WARP, of.mul // vector)
        steps = of.pairs / (WARP // lanes) * (vector * of.d3 + 4)
        groups = -(-of.mul // (vector * lanes))
        whole.append((Cut(vector, lanes, 1, steps), groups))
    work = sum(cut.steps * groups for cut, groups in whole)
    found = []
    for of, (cut, groups) in zip(outputs, whole, strict=True):
        most = max(1, of.pairs // cut.side_by_side)
        shares = max(1, min(most, round(WARPS * cut.steps * groups / work)))
        found.append(cut._replace(shares=shares, steps=cut.steps / shares))
    return found


def tasks(outputs: list[Output], found: list[Cut]) -> list[tuple[int, int, int, int]]:
    """(warp, block, first column, first slice): the longest first, each to the warp that has least to do."""
    pieces = []
    for n, (of, cut) in enumerate(zip(outputs, found, strict=True)):
        for column in range(0, of.mul // cut.vector, cut.lanes):
            firsts = range(0, cut.slices, cut.side_by_side)
            pieces += [(cut.steps, n, column, first) for first in firsts]
    load = [0.0] * WARPS
    dealt = []
    for steps, n, column, first in sorted(pieces, key=lambda piece: -piece[0]):
        warp = load.index(min(load))
        load[warp] += steps
        dealt.append((warp, n, column, first))
    return dealt


class Shapes(NamedTuple):
    """Pairs in the order in which threads have them backward, those of one shape together.

    Attributes:
        shapes: (mul, d3, vector, shift, first pair, end).
        pairs: (weight, z, g) of each: where its weights and values begin, and the gradient of its output block.
    """

    shapes: list[tuple[int, ...]]
    pairs: list[tuple[int, int, int]]

    @classmethod
    def of(cls, outputs: list[Output], real_bytes: int) -> Shapes:
        """Of all output blocks, whose gradients lie one after the other, each in whole copies."""
        alike: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        g = 0
        for of in outputs:
            vector = of.vector(real_bytes)
            shift = quiet_shift(of.mul, vector, of.d3, real_bytes)
            pairs = alike.setdefault((of.mul, of.d3, vector, shift), [])
            for run in of.runs:
                pairs += [(run.weight + q * of.mul, run.z + q * of.d3, g) for q in range(run.pairs)]
            g += gradient_room(of, real_bytes)
        ends = [0]
        for pairs in alike.values():
            ends.append(ends[-1] + len(pairs))
        shapes = [(*shape, *both) for shape, both in zip(alike, pairwise(ends), strict=True)]
        return cls(shapes, [pair for pairs in alike.values() for pair in pairs])


def gradient_room(output: Output, real_bytes: int) -> int:
    """Numbers that an output block's gradient takes in shared memory."""
    whole = COPY_BYTES // real_bytes
    return -(-output.dim // whole) * whole


def quiet_shift(mul: int, vector: int, d3: int, real_bytes: int) -> int:
    """By how many vectors a lane begins after the one before it, so that the fewest meet in a bank.

    Lane l reads weights from ``l * mul + (l * shift % length) * vector`` on and writes there, and g [d3, mul].
    """
    length, words = mul // vector, vector * real_bytes // WORD
    together = BANKS // words  # lanes that are served at once

    def meetings(shift: int) -> int:
        columns = [lane * shift % length for lane in range(together)]
        weights = [lane * length + column for lane, column in enumerate(columns)]
        return 2 * _turns(weights, together) + d3 * _turns(columns, together)

    return min(range(length), key=meetings)


def _turns(places: list[int], banks: int) -> int:
    """That it takes to serve these vectors: different ones in the same bank wait for each other."""
    distinct = set(places)
    return max(sum(place % banks == bank for place in distinct) for bank in range(banks))
