"""How rows are shared among blocks that have a tile of weights each."""

from __future__ import annotations

import pytest

from e3nn_accel.backends.cuda.weight_blocks import LeastWork, OfDim, cut

pytestmark = pytest.mark.once
IN_HALVES, STAGED = (32, 1, 10, 1), (32, 32, 8, 24)
"""Nodes and cost of a step, of one component and of three."""


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 5000, 187_000])
@pytest.mark.parametrize("processors", [1, 20, 132])
@pytest.mark.parametrize("tiles", [1, 3, 1000])
@pytest.mark.parametrize(
    ("steps", "least"), [(IN_HALVES, LeastWork(2, 8, 4)), (STAGED, LeastWork(1, 0, 128))], ids=str
)
def test_blocks_run_at_once(
    rows: int, processors: int, tiles: int, steps: tuple[int, int, int, int], least: LeastWork
) -> None:
    """Unless tiles are more, of which each then has one; and together they have every step."""
    nodes, cost, nodes_of_three, cost_of_three = steps
    by_dim = OfDim(1, 0, tiles, nodes, cost), OfDim(3, tiles, 2, nodes_of_three, cost_of_three)
    work, blocks = cut(by_dim, least, rows, processors)
    most = least.blocks * processors
    assert blocks == sum(
        -(-rows // (max(1, work // of.cost) * of.nodes)) * of.tiles for of in by_dim
    )
    if blocks > most:
        assert blocks == sum(of.tiles for of in by_dim)
    elif rows == 187_000 and tiles < 1000:
        assert blocks > 0.8 * most


def test_few_rows_make_few_blocks() -> None:
    """Whose beginning and end take as long as some steps."""
    tiles = (OfDim(1, 0, 1, 32, 1),)
    assert cut(tiles, LeastWork(2, 8, 4), 32 * 5, 132) == (4, 2)
    assert cut(tiles, LeastWork(2, 8, 4), 32 * 264, 132) == (4, 66)
    assert cut(tiles, LeastWork(2, 8, 4), 32 * 264 * 8, 132) == (8, 264)
