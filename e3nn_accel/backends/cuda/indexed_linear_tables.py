"""The tables that the kernels of linears, species-indexed or not, are compiled with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from e3nn_accel.backends.cuda.indexed_linear_layout import (
    DEPTH,
    STEPS_TO_CUT,
    TILE,
    Layout,
    pitch,
)
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.backends.cuda.tensor_product_plan import array, defines, for_each
from e3nn_accel.config import Precision

HOPPER = 90
COPIERS = 4
"""Warps: registers are handed over between warpgroups."""


def layout_of(
    paths: MatrixPaths, bytes_each: int, of_weights: bool, few: bool, architecture: int = 0
) -> Layout:
    """Found by tests/gpu/tune_linear.py on an H100; ``few`` rows are cut finely, for a warp to have less to do."""
    if few:
        return Layout(TILE // 2, 2)
    if bytes_each == 8:
        return _layout_of_doubles(paths, of_weights, architecture)
    if paths.scattered(bytes_each):
        return Layout(TILE, 2)
    if of_weights or paths.species:  # species cut tiles short
        return Layout(TILE, 3)
    return Layout(2 * TILE, 2)


def _layout_of_doubles(paths: MatrixPaths, of_weights: bool, architecture: int) -> Layout:
    """Tiles of 128 columns read less for what they multiply; of 64 where half would be empty, or cut short.

    On Hopper a warpgroup copies for another, where steps and tiles are full and copies whole.
    """
    scattered = paths.scattered(8)
    if of_weights or scattered:
        return Layout(TILE, 2, stages=2 if scattered else 3)
    copiers = COPIERS if architecture == HOPPER and paths.whole("channels", DEPTH) else 0
    if not paths.species and paths.whole("columns", 2 * TILE):
        return Layout(TILE, 2, columns=2 * TILE, stages=3, copiers=copiers)
    if paths.species or not paths.whole("columns", TILE):
        copiers = 0
    return Layout(TILE, 3, stages=3, copiers=copiers)


@dataclass(frozen=True)
class LinearTables:
    """Of a kernel of rows, many or ``few``, or of the gradient of weights.

    Attributes:
        paths: From what is read to what is written.
        real: "float" or "double".
        architecture: Compute capability that it is made for; 0: any.
    """

    paths: MatrixPaths
    real: str
    of_weights: bool = False
    few: bool = False
    architecture: int = 0

    @property
    def bytes_each(self) -> int:
        """Of a number."""
        return 8 if self.real == "double" else 4

    @cached_property
    def layout(self) -> Layout:
        """How the kernel is cut."""
        return layout_of(self.paths, self.bytes_each, self.of_weights, self.few, self.architecture)

    @property
    def staged(self) -> bool:
        """Whether the kernel is that of linear_staged.cu, where warps copy for the others."""
        return self.layout.copiers > 0

    @cached_property
    def sliced(self) -> bool:
        """Whether the kernel can share a sum among blocks: the others are faster for not knowing how."""
        longest = max(map(self.paths.steps, self.paths.row_items()), default=0)
        return self.few and longest >= STEPS_TO_CUT

    @cached_property
    def pitches(self) -> dict[int, int]:
        """From one node's numbers in shared memory to the next's, by components of a channel."""
        dims = sorted({path.dim for path in self.paths.paths})
        tile = self.layout.rows
        return {dim: pitch(dim, self.bytes_each, self.of_weights, tile=tile) for dim in dims}

    @property
    def left_room(self) -> int:
        """Numbers of the nodes of a slot."""
        nodes = DEPTH if self.of_weights else self.layout.rows
        return -(-max(nodes // dim * n for dim, n in self.pitches.items()) // 4) * 4

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory of a block: float64's ring, or results on their way out."""
        if self.real != "double":
            return 0
        layout, room = self.layout, self.left_room
        if self.of_weights:
            return 8 * layout.stages * 2 * room
        ring = layout.stages * (room + layout.right_room(self.paths.transposed))
        return 8 * max(ring, layout.rows * (layout.columns + 4))

    def header(self, precision: Precision | None = None) -> str:
        """The text of ``plan.cuh``."""
        paths, layout = self.paths, self.layout
        columns, room = layout.columns, "NODE_ROOM" if self.of_weights else "LEFT_ROOM"
        fields, items = self._items(columns)
        by_dim = (
            [(dim,) for dim in self.pitches] if self.of_weights else paths.items_by_dim(columns)
        )
        depth = TILE if self.of_weights else DEPTH
        lines = [
            f"#define REAL {self.real}",
            *([f"#define CORES RoundedTo{precision.capitalize()}"] if precision else []),
            *defines(
                {
                    "IN_ROW": paths.in_row,
                    "OUT_ROW": paths.out_row,
                    "SPECIES": max(1, paths.species),
                    "SORTED": int(paths.species > 0),
                    "WEIGHTS": paths.weights,
                    **({"ITEMS": len(items)} if self.of_weights else {}),
                    "ROWS": layout.rows,
                    "BLOCKS": layout.blocks,
                    **({"SLICED": 1} if self.sliced else {}),
                    "WHOLE_CHANNELS": paths.whole("channels", depth),
                    "WHOLE_COLUMNS": paths.whole("columns", columns),
                    room: self.left_room,
                    **paths.copies(self.bytes_each),
                    **(self._of_doubles() if self.real == "double" else {}),
                }
            ),
            "struct Path { int in, channels, out, columns, dim, weight; REAL scale; };",
            f"struct Item {{ int {fields}; }};",
            array("Path", "PATH", list(paths.by_output)),
            "template <int DIM> constexpr int PITCH = 0;",
            *(f"template <> constexpr int PITCH<{dim}> = {n};" for dim, n in self.pitches.items()),
            for_each("DIMS", by_dim),
            array("Item", "ITEM", items),
        ]
        return "\n".join(lines) + "\n"

    def _items(self, columns: int) -> tuple[str, list[tuple[int, ...]]]:
        """What blocks are told, by name, and of each."""
        if self.of_weights:
            return "path, u, w", [*self.paths.weight_items()]
        items = self.paths.row_items(columns)
        if self.sliced:
            return "first, end, column, steps", [(*item, self.paths.steps(item)) for item in items]
        return "first, end, column", [*items]

    def _of_doubles(self) -> dict[str, int]:
        layout = self.layout
        return {
            "COLUMNS": layout.columns,
            "WARPS_DOWN": layout.down,
            "WARPS_ACROSS": layout.across,
            "STAGES": layout.stages,
            **({"COPIERS": layout.copiers} if self.staged else {}),
            "ONE_SCALE": int(self.paths.one_scale()),
        }
