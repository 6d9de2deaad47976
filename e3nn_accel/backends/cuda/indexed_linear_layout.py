"""How the kernels of linears are cut, and how what they copy lies in shared memory."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from e3nn_accel.availability import architecture_of
from e3nn_accel.config import Precision
from e3nn_accel.launch import COPY_BYTES
from e3nn_accel.plan import PlanContext

TILE, DEPTH = 64, 16
"""Channels of a block, and rows of a tile: (node, component) pairs; what is summed at a time. As in matrix_tile.cuh."""
EARLIEST = 80
"""The first compute capability whose tensor cores take float64 and tf32, and that copies to shared memory by itself."""
BUSY_BLOCKS = 3
"""Of a multiprocessor that long sums of few rows are cut into: the fourth would wait for its turn to multiply."""
STEPS_OF_A_SLICE = 8
"""Of such a sum, DEPTH channels each, at least: fewer take no longer than a block needs to begin and to end."""
STEPS_TO_CUT = 20
"""Sums that are shorter can't be cut: the launch that adds slices up takes as long as some six steps."""


SortedRows = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""The scalars, the order of rows and the starts of classes; nothing where rows aren't told apart."""


class Layout(NamedTuple):
    """How a kernel is cut.

    Attributes:
        rows: (node, component) pairs of a tile, 32, 64 or 128; of the gradient of weights, channels.
        blocks: Of a multiprocessor: what registers are bounded by.
        columns: Of a tile; those that follow are float64's alone, too.
        stages: Slots of the ring in dynamic shared memory.
        down, across: Parts of a tile, each a warp's.
        copiers: Warps that copy, and do nothing else.
    """

    rows: int
    blocks: int
    columns: int = TILE
    stages: int = 2
    down: int = 2
    across: int = 2
    copiers: int = 0

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * (self.down * self.across + self.copiers)

    def right_room(self, transposed: bool) -> int:
        """Numbers of float64 that a slot has of W, as indexed_linear.cu lays them out."""
        if transposed:
            return self.columns * (DEPTH + 4)
        return DEPTH * (self.columns + 4)


def slices_of(blocks: int, steps: int, multiprocessors: int) -> int:
    """Into how many slices sums of few rows are cut, for so many blocks whose longest sum has so many steps.

    A step takes a block alone some 0.39 us on an H200, most of which is waiting, and two more blocks hide
    that; a second launch takes 2.5 us.
    """
    return max(1, min(BUSY_BLOCKS * multiprocessors // blocks, steps // STEPS_OF_A_SLICE))


def too_early(context: PlanContext) -> str:
    """Why a device has no kernels, if it has none. The host, where kernels are tested, is of no architecture."""
    architecture = context.architecture or architecture_of(context.device)
    if 0 < architecture < EARLIEST:
        return f"compute capability {architecture / 10}, its tensor cores have no tf32: matrix products are torch's"
    return ""


def rounded_to(context: PlanContext) -> Precision | None:
    """What numbers are rounded to before they are multiplied, if the user asks for less than their dtype."""
    wanted = context.config.precision
    return None if wanted == "float32" or context.dtype != torch.float32 else wanted


def products_in(precision: Precision | None, which: str = "products") -> str:
    """What a strategy says of it."""
    return f", {which} in {precision}" if precision else ""


@cache
def pitch(dim: int, bytes_each: int, of_weights: bool, depth: int = DEPTH, tile: int = TILE) -> int:
    """From one node's numbers in shared memory to the next's: where the fewest lanes meet in a bank.

    A fragment's number is read by a warp at eight rows and four depths (`own_row`, `own_depth` in
    matrix_tile.cuh). Rows are components of nodes and depths channels, ``dim`` apart; for the
    gradient of weights it is the other way round. In float64 rows are one component of all nodes of the
    ``tile`` after the other, where eight lie side by side as those of a matrix do, four channels apart.
    """
    run = (TILE if of_weights else depth) * dim
    aligned = COPY_BYTES // bytes_each
    lanes = 128 // bytes_each  # that the banks serve at once

    by_component = bytes_each == 8 and not of_weights

    def conflicts(size: int) -> int:
        def place(row: int) -> int:
            if not by_component:
                return row // dim * size + row % dim
            return row % (tile // dim) * size + min(row // (tile // dim), dim - 1)

        found, rows = 0, tile if by_component else 2 * TILE
        for start in range(0, DEPTH if of_weights else rows, 4 if of_weights else 8):
            nodes = [start + n for n in range(4 if of_weights else 8)]
            other = range(8 if of_weights else 4)
            at = [
                place(node) + channel * dim
                for node, channel in (
                    [(n, c) for c in other for n in nodes]
                    if of_weights
                    else [(n, c) for n in nodes for c in other]
                )
            ]
            for first in range(0, 32, lanes):
                banks = [place % lanes for place in set(at[first : first + lanes])]
                found += max(banks.count(bank) for bank in banks)
        return found

    return min(range(run, run + lanes, aligned), key=lambda size: (conflicts(size), size))
