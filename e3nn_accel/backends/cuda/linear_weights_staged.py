"""The gradient of the weights of ``o3.Linear`` of many rows in float64, on Hopper: how its kernel is cut."""

from __future__ import annotations

from e3nn_accel.backends.cuda.indexed_linear_layout import TILE
from e3nn_accel.backends.cuda.indexed_linear_tables import COPIERS, HOPPER
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.backends.cuda.weight_blocks import (
    LeastWork,
    Step,
    WeightBlocks,
    copied_whole,
    widest,
)

BYTES = 8
WARPS = 8
"""That multiply, 32 channels by 64 columns each."""
STAGES, MOST_STAGES = 2, 6
"""Slots of the ring: at least, and at most."""
ROOM = 225 << 10
"""Bytes of a block, that are left besides barriers."""
LEAST = LeastWork(blocks=1, of_several=0, of_one=96)
"""(node, component) pairs."""


def takes(paths: MatrixPaths, architecture: int) -> bool:
    """Whether tiles aren't nearly empty, bulk copies move what they need, and a ring of it fits."""
    narrow, wide = sorted(widest(paths))
    return (
        architecture == HOPPER
        and copied_whole(paths, BYTES)
        and (narrow > TILE or wide > 2 * TILE)
        and STAGES * _slot(paths.widest, *_tile(paths)) <= ROOM
    )


def weights_staged(paths: MatrixPaths) -> WeightBlocks:
    """Of what it takes; what has fewer channels has the tile's shorter side."""
    channels, columns = _tile(paths)
    side = paths.turned if widest(paths)[1] <= channels < columns else paths
    dims = {path.dim for path in side.paths}
    slots = [_slot(dim, channels, columns) for dim in dims]
    return WeightBlocks(
        entry="linear_weights_staged",
        real="double",
        side=side,
        channels=channels,
        columns=columns,
        threads=32 * (WARPS + COPIERS),
        shared=max(slot * min(MOST_STAGES, ROOM // slot) for slot in slots),
        steps={dim: Step(_nodes(dim), _nodes(dim) * dim) for dim in dims},
        least=LEAST,
        sizes={
            "WARPS_DOWN": channels // 32,
            "WARPS_ACROSS": columns // 64,
            "SHARED": ROOM,
        },
    )


def _tile(paths: MatrixPaths) -> tuple[int, int]:
    """Channels and columns."""
    return (TILE, 4 * TILE) if min(widest(paths)) <= TILE else (2 * TILE, 2 * TILE)


def _nodes(dim: int) -> int:
    """Of a step."""
    return {1: 32, 3: 8}.get(dim, 4)


def _slot(dim: int, channels: int, columns: int) -> int:
    """Bytes."""
    return BYTES * _nodes(dim) * ((channels + columns) * dim + 8)
