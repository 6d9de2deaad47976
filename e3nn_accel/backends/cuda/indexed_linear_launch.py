"""Launches the kernels of linears; of a species-indexed one, the device knows how much work there is."""

from __future__ import annotations

from typing import NamedTuple

import torch

from e3nn_accel.backends.cuda.indexed_linear_layout import rounded_to, slices_of
from e3nn_accel.backends.cuda.indexed_linear_tables import MatrixPaths
from e3nn_accel.backends.cuda.linear_in_halves import ENTRIES as OF_HALVES
from e3nn_accel.backends.cuda.linear_in_halves import LinearInHalves
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.backends.cuda.share_sums import ShareSums
from e3nn_accel.backends.cuda.tensor_product_plan import PARTIAL_SUMS
from e3nn_accel.compile import KernelProgram
from e3nn_accel.groupings import NodesBySpecies
from e3nn_accel.launch import Kernel, aligned, load_all, multiprocessors
from e3nn_accel.ops.weighted import KINDS
from e3nn_accel.plan import PlanContext

SortedRows = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""The scalars, the order of rows and the starts of classes; nothing where rows aren't told apart."""
BLOCK = (128, 1, 1)
ROWS_OF_A_SLICE = 128
BLOCKS_FOR_SUMS = 1024
"""Where tiles of weights are fewer, rows are cut into slices, each with its own dW: enough to fill a device."""
FEW_BLOCKS = 2
"""Of a multiprocessor: up to so many, rows are cut finely."""
ENTRIES = {
    "forward": ("indexed_linear", "PPPPPqP"),
    "to_input": ("indexed_linear", "PPPPPqP"),
    "to_weight": ("indexed_linear_weights", "PPPPPqP"),
}


class _Rows(NamedTuple):
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
    """

    row: int
    whole: bool
    items: int
    nodes: int
    unfilled: int
    by_dim: tuple[tuple[int, int], ...]
    sliced: bool
    steps: int

    @classmethod
    def of(cls, side: MatrixPaths, real: str, few: bool) -> _Rows:
        """Of kernels for numbers of this type."""
        bytes_each = 8 if real == "double" else 4
        pairs = side.layout(bytes_each, of_weights=False, few=few).rows
        row, items = side.out_row, side.row_items()
        by_dim = tuple((pairs // dim, here) for dim, _, here in side.items_by_dim())
        return cls(
            row, side.covered == row, len(items), pairs // side.widest, side.species + 1, by_dim,
            side.is_sliced(few), max(map(side.steps, items)),
        )  # fmt: skip

    def blocks(self, rows: int) -> int:
        """That have something to do, at most; as the kernel counts them."""
        unfilled, found = min(rows, self.unfilled), 0
        for nodes, here in self.by_dim:  # a loop: a generator takes twice as long, at every call
            found += (rows // nodes + unfilled) * here
        return found


class IndexedLinearKernels:
    """Kernels of one product or linear in one dtype."""

    def __init__(self, paths: MatrixPaths, description: str, context: PlanContext) -> None:
        self.paths = paths
        self.real, self.config, self.description = REAL[context.dtype], context.config, description
        self.rounded_to = rounded_to(context)
        self.sides = {"forward": paths, "to_input": paths.turned}
        self._rows = {
            (kind, few): _Rows.of(side, self.real, few)
            for kind, side in self.sides.items()
            for few in (False, True)
        }
        self._tiles = len(paths.weight_items())
        halved = self.real == "float" and not self.rounded_to
        self._halves = {
            kind: LinearInHalves(side)
            for kind, side in self.sides.items()
            if halved and LinearInHalves.takes(side)
        }
        self._slices = {
            kind: ShareSums(side.out_row, self.real, context.dtype.itemsize, context.config)
            for kind, side in self.sides.items()
            if side.is_sliced(few=True)
        }
        self._kernels: dict[tuple[torch.device, bool], dict[str, tuple[Kernel, ...]]] = {}
        self._few_blocks: dict[torch.device, int] = {}

    def programs(self) -> tuple[KernelProgram, ...]:
        """What would be compiled, for many rows and for few."""
        return tuple(dict.fromkeys([*self._programs(few=False), *self._programs(few=True)]))

    def _programs(self, few: bool) -> list[KernelProgram]:
        """One of each of `KINDS`, and for few rows those that add up slices."""
        found = [self._program(kind, few and kind in self.sides) for kind in KINDS]
        return [*found, *(sums.program for sums in self._slices.values() if few)]

    def _program(self, kind: str, few: bool) -> KernelProgram:
        if not few and kind in self._halves:
            suffix = "_input" if kind == "to_input" else ""
            return self._halves[kind].program(suffix, self.description)
        entry, _ = ENTRIES[kind]
        side = self.sides.get(kind, self.paths)
        suffix = ("_input" if kind == "to_input" else "") + ("_few" if few else "")
        real = "_".join(filter(None, (self.real, self.rounded_to)))
        return KernelProgram(
            f"{entry if side.species else entry.removeprefix('indexed_')}{suffix}_{real}",
            f"{entry}.cu",
            tuple(name for name, _ in self._entries(kind, few)),
            side.header(self.real, kind == "to_weight", few, self.rounded_to),
            ("TRANSPOSED=1",) if kind == "to_input" else (),
            description=self.description,
        )

    def _loaded(self, kind: str, device: torch.device, few: bool = False) -> tuple[Kernel, ...]:
        found = self._kernels.get((device, few))
        if found is None:
            # all at once, in parallel: a gradient may be wanted first while a graph is being captured
            loaded = load_all(self._programs(few), device, self.config)
            found = self._kernels[device, few] = {
                of: tuple(program.kernel(*entry) for entry in self._entries(of, few))
                for of, program in zip(KINDS, loaded, strict=False)
            }
            for sums in self._slices.values() if few else ():
                sums.load(device)
        return found[kind]

    def _entries(self, kind: str, few: bool) -> tuple[tuple[str, str], ...]:
        return OF_HALVES if not few and kind in self._halves else (ENTRIES[kind],)

    def _are_few(self, kind: str, rows: int, device: torch.device) -> bool:
        """Whether rows leave a device without work unless they are cut finely."""
        most = self._few_blocks.get(device)
        if most is None:
            most = self._few_blocks[device] = FEW_BLOCKS * multiprocessors(device)
        side = self._rows[kind, True]
        return rows // side.nodes * side.items <= most

    def rows(
        self, kind: str, x: torch.Tensor, w: torch.Tensor, sorted_rows: SortedRows
    ) -> torch.Tensor:
        """A matrix product for each row: the output of x, or the input's gradient of the output's."""
        rows = x.shape[0]
        few = self._are_few(kind, rows, x.device)
        if rows and not few and kind in self._halves:
            kernels = self._loaded(kind, x.device)
            return self._halves[kind].rows(kernels, aligned(x), w)
        side = self._rows[kind, few]
        blocks, slices = side.blocks(rows), 1
        if side.sliced and rows:
            slices = slices_of(blocks, side.steps, multiprocessors(x.device))
        shape = (rows, side.row) if slices == 1 else (slices, rows, side.row)
        out = (x.new_empty if side.whole else x.new_zeros)(shape)
        x, w = aligned(x), aligned(w)
        (kernel,) = self._loaded(kind, x.device, few)
        kernel((blocks, slices, 1), BLOCK, x, *sorted_rows, w, rows, out)
        return out if slices == 1 else self._slices[kind].sum(out)

    def weights(self, x: torch.Tensor, g: torch.Tensor, sorted_rows: SortedRows) -> torch.Tensor:
        """The gradient of the weights, flat."""
        rows, species = x.shape[0], max(1, self.paths.species)
        most = min(BLOCKS_FOR_SUMS // (self._tiles * species), PARTIAL_SUMS // self.paths.weights)
        slices = max(1, min(-(-rows // ROWS_OF_A_SLICE), most))
        sums = x.new_empty((slices, self.paths.weights))
        x, g = aligned(x), aligned(g)
        grid = (self._tiles * slices, species, 1)
        (kernel,) = self._loaded("to_weight", x.device)
        kernel(grid, BLOCK, x, g, *sorted_rows, rows, sums)
        return sums[0] if slices == 1 else sums.sum(0)


class OneCall(NamedTuple):
    """The kernels with the rows of one call; what `e3nn_accel.ops.weighted` differentiates with."""

    kernels: IndexedLinearKernels
    attrs: torch.Tensor | None = None
    by: NodesBySpecies | None = None

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """[rows, out]."""
        return self.kernels.rows("forward", x, w, self._sorted_rows())

    def to_input(self, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """[rows, in]."""
        return self.kernels.rows("to_input", g, w, self._sorted_rows())

    def to_weight(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """[weights]."""
        return self.kernels.weights(x, g, self._sorted_rows())

    def _sorted_rows(self) -> SortedRows:
        if self.by is None:
            return None, None, None
        return self.attrs, self.by.order, self.by.first
