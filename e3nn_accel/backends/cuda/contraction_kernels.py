"""Kernels of one contraction in one dtype: which there are, and how they are launched."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from e3nn_accel.backends.cuda.contraction_code import MOST_LINES, header, lines_of
from e3nn_accel.backends.cuda.contraction_paths import Pass, Paths
from e3nn_accel.backends.cuda.contraction_schedule import (
    Choice,
    Kind,
    Layout,
    Schedule,
    chosen,
    nodes_each,
)
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.compile import KernelProgram
from e3nn_accel.groupings import NodesBySpecies
from e3nn_accel.launch import Dimensions, Kernel, aligned, load_all, multiprocessors
from e3nn_accel.new_memory import new_rows
from e3nn_accel.ops.contraction import Pair, Wanted
from e3nn_accel.plan import PlanContext

KINDS: tuple[Kind, ...] = ("forward", "features", "weights")
SIGNATURES = {"forward": "PPPPPPPqiiP", "features": "PPPPPPPPqiiP", "weights": "PPPPPPiP"}
NODES_A_SHARE = 16
"""Nodes of dw's partial sums, at least on average."""
PARTIAL_SUMS = 1 << 22
"""Numbers that they may take before they are added up."""
MOST_SHARES = 128
MOST_GRIDS = 256
"""That are remembered, by numbers of nodes: a small system's time is the host's."""


@dataclass(frozen=True)
class Launch:
    """A kernel on one device, and all that a launch needs to know."""

    kernel: Kernel
    schedule: Schedule
    layout: Layout
    passes: int
    multiprocessors: int
    _grids: dict[int, tuple[Dimensions, int]] = field(default_factory=dict)

    @cached_property
    def block(self) -> Dimensions:
        """Threads of a block."""
        return self.layout.threads, 1, 1

    def grid_of(self, nodes: int) -> tuple[Dimensions, int]:
        """Blocks where a thread owns a channel of some nodes, and of how many one after the other."""
        found = self._grids.get(nodes)
        if found is None:
            if len(self._grids) >= MOST_GRIDS:
                self._grids.clear()
            found = self._grids[nodes] = self._grid_of(nodes)
        return found

    def _grid_of(self, nodes: int) -> tuple[Dimensions, int]:
        group, chunks = self.layout.group, self.layout.chunks
        each = nodes_each(self.schedule, -(-nodes // group) * chunks, self.multiprocessors)
        return (-(-nodes // (group * each)), chunks, 1), each


class FusedContraction:
    """`e3nn_accel.ops.contraction` differentiates with these."""

    def __init__(
        self, paths: Paths, context: PlanContext, description: str, choice: Choice | None = None
    ) -> None:
        self.paths, self.config, self.description = paths, context.config, description
        self.dtype = context.dtype
        self.real, self.bytes = REAL[context.dtype], context.dtype.itemsize
        self.tables = lines_of(paths) > MOST_LINES
        if self.tables:
            self.paths = paths.expanded()
        self.choice = choice or chosen
        self._out_row = self.paths.channels * self.paths.outputs
        self._launches: dict[tuple[Kind, bool, torch.device], Launch] = {}

    def programs(self) -> list[KernelProgram]:
        """Values, first and second derivatives."""
        return [self.program(kind, tangent) for tangent in (False, True) for kind in KINDS]

    def passes(self, kind: Kind, tangent: bool) -> tuple[Pass, ...]:
        """So many paths at a time as leave registers for the rest.

        Second derivatives compute with pairs of numbers; of the sums only one of each pair is kept.
        """
        words, paths = self.bytes // 4, self.paths
        each = words * (2 if tangent else 1)
        sums = {"forward": paths.outputs, "features": paths.components + paths.outputs}
        room = self.choice(kind, tangent, self.bytes, paths.outputs).registers
        room -= each * paths.components + words * sums.get(kind, paths.outputs)
        return paths.passes(room, each, each * (2 if kind == "features" else 1))

    def layout(self, kind: Kind, tangent: bool) -> tuple[Schedule, Layout]:
        """A kernel's, as chosen."""
        schedule = self.choice(kind, tangent, self.bytes, self.paths.outputs)
        return schedule, Layout.of(schedule, self.paths.channels, kind != "weights")

    def program(self, kind: Kind, tangent: bool) -> KernelProgram:
        """One kernel; ``tangent``: its derivative in a direction."""
        macros = [f"{kind.upper()}=1", *(["TANGENT=1"] if tangent else [])]
        passes = self.passes(kind, tangent)
        return KernelProgram(
            f"contraction_{kind}_{'tangent_' if tangent else ''}{self.real}",
            "contraction.cu",
            (f"contraction_{kind}",),
            header(self.paths, passes, *self.layout(kind, tangent), self.real, self.tables),
            tuple(macros),
            description=self.description,
        )

    def launches(
        self, kinds: tuple[Kind, ...], tangent: bool, device: torch.device
    ) -> tuple[Launch, ...]:
        """Compiled and loaded at their first use, those that are asked for together in parallel."""
        missing = [kind for kind in kinds if (kind, tangent, device) not in self._launches]
        if missing:
            programs = [self.program(kind, tangent) for kind in missing]
            for kind, loaded in zip(missing, load_all(programs, device, self.config), strict=True):
                kernel = loaded.kernel(f"contraction_{kind}", SIGNATURES[kind])
                passes = len(self.paths.paths) if self.tables else len(self.passes(kind, tangent))
                launch = Launch(
                    kernel, *self.layout(kind, tangent), passes, multiprocessors(device)
                )
                self._launches[kind, tangent, device] = launch
        return tuple(self._launches[kind, tangent, device] for kind in kinds)

    def forward(
        self, x: torch.Tensor, w: torch.Tensor, nodes: NodesBySpecies, h: Pair | None
    ) -> torch.Tensor:
        """Out [nodes, channels * outputs]; every element is written."""
        count, tangent = x.shape[0], h is not None
        out = new_rows(x, count, self._out_row)
        launch = self._launches.get(("forward", tangent, x.device))
        if launch is None:
            (launch,) = self.launches(("forward",), tangent, x.device)
        hx, hw = h or (None, None)
        grid, each = launch.grid_of(count)
        launch.kernel(
            grid, launch.block, aligned(x), w, nodes.attrs, nodes.species, nodes.order,
            hx if hx is None else aligned(hx), hw, count, nodes.kinds, each, out,
        )  # fmt: skip
        return out

    def backward(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        w: torch.Tensor,
        nodes: NodesBySpecies,
        wanted: Wanted,
        h: Pair | None,
    ) -> Pair:
        """(dx, dw), None where not wanted."""
        hx, hw = h or (None, None)
        hx, x, count = hx if hx is None else aligned(hx), aligned(x), x.shape[0]
        dx = dw = None
        needed = tuple(kind for kind, want in zip(KINDS[1:], wanted, strict=True) if want)
        launches = iter(self.launches(needed, h is not None, x.device))
        if wanted[0]:
            dx, launch = torch.empty_like(x), next(launches)
            grid, each = launch.grid_of(count)
            launch.kernel(
                grid, launch.block, x, w, nodes.attrs, nodes.species, nodes.order,
                hx, hw, g, count, nodes.kinds, each, dx,
            )  # fmt: skip
        if wanted[1]:
            launch = next(launches)
            shares = 1 if nodes.attrs is None else self._shares(count, w)
            sums = w.new_empty((shares, *w.shape))
            launch.kernel(
                (nodes.kinds * launch.layout.chunks, shares, launch.passes), launch.block,
                x, nodes.attrs, nodes.order, nodes.first, hx, g, nodes.kinds, sums,
            )  # fmt: skip
            dw = sums[0] if shares == 1 else sums.sum(0)
        return dx, dw

    def composed(self, x: torch.Tensor, w: torch.Tensor, nodes: NodesBySpecies) -> torch.Tensor:
        """The same in torch operations: for derivatives of the second ones."""
        expanded = self.paths.expanded()
        own = w if nodes.attrs is None else (nodes.attrs @ w.flatten(1)).view(-1, *w.shape[1:])
        columns = x.reshape(-1, self.paths.components)
        one = torch.ones_like(columns[:, :1])
        terms = [t for path in expanded.paths for t in path.components]
        monomials = list(dict.fromkeys(m for component in terms for m, _ in component))
        place = {m: n for n, m in enumerate(monomials)}
        matrix = torch.zeros((len(monomials), len(terms)), dtype=torch.float64)
        for row, component in enumerate(terms):
            for m, c in component:
                matrix[place[m], row] = c
        padding = [self.paths.components] * expanded.degree
        index = torch.tensor([(*m, *padding)[: expanded.degree] for m in monomials]).to(x.device)
        values = torch.cat([columns, one], 1)
        product = values[:, index[:, 0]]
        for factor in index.T[1:]:
            product = product * values[:, factor]
        polynomials = (product @ matrix.to(x)).view(len(x), self.paths.channels, len(terms))
        weight = [path.weight for path in self.paths.paths for _ in range(path.width)]
        out = [path.out + m for path in self.paths.paths for m in range(path.width)]
        weighted = polynomials * own[:, weight].transpose(1, 2)
        into = torch.tensor(out, device=x.device)
        sums = x.new_zeros((len(x), self.paths.channels, self.paths.outputs))
        sums = sums.index_add(2, into, weighted)
        return torch.cat([part.flatten(1) for part in sums.split(self.paths.widths, 2)], 1)

    def _shares(self, nodes: int, w: torch.Tensor) -> int:
        """Blocks that share a species' nodes; all nodes may be of one species."""
        most = PARTIAL_SUMS // max(w.numel(), 1)
        return max(1, min(-(-nodes // NODES_A_SHARE), most, MOST_SHARES))
