"""Launches the kernels of linears; of a species-indexed one, the device knows how much work there is."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch

from e3nn_accel.availability import architecture_of
from e3nn_accel.backends.cuda import linear_weights_in_halves, linear_weights_staged
from e3nn_accel.backends.cuda.indexed_linear_known import Run, run_of_kernel
from e3nn_accel.backends.cuda.indexed_linear_layout import SortedRows, rounded_to, slices_of
from e3nn_accel.backends.cuda.indexed_linear_rows import LaunchOfRows
from e3nn_accel.backends.cuda.indexed_linear_tables import HOPPER, LinearTables
from e3nn_accel.backends.cuda.linear_in_halves import LinearInHalves, least_rows
from e3nn_accel.backends.cuda.linear_in_halves_launch import run_of_rows
from e3nn_accel.backends.cuda.matrix_paths import MatrixPaths
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.backends.cuda.share_sums import ShareSums
from e3nn_accel.backends.cuda.tensor_product_plan import PARTIAL_SUMS
from e3nn_accel.backends.cuda.weight_blocks import WeightBlocks
from e3nn_accel.compile import KernelProgram
from e3nn_accel.launch import Kernel, aligned, load_all, multiprocessors
from e3nn_accel.layout import flat
from e3nn_accel.new_memory import new_rows
from e3nn_accel.ops.weighted import KINDS
from e3nn_accel.plan import PlanContext

ALIKE: SortedRows = (None, None, None)
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
STAGED = ("linear_staged", "PPPPPqP")
MOST_LAUNCHES = 256
"""That are remembered: edges come and go, and with them rows."""
Way = Literal["few", "many", "halves"]
"""How rows are taken: cut finely; in larger tiles; in these by halves, where a side has kernels for that."""


class _Launch(NamedTuple):
    """What rows of one shape are launched with on a device.

    Attributes:
        halves: The kernels that cut numbers into halves, where they take the rows.
        kernels: Loaded.
        blocks, slices: Of rows, and of sums.
        shape: Of the result, those of each slice after the other.
        whole: Whether all of it is written.
        block, shared: Threads, and bytes of dynamic shared memory.
    """

    halves: LinearInHalves | None
    kernels: tuple[Kernel, ...]
    blocks: int
    slices: int
    shape: tuple[int, int]
    whole: bool
    block: tuple[int, int, int] = (128, 1, 1)
    shared: int = 0


class IndexedLinearKernels:
    """Kernels of one product or linear in one dtype."""

    def __init__(self, paths: MatrixPaths, description: str, context: PlanContext) -> None:
        self.paths = paths
        self.real, self.config, self.description = REAL[context.dtype], context.config, description
        self.rounded_to = rounded_to(context)
        self.sides = {"forward": paths, "to_input": paths.turned}
        architecture = context.architecture or architecture_of(context.device)
        self._tables = {
            (kind, few): LinearTables(side, self.real, few=few, architecture=architecture)
            for kind, side in self.sides.items()
            for few in (False, True)
        }
        self._rows = {which: LaunchOfRows.of(tables) for which, tables in self._tables.items()}
        self._tiles = len(paths.weight_items())
        self._of_dw = of_weights = LinearTables(paths, self.real, of_weights=True)
        self._block, self._shared = (of_weights.layout.threads, 1, 1), of_weights.shared
        halved = self.real == "float" and not self.rounded_to
        self._halves = {
            kind: LinearInHalves(side, architecture)
            for kind, side in self.sides.items()
            if halved and LinearInHalves.takes(side, architecture)
        }
        self._blocks_of_weights = self._weights_of_many(architecture)
        self._slices = {
            kind: ShareSums(side.out_row, self.real, context.dtype.itemsize, context.config)
            for kind, side in self.sides.items()
            if self._tables[kind, True].sliced
        }
        # of a single matrix all that aren't few are taken by halves, if any are
        self._ways: list[Way] = ["many"] if paths.species or not self._halves else []
        self._ways += ["halves", "few"] if self._halves else ["few"]
        self._least_in_halves = least_rows(paths.species)
        self._kernels: dict[tuple[torch.device, Way], dict[str, tuple[Kernel, ...]]] = {}
        self._launches: dict[tuple[str, torch.Size, torch.Size, torch.device], _Launch] = {}
        self._known: dict[int, Run] = {}  # of outputs, by rows: a plan has one device

    def _weights_of_many(self, architecture: int) -> WeightBlocks | None:
        if self._halves and linear_weights_in_halves.takes(self.paths, architecture):
            return linear_weights_in_halves.weights_in_halves(self.paths)
        if self.real == "double" and linear_weights_staged.takes(self.paths, architecture):
            return linear_weights_staged.weights_staged(self.paths)
        return None

    def _blocks_in(self, way: Way) -> WeightBlocks | None:
        """The kernels of blocks that have a tile of weights each, if those of this way have them."""
        return self._blocks_of_weights if way == ("halves" if self._halves else "many") else None

    def programs(self) -> tuple[KernelProgram, ...]:
        """What would be compiled, for many rows and for few."""
        return tuple(dict.fromkeys(one for way in self._ways for one in self._programs(way)))

    def _programs(self, way: Way) -> list[KernelProgram]:
        """One of each of `KINDS`, and for few rows those that add up slices."""
        found = [self._program(kind, way) for kind in KINDS]
        return [*found, *(sums.program for sums in self._slices.values() if way == "few")]

    def _program(self, kind: str, way: Way) -> KernelProgram:
        if way == "halves" and kind in self._halves:
            suffix = "_input" if kind == "to_input" else ""
            return self._halves[kind].program(suffix, self.description)
        blocks = self._blocks_in(way)
        if kind == "to_weight" and blocks is not None:
            return blocks.program(self.description, HOPPER)
        few = way == "few" and kind in self.sides
        tables = self._tables.get((kind, few), self._of_dw)
        entry, _ = self._entry(kind, tables)
        side = self.sides.get(kind, self.paths)
        suffix = ("_input" if kind == "to_input" else "") + ("_few" if few else "")
        real = "_".join(filter(None, (self.real, self.rounded_to)))
        return KernelProgram(
            f"{entry if side.species else entry.removeprefix('indexed_')}{suffix}_{real}",
            f"{entry}.cu",
            (entry,),
            tables.header(self.rounded_to),
            ("TRANSPOSED=1",) if kind == "to_input" else (),
            description=self.description,
            features_of=HOPPER if tables.staged else 0,
        )

    def _loaded(self, kind: str, device: torch.device, way: Way) -> tuple[Kernel, ...]:
        found = self._kernels.get((device, way))
        if found is None:
            # all at once, in parallel: a gradient may be wanted first while a graph is being captured
            loaded = load_all(self._programs(way), device, self.config)
            found = self._kernels[device, way] = {
                of: tuple(program.kernel(*entry) for entry in self._entries(of, way))
                for of, program in zip(KINDS, loaded, strict=False)
            }
            for sums in self._slices.values() if way == "few" else ():
                sums.load(device)
        return found[kind]

    def _entries(self, kind: str, way: Way) -> tuple[tuple[str, str], ...]:
        if way == "halves" and kind in self._halves:
            return self._halves[kind].entries
        blocks = self._blocks_in(way)
        if kind == "to_weight" and blocks is not None:
            return blocks.entries
        return (self._entry(kind, self._tables.get((kind, way == "few"), self._of_dw)),)

    @staticmethod
    def _entry(kind: str, tables: LinearTables) -> tuple[str, str]:
        return STAGED if tables.staged else ENTRIES[kind]

    def _of_weights(self, device: torch.device) -> Kernel:
        """The same whichever way rows are taken, but for blocks of weights: of those that are loaded, if any are."""
        ways = [way for way in self._ways if self._blocks_in(way) is None]
        for way in ways:
            found = self._kernels.get((device, way))
            if found is not None:
                return found["to_weight"][0]
        return self._loaded("to_weight", device, ways[0])[0]

    def _way(self, rows: int, processors: int, fine: LaunchOfRows) -> Way:
        # few leave a device without work unless they are cut finely
        if not rows or rows // fine.nodes * fine.items <= FEW_BLOCKS * processors:
            return "few"
        return "halves" if self._halves and rows >= self._least_in_halves else "many"

    def _launch_of(
        self, kind: str, shape: torch.Size, weights: torch.Size, device: torch.device
    ) -> _Launch:
        """Found once for each shape: a small system's time is the host's."""
        rows, processors = shape[0], multiprocessors(device)
        side = self.sides[kind]
        if tuple(shape) != (rows, side.in_row) or tuple(weights) != (self.paths.weights,):
            raise ValueError(
                f"{kind} of {tuple(shape)}, weights {tuple(weights)}: {self.description}"
            )
        way = self._way(rows, processors, self._rows[kind, True])
        kernels = self._loaded(kind, device, way)
        halves = self._halves.get(kind) if way == "halves" else None
        if halves is not None:
            return _Launch(
                halves, kernels, halves.blocks(rows, processors), 1, (rows, side.out_row), True
            )
        cut = self._rows[kind, way == "few"]
        blocks, slices = cut.blocks(rows), 1
        if cut.sliced and rows:
            slices = slices_of(blocks, cut.steps, processors)
        shape_of_all = (slices * rows, cut.row)
        return _Launch(
            None, kernels, blocks, slices, shape_of_all, cut.whole, cut.block, cut.shared
        )

    def rows(
        self, kind: str, x: torch.Tensor, w: torch.Tensor, sorted_rows: SortedRows
    ) -> torch.Tensor:
        """A matrix product for each row: the output of x, or the input's gradient of the output's."""
        key = (kind, x.shape, w.shape, x.device)
        launch = self._launches.get(key)
        if launch is None:
            if len(self._launches) >= MOST_LAUNCHES:
                self._launches.clear()
            launch = self._launches[key] = self._launch_of(*key)
        return self._launched(kind, launch, x, w, sorted_rows)

    def known_rows(self, x: torch.Tensor, w: torch.Tensor, sorted_rows: SortedRows) -> torch.Tensor:
        """The output of x as by `rows`, of shapes and a device that it had before, but for the number of rows.

        All are in one piece, the weights in any shape.
        """
        run = self._known.get(x.shape[0])
        if run is None:
            if len(self._known) >= MOST_LAUNCHES:
                self._known.clear()
            run = self._known[x.shape[0]] = self._run_of(x, w)
        return run(x, w, sorted_rows)

    def _run_of(self, x: torch.Tensor, w: torch.Tensor) -> Run:
        launch = self._launch_of("forward", x.shape, flat(w).shape, x.device)
        halves, kernels, blocks, slices, shape, whole, block, shared = launch
        if halves is not None:
            return run_of_rows(halves, kernels, x.shape[0], x.device)
        run = partial(self._launched, "forward", launch)
        if slices > 1 or not whole:
            return run
        return run_of_kernel(kernels[0], (blocks, 1, 1), block, shared, shape, x, run)

    def _launched(
        self, kind: str, launch: _Launch, x: torch.Tensor, w: torch.Tensor, sorted_rows: SortedRows
    ) -> torch.Tensor:
        halves, kernels, blocks, slices, shape, whole, block, shared = launch
        if halves is not None:
            return halves.rows(kernels, blocks, aligned(x), w, sorted_rows)
        rows, columns = shape
        out = new_rows(x, rows, columns) if whole else x.new_zeros(shape)
        kernels[0](
            (blocks, slices, 1), block, aligned(x), *sorted_rows, aligned(w),
            x.shape[0], out, shared=shared,
        )  # fmt: skip
        return out if slices == 1 else self._slices[kind].sum(out.view(slices, x.shape[0], columns))

    def weights(self, x: torch.Tensor, g: torch.Tensor, sorted_rows: SortedRows) -> torch.Tensor:
        """The gradient of the weights, flat."""
        rows, species = x.shape[0], max(1, self.paths.species)
        processors = multiprocessors(x.device)
        way = self._way(rows, processors, self._rows["forward", True])
        blocks = self._blocks_in(way)
        if blocks is not None:
            kernels = self._loaded("to_weight", x.device, way)
            return blocks.weights(kernels, x, g, processors)
        most = min(BLOCKS_FOR_SUMS // (self._tiles * species), PARTIAL_SUMS // self.paths.weights)
        slices = max(1, min(-(-rows // ROWS_OF_A_SLICE), most))
        sums = x.new_empty((slices, self.paths.weights))
        x, g = aligned(x), aligned(g)
        grid = (self._tiles * slices, species, 1)
        kernel = self._of_weights(x.device)
        kernel(grid, self._block, x, g, *sorted_rows, rows, sums, shared=self._shared)
        return sums[0] if slices == 1 else sums.sum(0)


class OneCall(NamedTuple):
    """The kernels with the rows of one call; what `e3nn_accel.ops.weighted` differentiates with."""

    kernels: IndexedLinearKernels
    sorted_rows: SortedRows = ALIKE

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """[rows, out]."""
        return self.kernels.rows("forward", x, w, self.sorted_rows)

    def to_input(self, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """[rows, in]."""
        return self.kernels.rows("to_input", g, w, self.sorted_rows)

    def to_weight(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """[weights]."""
        return self.kernels.weights(x, g, self.sorted_rows)
