"""What the convolution's kernels leave to be summed: dx over edges, dy over chunks of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from e3nn_accel.backends.cuda.convolution_schedule import Schedule
from e3nn_accel.compile import KernelProgram
from e3nn_accel.groupings import Neighbours

if TYPE_CHECKING:
    from e3nn_accel.backends.cuda.convolution_kernels import FusedConvolution, Part, Variant


@dataclass(frozen=True)
class Partial:
    """What one group's kernel writes before it is summed.

    Attributes:
        dx_edge: dx of each edge; dx itself where the kernel adds it up by atomics.
        dy: dy of each chunk of channels; dy itself where nothing is to be added.
    """

    dx_edge: torch.Tensor | None
    dy: torch.Tensor | None


class Sums:
    """Gradients under construction, added up over groups in a fixed order."""

    def __init__(
        self,
        owner: FusedConvolution,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        graph: Neighbours,
        variant: Variant,
        over_w: bool = False,
    ) -> None:
        self.owner, self.graph, self.variant, self.like = owner, graph, variant, y
        written = owner.all_inputs and not variant.atomics
        want_x, want_y, want_w = variant.wanted
        self.dx = (x.new_empty if written else x.new_zeros)(x.shape) if want_x else None
        self.dy = (y.new_empty if owner.direct_second else y.new_zeros)(y.shape) if want_y else None
        self.dw = None
        if want_w and over_w and variant.staged and owner.all_weights:
            self.dw = w
        elif want_w:
            self.dw = (w.new_empty if owner.all_weights else w.new_zeros)(w.shape)

    def of(self, part: Part) -> Partial:
        """Buffers for one group."""
        edges = self.like.shape[0]
        dx_edge, dy = self.dx, self.dy
        if self.dx is not None and not self.variant.atomics:
            dx_edge = self.like.new_empty((edges, sum(mul for _, _, mul in part.group.inputs)))
        if self.dy is not None and not self.owner.direct_second:
            dy = self.like.new_empty((part.layout.chunks, edges, len(part.group.second)))
        return Partial(dx_edge, dy)

    def add(self, part: Part, at: Partial) -> None:
        """Sum dx over the edges of each sender, dy over chunks."""
        if self.dx is not None and at.dx_edge is not self.dx:
            self._add_rows(part, at.dx_edge)
        if self.dy is not None and at.dy is not None and at.dy is not self.dy:
            columns = self.owner.second_columns(part.number, self.dy.device)
            self.dy.index_add_(1, columns, at.dy.sum(0))

    def _add_rows(self, part: Part, dx_edge: torch.Tensor | None) -> None:
        graph, staged = self.graph, self.variant.staged
        gather = type(self.variant)("gather", staged=staged)
        kernel, by_sender = self.owner.kernels(gather, self.like.device)[part.number]
        layout = by_sender.layout
        grid, block = (graph.nodes, layout.chunks, 1), (layout.threads, 1, 1)
        rows = dx_edge, graph.by_sender, graph.first_of_sender
        if staged:
            kernel(grid, block, *rows, self.dx)
        else:
            kernel(grid, block, *rows, int(not self.owner.all_inputs), self.dx)


def sum_rows_program(row: int, real: str, real_bytes: int) -> tuple[Schedule, KernelProgram]:
    """The kernel that sums rows of ``row`` numbers by sender, a thread for each 16 bytes.

    256 threads were fastest for rows of 128 to 1152 numbers on an H100, by 1 to 5 %.
    """
    vector = 16 // real_bytes
    pieces = row // vector
    threads = min(256, -(-pieces // 32) * 32)
    sizes = {"REAL": real, "THREADS": threads, "ROW": row, "VECTOR": vector}
    header = "".join(f"#define {name} {value}\n" for name, value in sizes.items())
    program = KernelProgram(
        f"sum_rows_{real}",
        "sum_rows.cu",
        ("sum_rows",),
        header,
        description=f"rows of {row} numbers summed by sender",
    )
    return Schedule(threads, -(-pieces // threads), 1, 1), program
