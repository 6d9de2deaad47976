"""How many blocks a launch of a linear's kernel over some rows has, and of what shape."""

from __future__ import annotations

from typing import NamedTuple

from e3nn_accel.backends.cuda.indexed_linear_tables import LinearTables


class LaunchOfRows(NamedTuple):
    """What a launch over rows needs to know.

    Attributes:
        row: Numbers of a row of the result.
        whole: Whether all of them are written.
        items: Blocks of a tile of nodes, for all components.
        nodes: Of a tile that is full, at least.
        unfilled: Tiles that aren't, at most: one of each class.
        by_dim: For each number of components of a channel, nodes of a tile that is full, and blocks of it.
        sliced: Whether the longest sum can be shared by blocks.
        steps: Of that sum.
        block: Threads.
        shared: Bytes of dynamic shared memory.
    """

    row: int
    whole: bool
    items: int
    nodes: int
    unfilled: int
    by_dim: tuple[tuple[int, int], ...]
    sliced: bool
    steps: int
    block: tuple[int, int, int]
    shared: int

    @classmethod
    def of(cls, tables: LinearTables) -> LaunchOfRows:
        """Of the kernel with these tables."""
        side, layout = tables.paths, tables.layout
        pairs, row, items = layout.rows, side.out_row, side.row_items(layout.columns)
        by_dim = tuple((pairs // dim, here) for dim, _, here in side.items_by_dim(layout.columns))
        return cls(
            row, side.covered == row, len(items), pairs // side.widest, side.species + 1, by_dim,
            tables.sliced, max(map(side.steps, items)), (layout.threads, 1, 1), tables.shared,
        )  # fmt: skip

    def blocks(self, rows: int) -> int:
        """That have something to do, at most; as the kernel counts them."""
        unfilled, found = min(rows, self.unfilled), 0
        for nodes, here in self.by_dim:  # a loop: a generator takes twice as long, at every call
            found += (rows // nodes + unfilled) * here
        return found
