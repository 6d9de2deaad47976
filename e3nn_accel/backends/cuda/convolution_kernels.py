"""The fused convolution's kernels as one object: forward, backward and second derivative.

Each kind has a program for every group of paths. Where rows can be moved whole
(`convolution_schedule.staged_schedule`) there is a staged program, too, which runs unless an operand
isn't aligned to 16 bytes: a view into other storage, say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e3nn_accel.availability import architecture_of
from e3nn_accel.backends.cuda.convolution_plan import Group, groups_of, header
from e3nn_accel.backends.cuda.convolution_schedule import (
    Kind,
    Schedule,
    schedule,
    shares,
    staged_schedule,
    sums_of_shares,
)
from e3nn_accel.backends.cuda.convolution_sums import Sums, sum_rows_program
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.backends.cuda.share_sums import ShareSums
from e3nn_accel.compile import KernelProgram
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.groupings import Neighbours
from e3nn_accel.irreps import dim_of
from e3nn_accel.launch import Kernel, load_all, multiprocessors
from e3nn_accel.plan import PlanContext

SIGNATURES = {
    "convolution_forward": "PPPPPPP",
    "convolution_backward": "PPPPPPPqPPP",
    "convolution_double": "PPPPPPPPPPqPPPP",
    "sum_by_sender": "PPPiP",
    "sum_rows": "PPPP",
}
Wanted = tuple[bool, bool, bool]
KINDS: tuple[Kind, ...] = ("forward", "backward", "double", "gather")
EVERY: Wanted = (True, True, True)
ALIGNMENT = 16


@dataclass(frozen=True)
class Variant:
    """One way to compute one thing.

    Attributes:
        kind: What is computed.
        wanted: Of a backward kernel, which of dx, dy, dw.
        staged: Rows are moved whole, through shared memory.
        atomics: dx is added up by float atomics, in any order.
    """

    kind: Kind
    wanted: Wanted = EVERY
    staged: bool = False
    atomics: bool = False


@dataclass(frozen=True)
class Part:
    """One group of paths, laid out for one kind of kernel."""

    number: int
    group: Group
    layout: Schedule
    program: KernelProgram


class FusedConvolution:
    """Kernels of one product in one dtype; `e3nn_accel.ops.convolution` differentiates with them."""

    def __init__(self, d: TensorProductDescriptor, context: PlanContext) -> None:
        self.d = d
        self.dtype, self.config = context.dtype, context.config
        self.real, self.bytes = REAL[context.dtype], context.dtype.itemsize
        self.architecture = context.architecture or architecture_of(context.device)
        self.groups = groups_of(d, self.bytes)
        self.dim1, self.dim2, self.dim_out = (
            dim_of(d.irreps_in1),
            dim_of(d.irreps_in2),
            dim_of(d.irreps_out),
        )
        self.all_outputs = sum(o[2] for g in self.groups for o in g.outputs) == self.dim_out
        self.all_inputs = (
            len(self.groups) == 1 and sum(i[2] for i in self.groups[0].inputs) == self.dim1
        )
        self.all_weights = all(p.has_weight and 0 not in p.path_shape for p in d.paths)
        # dy is written as it is where one block sums over all channels and components keep their places
        plain = len(self.groups) == 1 and self.groups[0].second == list(range(self.dim2))
        self.direct_second = plain and schedule(self.groups[0], "backward", self.bytes).chunks == 1
        self.staged = {
            kind: staged_schedule(d, self.groups, kind, self.bytes, self.architecture)
            for kind in KINDS
        }
        self._shares = ShareSums(self.dim_out, self.real, self.bytes, self.config)
        self._columns: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._kernels: dict[tuple[Variant, torch.device], tuple[tuple[Kernel, Part], ...]] = {}

    def programs(self) -> list[KernelProgram]:
        """What an energy and force call runs, for ``kernels warm`` and for checks without a GPU.

        A first layer's features are the elements': they want no gradient.
        """
        forward, backward = self.variant("forward"), self.variant("backward")
        first = self.variant("backward", (False, True, True))
        variants = forward, backward, first, Variant("gather", staged=backward.staged)
        parts = [part.program for variant in variants for part in self.parts(variant)]
        return [*parts, self._shares.program]

    def variant(
        self, kind: Kind, wanted: Wanted = EVERY, operands: tuple[torch.Tensor, ...] = ()
    ) -> Variant:
        """How to compute something of these operands."""
        staged = (
            self.staged[kind] is not None
            and (wanted[0] or wanted[2])
            and all(t.data_ptr() % ALIGNMENT == 0 for t in operands)
        )
        atomics = (
            not self.config.deterministic
            and staged
            and wanted[0]
            and kind in ("backward", "double")
            and not torch.are_deterministic_algorithms_enabled()
        )
        return Variant(kind, wanted, staged, atomics)

    def parts(self, variant: Variant) -> tuple[Part, ...]:
        """The groups as programs."""
        return tuple(self._part(variant, n, group) for n, group in enumerate(self.groups))

    def _part(self, variant: Variant, number: int, group: Group) -> Part:
        kind = variant.kind
        if variant.staged and kind == "gather":
            layout, program = sum_rows_program(self.dim1, self.real, self.bytes)
            return Part(number, group, layout, program)
        staged = self.staged[kind] if variant.staged else None
        layout = staged or schedule(group, kind, self.bytes)
        macros = [f"{kind.upper()}=1", *(["DX_BY_ATOMICS=1"] if variant.atomics else [])]
        by = ""
        if kind == "backward":
            letters = [x for x, want in zip("XYW", variant.wanted, strict=True) if want]
            macros += [f"WANT_{x}=1" for x in letters]
            by = "" if variant.wanted == EVERY else "_by_" + "".join(letters).lower()
        name = f"convolution_{kind}_{self.real}{by}" + ("_staged" if staged else "")
        return Part(
            number,
            group,
            layout,
            KernelProgram(
                name + (f"_{number}" if len(self.groups) > 1 else ""),
                "convolution_staged.cu" if staged else "convolution.cu",
                ("sum_by_sender" if kind == "gather" else f"convolution_{kind}",),
                header(self.d, group, layout, self.real),
                tuple(macros),
                description=str(self.d),
            ),
        )

    def kernels(self, variant: Variant, device: torch.device) -> tuple[tuple[Kernel, Part], ...]:
        """Compiled and loaded at their first use; the kernels of a variant compile in parallel."""
        key = (variant, device)
        if key not in self._kernels:
            parts = self.parts(variant)
            loaded = load_all([part.program for part in parts], device, self.config)
            names = [part.program.entries[0] for part in parts]
            self._kernels[key] = tuple(
                (program.kernel(name, SIGNATURES[name]), part)
                for program, part, name in zip(loaded, parts, names, strict=True)
            )
        return self._kernels[key]

    def second_columns(self, number: int, device: torch.device) -> torch.Tensor:
        """Which columns of the second input a group uses; copied to the device once, before any capture."""
        key = number, device
        if key not in self._columns:
            self._columns[key] = torch.tensor(self.groups[number].second, device=device)
        return self._columns[key]

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, graph: Neighbours
    ) -> torch.Tensor:
        """Out [nodes, dim_out]; every element written by the kernels, or zero-filled where no path leads."""
        variant = self.variant("forward", EVERY, (x, w))
        parts = self.kernels(variant, x.device)
        chunks = max(part.layout.chunks for _, part in parts)
        count = sums_of_shares(chunks, graph.nodes, multiprocessors(x.device))
        out = self._new_output(x, *([count] if count > 1 else []), graph.nodes)
        for kernel, part in parts:
            grid, block, shared = _launch(graph, part.layout)
            kernel(
                (*grid[:2], count), block, x, y, w, graph.by_receiver, graph.senders, graph.first_of_receiver,
                out, shared=shared,
            )  # fmt: skip
        return out if count == 1 else self._shares.sum(out)

    def backward(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        graph: Neighbours,
        wanted: Wanted,
        over_w: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """(dx, dy, dw), None where not wanted.

        With ``over_w`` a staged kernel writes dw over w: a row leaves from where it came in, by the one block
        that asked for it. The others read weights through the cache of what isn't written to.
        """
        if not any(wanted):
            return None, None, None
        variant = self.variant("backward", wanted, (x, w))
        sums = Sums(self, x, y, w, graph, variant, over_w)
        for kernel, part in self.kernels(variant, x.device):
            grid, block, shared = _launch(graph, part.layout)
            grid = (
                *grid[:2],
                shares(part.layout, graph.nodes, y.shape[0], multiprocessors(x.device)),
            )
            at = sums.of(part)
            kernel(
                grid, block, x, y, w, g, graph.by_receiver, graph.senders, graph.first_of_receiver,
                y.shape[0], at.dx_edge, at.dy, sums.dw, shared=shared,
            )  # fmt: skip
            sums.add(part, at)
        return sums.dx, sums.dy, sums.dw

    def double(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        hx: torch.Tensor,
        hy: torch.Tensor,
        hw: torch.Tensor,
        graph: Neighbours,
    ) -> tuple[torch.Tensor | None, ...]:
        """(dg, dx, dy, dw) of <hx, dx> + <hy, dy> + <hw, dw>."""
        variant = self.variant("double", EVERY, (x, w, hx, hw))
        sums = Sums(self, x, y, w, graph, variant)
        out = self._new_output(x, graph.nodes)
        for kernel, part in self.kernels(variant, x.device):
            grid, block, shared = _launch(graph, part.layout)
            at = sums.of(part)
            kernel(
                grid, block, x, y, w, g, hx, hy, hw, graph.by_receiver, graph.senders, graph.first_of_receiver,
                y.shape[0], out, at.dx_edge, at.dy, sums.dw, shared=shared,
            )  # fmt: skip
            sums.add(part, at)
        return out, sums.dx, sums.dy, sums.dw

    def _new_output(self, like: torch.Tensor, *leading: int) -> torch.Tensor:
        new = like.new_empty if self.all_outputs else like.new_zeros
        return new((*leading, self.dim_out))


def _launch(
    graph: Neighbours, layout: Schedule
) -> tuple[tuple[int, int, int], tuple[int, int, int], int]:
    return (graph.nodes, layout.chunks, 1), (layout.threads, 1, 1), layout.shared
