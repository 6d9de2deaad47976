"""The kernels of a radial MLP's hidden layers: how they are cut, compiled and launched."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from e3nn_accel.availability import architecture_of
from e3nn_accel.backends.cuda.indexed_linear_layout import DEPTH, TILE
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.backends.cuda.tensor_product_plan import array, defines
from e3nn_accel.backends.torch.radial_mlp import run_layers
from e3nn_accel.compile import KernelProgram
from e3nn_accel.descriptor import RadialLayer
from e3nn_accel.launch import Kernel, load_all, multiprocessors
from e3nn_accel.plan import PlanContext

THREADS = 128
WIDEST, MOST_LAYERS = 128, 4
SLOPES = 128
"""Words of a thread's registers for slopes, at most."""
SHARED_OF = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
"""KiB of shared memory that a block may have, by compute capability."""
LEAST_SHARED, ON_THE_HOST = 99, 90
MULTIPROCESSOR, RESERVED = 228 * 1024, 1024
"""Bytes of shared memory of a large one, and those of each block that are the system's."""
FORWARD, INPUT, ALL, SECOND = "forward", "to_input", "to_all", "second"
GRADIENTS = {FORWARD: 0, INPUT: 1, ALL: 2, SECOND: 3}
SUFFIXES = {FORWARD: "", INPUT: "_input", ALL: "_weights", SECOND: "_second"}
ENTRIES = {
    FORWARD: ("radial_mlp", "PPPPPqP"),
    INPUT: ("radial_mlp_gradients", "PPPPPPqPP"),
    ALL: ("radial_mlp_gradients", "PPPPPPqPP"),
    SECOND: ("radial_mlp_second", "PPPPPPPqPPP"),
}
TOGETHER = (FORWARD, INPUT, ALL)
"""What is loaded at once; second derivatives when they are wanted."""
ROWS = 32
BLOCKS = {FORWARD: 5, INPUT: 3, ALL: 3, SECOND: 3}
"""Of narrow float32 layers: tests/gpu/time_radial_mlp.py found them on an H100, but for
second derivatives, which take the registers of those with dW."""
FEW_BLOCKS = 2
"""Of any others, by the registers that they take."""


class Cut(NamedTuple):
    """How a kernel is cut.

    Attributes:
        rows: Of a tile: its edges, and each of them twice for second derivatives.
        blocks: Of a multiprocessor: what registers are bounded by.
        shared: Bytes of a block.
    """

    rows: int
    blocks: int
    shared: int


def cut(widths: Sequence[int], bytes_each: int, kind: str) -> Cut:
    """Of hidden layers with these widths, the input's first; as radial_mlp.cu lays out its memory."""
    weights = sum(_up_to(a, DEPTH) * _up_to(b, TILE) for a, b in pairwise(widths))
    large = bytes_each == 8 or max(widths) > TILE
    most = FEW_BLOCKS if large else BLOCKS[kind]
    shared = (weights + ROWS * shared_of_a_row(widths, kind)) * bytes_each
    blocks = max(1, min(most, MULTIPROCESSOR // (shared + RESERVED)))
    return Cut(ROWS, blocks, shared)


def shared_of_a_row(widths: Sequence[int], kind: str) -> int:
    """Numbers that an edge has in shared memory: all activations, where weights want gradients, and the widest."""
    pitches = [_up_to(widths[0], 32), *(_up_to(w, TILE) for w in widths[1:])]
    return (sum(pitches[:-1]) if kind in (ALL, SECOND) else 0) + max(pitches)


def too_large(layers: Sequence[RadialLayer], context: PlanContext) -> str:
    """Why these hidden layers have no kernel of their own, if they have none."""
    widths = [layers[0].width_in, *(layer.width_out for layer in layers)]
    bytes_each = context.dtype.itemsize
    if len(layers) > MOST_LAYERS or max(widths) > WIDEST or 0 in widths:
        return f"{len(layers)} layers of up to {max(widths)}, the kernel goes to {MOST_LAYERS} of {WIDEST}"
    rows = cut(widths, bytes_each, INPUT).rows
    tiles = -(-max(widths) // TILE)
    if len(layers) * tiles * rows * TILE // THREADS * bytes_each // 4 > SLOPES:
        return "their slopes don't fit in registers"
    architecture = context.architecture or architecture_of(context.device) or ON_THE_HOST
    room = SHARED_OF.get(architecture, LEAST_SHARED) * 1024
    needed = max(cut(widths, bytes_each, kind).shared for kind in ENTRIES)
    return f"{needed} bytes of shared memory, there are {room}" if needed > room else ""


class RadialMlpKernels:
    """Kernels of hidden layers that aren't `too_large`, in one dtype."""

    def __init__(
        self, layers: Sequence[RadialLayer], description: str, context: PlanContext
    ) -> None:
        self.layers = layers
        self.widths = [layers[0].width_in, *(layer.width_out for layer in layers)]
        self.real, self.config, self.description = REAL[context.dtype], context.config, description
        self._cuts = {kind: cut(self.widths, context.dtype.itemsize, kind) for kind in ENTRIES}
        self._programs = {kind: self._program(kind) for kind in ENTRIES}
        self._kernels: dict[tuple[str, torch.device], Kernel] = {}

    def programs(self) -> tuple[KernelProgram, ...]:
        """What would be compiled."""
        return tuple(self._programs.values())

    def _program(self, kind: str) -> KernelProgram:
        entry, _ = ENTRIES[kind]
        name = f"radial_mlp{SUFFIXES[kind]}_{self.real}"
        return KernelProgram(
            name, "radial_mlp.cu", (entry,), self._header(kind), description=self.description
        )

    def _header(self, kind: str) -> str:
        """The text of ``plan.cuh``."""
        rows, blocks, shared = self._cuts[kind]
        sizes = {"HIDDEN": len(self.layers), "ROWS": rows, "BLOCKS": blocks, "SHARED": shared}
        lines = [
            f"#define REAL {self.real}",
            *defines({**sizes, "GRADIENTS": GRADIENTS[kind]}),
            array("int", "WIDTH", self.widths),
            array("REAL", "SCALE", [f"(REAL){layer.scale!r}" for layer in self.layers]),
            array("REAL", "GAIN", [f"(REAL){layer.gain!r}" for layer in self.layers]),
            "enum Activation { IDENTITY, SILU, TANH, RELU, SIGMOID };",
            array("Activation", "ACTIVATION", [layer.activation.upper() for layer in self.layers]),
        ]
        return "\n".join(lines) + "\n"

    def _kernel(self, kind: str, device: torch.device) -> Kernel:
        if (kind, device) not in self._kernels:
            # all at once, in parallel: a gradient may be wanted first while a graph is being captured
            kinds = TOGETHER if kind in TOGETHER else (kind,)
            loaded = load_all([self._programs[of] for of in kinds], device, self.config)
            for of, program in zip(kinds, loaded, strict=True):
                self._kernels[of, device] = program.kernel(*ENTRIES[of])
        return self._kernels[kind, device]

    def _grid(self, kind: str, edges: int, device: torch.device) -> tuple[int, int, int]:
        """As many blocks as run at a time, each with a share of the tiles."""
        rows, blocks, _ = self._cuts[kind]
        rows = rows // 2 if kind == SECOND else rows
        return min(-(-edges // rows), blocks * multiprocessors(device)), 1, 1

    def forward(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """The last activations, [edges, out]."""
        out = x.new_empty((x.shape[0], self.widths[-1]))
        self._kernel(FORWARD, x.device)(
            self._grid(FORWARD, x.shape[0], x.device), (THREADS, 1, 1),
            x, *_four(weights), x.shape[0], out, shared=self._cuts[FORWARD].shared,
        )  # fmt: skip
        return out

    def composed(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """The same in torch operations."""
        return run_layers(self.layers, x, weights)

    def backward(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        wanted: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of (x, *weights); None where not wanted."""
        kind = ALL if any(wanted[1:]) else INPUT
        grid = self._grid(kind, x.shape[0], x.device)
        dx = torch.empty_like(x) if wanted[0] else None
        count = sum(w.numel() for w in weights)
        sums = x.new_empty((grid[0], count)) if kind == ALL else None
        self._kernel(kind, x.device)(
            grid, (THREADS, 1, 1),
            g, x, *_four(weights), x.shape[0], dx, sums, shared=self._cuts[kind].shared,
        )  # fmt: skip
        return (dx, *_added(sums, weights, wanted[1:]))

    def second(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        h: torch.Tensor,
        weights: Sequence[torch.Tensor],
        wanted: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of <h, gradient by x> by (g, x, *weights); None where not wanted."""
        grid = self._grid(SECOND, x.shape[0], x.device)
        dg = torch.empty_like(g) if wanted[0] else None
        dx = torch.empty_like(x) if wanted[1] else None
        count = sum(w.numel() for w in weights)
        sums = x.new_empty((grid[0], count)) if any(wanted[2:]) else None
        self._kernel(SECOND, x.device)(
            grid, (THREADS, 1, 1),
            g, x, h, *_four(weights), x.shape[0], dg, dx, sums, shared=self._cuts[SECOND].shared,
        )  # fmt: skip
        return (dg, dx, *_added(sums, weights, wanted[2:]))


def _added(
    sums: torch.Tensor | None, weights: Sequence[torch.Tensor], wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients of weights, of what blocks [blocks, numbers] have of them."""
    if sums is None:
        return [None] * len(weights)
    parts = sums.sum(0).split([w.numel() for w in weights])  # zeros where there are no edges
    return [
        part.view_as(w) if want else None
        for part, w, want in zip(parts, weights, wanted, strict=True)
    ]


def _four(weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    return (*weights, *[None] * (MOST_LAYERS - len(weights)))


def _up_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
