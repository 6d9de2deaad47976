"""The gradient of the weights of ``o3.Linear`` of many rows in float32, on Hopper: how its kernel is cut."""

from __future__ import annotations

from e3nn_accel.backends.cuda.linear_in_halves import BYTES, CHUNK, HOPPER, LINE
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.backends.cuda.weight_blocks import (
    LeastWork,
    Step,
    WeightBlocks,
    copied_whole,
    widest,
)

THREADS, STAGES, LOTS = 256, 2, 2
"""Of a block, its slots of rows, and its lots of halves."""
CHANNELS, CHUNKS = 128, 2
"""Of a tile; of a step, each of as many components of nodes as tensor cores sum over at once."""
LEAST = LeastWork(blocks=2, of_several=8, of_one=4)
"""Steps."""


def takes(paths: MatrixPaths, architecture: int) -> bool:
    """Whether tiles aren't nearly empty, and bulk copies move what they need."""
    return (
        architecture == HOPPER and copied_whole(paths, BYTES) and max(widest(paths)) > CHANNELS // 2
    )


def weights_in_halves(paths: MatrixPaths) -> WeightBlocks:
    """Of what it takes; what has more channels is cut by those that multiply, and has the tile's longer side."""
    side = paths.turned if widest(paths)[0] <= CHANNELS // 2 else paths
    columns = 128 if widest(side)[1] > 64 else 64
    dims = {path.dim for path in side.paths}
    left, right = _rooms(dims, columns)
    return WeightBlocks(
        entry="linear_weights_in_halves",
        real="float",
        side=side,
        channels=CHANNELS,
        columns=columns,
        threads=THREADS,
        shared=BYTES * (STAGES * (left + right) + LOTS * CHUNKS * CHUNK * columns),
        steps={dim: Step(CHUNKS * (CHUNK // dim)) for dim in dims},
        least=LEAST,
        sizes={"LEFT_ROOM": left, "RIGHT_ROOM": right},
    )


def _rooms(dims: set[int], columns: int) -> tuple[int, int]:
    """Numbers of x, and of g, that a slot holds: see Chunk in the kernel."""
    left = max(CHUNKS * (CHUNK // dim) * (CHANNELS * dim + 8) for dim in dims)
    right = max(CHUNKS * (CHUNK // dim * columns * dim + 16) for dim in dims)
    return -(-left // LINE) * LINE, -(-right // LINE) * LINE
