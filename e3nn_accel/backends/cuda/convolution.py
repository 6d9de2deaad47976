"""The fused convolution's kernels as one object: forward, backward and second derivative."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e3nn_accel.backends.cuda.convolution_plan import Group, Schedule, groups_of, header, schedule
from e3nn_accel.compile import KernelProgram
from e3nn_accel.descriptor import ConvolutionDescriptor, TensorProductDescriptor, dim_of
from e3nn_accel.groupings import Neighbours, neighbours_of
from e3nn_accel.launch import Kernel, load_all
from e3nn_accel.ops.convolution import convolution, convolution_gradients
from e3nn_accel.plan import Plan, PlanContext

FILE = "convolution.cu"
REAL = {torch.float32: ("float", 4), torch.float64: ("double", 8)}
SIGNATURES = {
    "convolution_forward": "PPPPPPP",
    "convolution_backward": "PPPPPPPqPPP",
    "convolution_double": "PPPPPPPPPPqPPPP",
    "sum_by_sender": "PPPiP",
}
Wanted = tuple[bool, bool, bool]
NOTHING: Wanted = (False, False, False)


def refusal(descriptor: ConvolutionDescriptor) -> str:
    """Why there is no kernel for this product, or an empty string."""
    d = descriptor.product
    paths = [p for p in d.paths if 0 not in p.path_shape]
    modes = {p.mode for p in paths} - {"uvu"}
    if modes:
        return f"fused convolution is for uvu instructions, this product has {', '.join(sorted(modes))}"
    if d.shared_weights and any(p.has_weight for p in paths):
        return "the weights are shared by all edges, the kernels want a row for each"
    if not paths or any(not len(p.coupling.values) or p.path_weight == 0 for p in paths):
        return "a path contributes nothing"
    return ""


def plan(descriptor: ConvolutionDescriptor, context: PlanContext) -> Plan:
    """Kernels for one product; compiled at their first use."""
    kernels = FusedConvolution(descriptor.product, context)

    def run(
        x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, edge_index: torch.Tensor
    ) -> torch.Tensor:
        return convolution(x, y, w, neighbours_of(edge_index, x.shape[0]), kernels)

    def gradients(
        g: torch.Tensor, operands: tuple[torch.Tensor, ...], wanted: tuple[bool, ...]
    ) -> tuple[torch.Tensor, ...]:
        x, y, w, edge_index = operands
        of_tensors = (wanted[0], wanted[1], wanted[2])
        graph = neighbours_of(edge_index, x.shape[0])
        found = convolution_gradients(g, x, y, w, graph, kernels, of_tensors)
        return tuple(t for t in found if t is not None)

    count = len(kernels.groups)
    strategy = f"fused kernel, {sum(len(g.terms) for g in kernels.groups)} paths" + (
        f" in {count} parts" if count > 1 else ""
    )
    return Plan(
        "cuda",
        descriptor,
        strategy,
        run,
        tuple(kernels.programs(("forward", "backward", "gather"))),
        gradients,
    )


@dataclass(frozen=True)
class _Part:
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
        self.real, self.bytes = REAL[context.dtype]
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
        # dy is written as it is where one block sums over all channels and components keep their places
        plain = len(self.groups) == 1 and self.groups[0].second == list(range(self.dim2))
        self.direct_second = plain and schedule(self.groups[0], "backward", self.bytes).chunks == 1
        self._parts: dict[tuple[str, Wanted], tuple[_Part, ...]] = {}
        self._kernels: dict[tuple[str, Wanted, torch.device], tuple[tuple[Kernel, _Part], ...]] = {}
        self.all_weights = all(p.has_weight and 0 not in p.path_shape for p in d.paths)

    def programs(self, kinds: tuple[str, ...]) -> list[KernelProgram]:
        """What would be compiled, for ``kernels warm`` and for checks without a GPU."""
        return [part.program for kind in kinds for part in self.parts(kind, (True, True, True))]

    def parts(self, kind: str, wanted: Wanted) -> tuple[_Part, ...]:
        """The groups as programs of one kind: forward, backward, double or gather."""
        if (kind, wanted) not in self._parts:
            self._parts[kind, wanted] = self._make_parts(kind, wanted)
        return self._parts[kind, wanted]

    def _make_parts(self, kind: str, wanted: Wanted) -> tuple[_Part, ...]:
        macros = [f"{kind.upper()}=1"]
        if kind == "backward":
            macros += [f"WANT_{name}=1" for name, want in zip("XYW", wanted, strict=True) if want]
        entry = "sum_by_sender" if kind == "gather" else f"convolution_{kind}"
        parts = []
        for n, group in enumerate(self.groups):
            layout = schedule(group, "forward" if kind == "gather" else kind, self.bytes)
            text = header(self.d, group, layout, self.real)
            name = f"convolution_{kind}_{self.real}" + (f"_{n}" if len(self.groups) > 1 else "")
            program = KernelProgram(
                name, FILE, (entry,), text, tuple(macros), description=str(self.d)
            )
            parts.append(_Part(n, group, layout, program))
        return tuple(parts)

    def kernels(
        self, kind: str, wanted: Wanted, device: torch.device
    ) -> tuple[tuple[Kernel, _Part], ...]:
        """Compiled and loaded at their first use; the kernels of a kind compile in parallel."""
        key = (kind, wanted, device)
        if key not in self._kernels:
            self._kernels[key] = self._load(kind, wanted, device)
        return self._kernels[key]

    def _load(
        self, kind: str, wanted: Wanted, device: torch.device
    ) -> tuple[tuple[Kernel, _Part], ...]:
        parts = self.parts(kind, wanted)
        loaded = load_all([part.program for part in parts], device, self.config)
        names = [part.program.entries[0] for part in parts]
        return tuple(
            (program.kernel(name, SIGNATURES[name]), part)
            for program, part, name in zip(loaded, parts, names, strict=True)
        )

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, graph: Neighbours
    ) -> torch.Tensor:
        """Out [nodes, dim_out]; every element written by the kernels, or zero-filled where no path leads."""
        new = x.new_empty if self.all_outputs else x.new_zeros
        out = new((graph.nodes, self.dim_out))
        for kernel, part in self.kernels("forward", NOTHING, x.device):
            grid, block = _grid(graph, part.layout)
            kernel(
                grid, block, x, y, w, graph.by_receiver, graph.senders, graph.first_of_receiver, out
            )
        return out

    def backward(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        graph: Neighbours,
        wanted: Wanted,
    ) -> tuple[torch.Tensor | None, ...]:
        """(dx, dy, dw), None where not wanted."""
        if not any(wanted):
            return None, None, None
        sums = _Sums(self, x, y, w, graph, wanted)
        for kernel, part in self.kernels("backward", wanted, x.device):
            grid, block = _grid(graph, part.layout)
            at = sums.of(part)
            kernel(
                grid, block, x, y, w, g, graph.by_receiver, graph.senders, graph.first_of_receiver,
                len(y), at.dx_edge, at.dy, sums.dw,
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
        every = (True, True, True)
        sums = _Sums(self, x, y, w, graph, every)
        new = x.new_empty if self.all_outputs else x.new_zeros
        out = new((graph.nodes, self.dim_out))
        for kernel, part in self.kernels("double", every, x.device):
            grid, block = _grid(graph, part.layout)
            at = sums.of(part)
            kernel(
                grid, block, x, y, w, g, hx, hy, hw, graph.by_receiver, graph.senders, graph.first_of_receiver,
                len(y), out, at.dx_edge, at.dy, sums.dw,
            )  # fmt: skip
            sums.add(part, at)
        return out, sums.dx, sums.dy, sums.dw


@dataclass(frozen=True)
class _Partial:
    """What one group's kernel writes before it is summed: dx of each edge, dy of each chunk of channels."""

    dx_edge: torch.Tensor | None
    dy: torch.Tensor | None


class _Sums:
    """Gradients under construction, added up over groups in a fixed order."""

    def __init__(
        self,
        owner: FusedConvolution,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        graph: Neighbours,
        wanted: Wanted,
    ) -> None:
        self.owner, self.graph, self.like = owner, graph, y
        self.dx = (x.new_empty if owner.all_inputs else x.new_zeros)(x.shape) if wanted[0] else None
        self.dy = (
            (y.new_empty if owner.direct_second else y.new_zeros)(y.shape) if wanted[1] else None
        )
        self.dw = (
            (w.new_empty if owner.all_weights else w.new_zeros)(w.shape) if wanted[2] else None
        )

    def of(self, part: _Part) -> _Partial:
        """Buffers for one group; dy goes straight to the result where nothing is to be added."""
        edges = len(self.like)
        dx_edge = dy = None
        if self.dx is not None:
            dx_edge = self.like.new_empty((edges, sum(mul for _, _, mul in part.group.inputs)))
        if self.dy is not None:
            shape = (part.layout.chunks, edges, len(part.group.second))
            dy = self.dy if self.owner.direct_second else self.like.new_empty(shape)
        return _Partial(dx_edge, dy)

    def add(self, part: _Part, at: _Partial) -> None:
        """Sum dx over the edges of each sender, dy over chunks."""
        if self.dx is not None:
            kernel, gather = self.owner.kernels("gather", NOTHING, self.like.device)[part.number]
            grid, block = _grid(self.graph, gather.layout)
            kernel(
                grid, block, at.dx_edge, self.graph.by_sender, self.graph.first_of_sender,
                int(not self.owner.all_inputs), self.dx,
            )  # fmt: skip
        if self.dy is not None and at.dy is not None and at.dy is not self.dy:
            columns = torch.tensor(part.group.second, device=self.dy.device)
            self.dy.index_add_(1, columns, at.dy.sum(0))


def _grid(graph: Neighbours, layout: Schedule) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return (graph.nodes, layout.chunks, 1), (layout.threads, 1, 1)
