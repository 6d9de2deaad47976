"""Kernels of one contraction in one dtype: which there are, and how they are launched."""

from __future__ import annotations

from typing import Literal

import torch

from e3nn_accel.backends.cuda.contraction_code import MOST_LINES, header, lines_of
from e3nn_accel.backends.cuda.contraction_paths import Pass, Paths
from e3nn_accel.compile import KernelProgram
from e3nn_accel.groupings import NodesBySpecies
from e3nn_accel.launch import Kernel, load_all
from e3nn_accel.ops.contraction import Pair, Wanted
from e3nn_accel.plan import PlanContext

Kind = Literal["forward", "features", "weights"]
KINDS: tuple[Kind, ...] = ("forward", "features", "weights")
REAL = {torch.float32: ("float", 4), torch.float64: ("double", 8)}
SIGNATURES = {"forward": "PPPPPPqiP", "features": "PPPPPPPqiP", "weights": "PPPPPPiP"}
SHARED_BYTES = 46 * 1024
REGISTERS = 210
"""Of 255, those for numbers; the rest is for addresses, and monomials on their way."""
LEAST_ROWS = 8
NODES_A_SHARE = 16
"""Nodes of dw's partial sums, at least on average."""
PARTIAL_SUMS = 1 << 22
"""Numbers that they may take before they are added up."""
MOST_SHARES = 128


class FusedContraction:
    """`e3nn_accel.ops.contraction` differentiates with these."""

    def __init__(self, paths: Paths, context: PlanContext, description: str) -> None:
        self.paths, self.config, self.description = paths, context.config, description
        self.dtype = context.dtype
        self.real, self.bytes = REAL[context.dtype]
        self.tables = lines_of(paths) > MOST_LINES
        row = (paths.components | 1) * self.bytes
        self.threads = next((n for n in (128, 64, 32) if n * row <= SHARED_BYTES), 0)
        self._kernels: dict[tuple[Kind, bool, torch.device], Kernel] = {}

    def programs(self) -> list[KernelProgram]:
        """Values, first and second derivatives."""
        return [self.program(kind, tangent) for tangent in (False, True) for kind in KINDS]

    def passes(self, kind: Kind, tangent: bool) -> tuple[Pass, ...]:
        """So many polynomials at a time as leave registers for the rest.

        Second derivatives compute with pairs of numbers; of the sums only one of each pair is kept.
        """
        words, paths = self.bytes // 4, self.paths
        each = words * (2 if tangent else 1)
        sums = {"forward": paths.outputs, "features": paths.components + paths.outputs}
        left = REGISTERS - each * paths.components - words * sums.get(kind, 0)
        return paths.passes(max(LEAST_ROWS, left // each), extra=0 if kind == "features" else 1)

    def threads_of(self, kind: Kind) -> int:
        """Of a block; no more than channels where a thread keeps its channel."""
        channels = -(-self.paths.channels // 32) * 32
        return min(self.threads, channels) if kind == "weights" else self.threads

    def program(self, kind: Kind, tangent: bool) -> KernelProgram:
        """One kernel; ``tangent``: its derivative in a direction."""
        macros = [f"{kind.upper()}=1", *(["TANGENT=1"] if tangent else [])]
        passes = self.passes(kind, tangent)
        return KernelProgram(
            f"contraction_{kind}_{'tangent_' if tangent else ''}{self.real}",
            "contraction.cu",
            (f"contraction_{kind}",),
            header(self.paths, passes, self.threads_of(kind), self.real, self.tables),
            tuple(macros),
            description=self.description,
        )

    def kernels(
        self, kinds: tuple[Kind, ...], tangent: bool, device: torch.device
    ) -> tuple[Kernel, ...]:
        """Compiled and loaded at their first use, those that are asked for together in parallel."""
        missing = [kind for kind in kinds if (kind, tangent, device) not in self._kernels]
        if missing:
            programs = [self.program(kind, tangent) for kind in missing]
            for kind, loaded in zip(missing, load_all(programs, device, self.config), strict=True):
                found = loaded.kernel(f"contraction_{kind}", SIGNATURES[kind])
                self._kernels[kind, tangent, device] = found
        return tuple(self._kernels[kind, tangent, device] for kind in kinds)

    def forward(
        self, x: torch.Tensor, w: torch.Tensor, nodes: NodesBySpecies, h: Pair | None
    ) -> torch.Tensor:
        """Out [nodes, channels * outputs]; every element is written."""
        out = x.new_empty((len(x), self.paths.channels * self.paths.outputs))
        (kernel,) = self.kernels(("forward",), h is not None, x.device)
        hx, hw = h or (None, None)
        kernel(
            *self._columns(x), x, w, nodes.attrs, nodes.species, hx, hw, len(x), nodes.kinds, out
        )
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
        tangent = h is not None
        hx, hw = h or (None, None)
        dx = dw = None
        needed = tuple(kind for kind, want in zip(KINDS[1:], wanted, strict=True) if want)
        kernels = dict(zip(needed, self.kernels(needed, tangent, x.device), strict=True))
        if wanted[0]:
            dx = torch.empty_like(x)
            kernels["features"](
                *self._columns(x), x, w, nodes.attrs, nodes.species, hx, hw, g, len(x), nodes.kinds, dx
            )  # fmt: skip
        if wanted[1]:
            shares = 1 if nodes.attrs is None else self._shares(len(x), w)
            sums = w.new_empty((shares, *w.shape))
            threads = self.threads_of("weights")
            chunks = -(-self.paths.channels // threads)
            passes = len(self.paths.paths) if self.tables else len(self.passes("weights", tangent))
            kernels["weights"](
                (nodes.kinds * chunks, shares, passes), (threads, 1, 1),
                x, nodes.attrs, nodes.order, nodes.first, hx, g, nodes.kinds, sums,
            )  # fmt: skip
            dw = sums[0] if shares == 1 else sums.sum(0)
        return dx, dw

    def composed(self, x: torch.Tensor, w: torch.Tensor, nodes: NodesBySpecies) -> torch.Tensor:
        """The same in torch operations: for derivatives of the second ones."""
        own = w if nodes.attrs is None else (nodes.attrs @ w.flatten(1)).view(-1, *w.shape[1:])
        columns = x.reshape(-1, self.paths.components)
        one = torch.ones_like(columns[:, :1])
        terms = [t for path in self.paths.paths for t in path.components]
        monomials = list(dict.fromkeys(m for component in terms for m, _ in component))
        place = {m: n for n, m in enumerate(monomials)}
        matrix = torch.zeros((len(monomials), len(terms)), dtype=torch.float64)
        for row, component in enumerate(terms):
            for m, c in component:
                matrix[place[m], row] = c
        padding = [self.paths.components] * self.paths.degree
        index = torch.tensor([(*m, *padding)[: self.paths.degree] for m in monomials]).to(x.device)
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

    def _columns(self, x: torch.Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        blocks = -(-len(x) * self.paths.channels // self.threads)
        return (blocks, 1, 1), (self.threads, 1, 1)

    def _shares(self, nodes: int, w: torch.Tensor) -> int:
        """Blocks that share a species' nodes; all nodes may be of one species."""
        most = PARTIAL_SUMS // max(w.numel(), 1)
        return max(1, min(-(-nodes // NODES_A_SHARE), most, MOST_SHARES))
