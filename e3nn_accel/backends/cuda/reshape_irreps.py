"""MACE's reshape_irreps: a plan of one launch forward and one backward."""

from __future__ import annotations

from itertools import accumulate

import torch

from e3nn_accel.backends.cuda.entries import Entries
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.backends.cuda.tensor_product_plan import array, defines
from e3nn_accel.compile import KernelProgram
from e3nn_accel.descriptor import ReshapeDescriptor
from e3nn_accel.ops.reordering import reordered
from e3nn_accel.plan import Plan, PlanContext, Refusal

SIGNATURES = {"reshape_irreps": "PP", "reshape_irreps_back": "PP"}
THREADS = 256
SHARED = 16 * 1024
"""Bytes of a block at most: enough for 128 channels up to l = 3 in float64, and many blocks at a time."""


def plan(d: ReshapeDescriptor, context: PlanContext) -> Plan | Refusal:
    """Kernels for these irreps, compiled at their first use; or why there are none."""
    most = SHARED // (d.columns * context.dtype.itemsize)
    if most < 1:
        return Refusal("cuda", f"{d.columns} components of a channel don't fit in shared memory")
    kernels = ReshapeKernels(d, min(d.mul, most), context)

    def run(x: torch.Tensor) -> torch.Tensor:
        return reordered(kernels, x)

    def gradients(
        g: torch.Tensor, operands: tuple[torch.Tensor, ...], wanted: tuple[bool, ...]
    ) -> tuple[torch.Tensor, ...]:
        return (reordered(kernels, g, back=True),)

    return Plan("cuda", d, "one kernel", run, (kernels.program,), gradients)


class ReshapeKernels:
    """`e3nn_accel.ops.reordering` moves numbers by these."""

    def __init__(self, d: ReshapeDescriptor, channels: int, context: PlanContext) -> None:
        self.mul, self.columns = d.mul, d.columns
        self.blocks = -(-d.mul // channels)
        real = REAL[context.dtype]
        sizes = {
            "MUL": d.mul,
            "COLUMNS": d.columns,
            "IRREPS": len(d.dims),
            "CHANNELS": channels,
            "THREADS": THREADS,
        }
        lines = [
            f"#define REAL {real}",
            *defines(sizes),
            array("int", "DIM", list(d.dims)),
            array("int", "FIRST", list(accumulate(d.dims[:-1], initial=0))),
        ]
        self.program = KernelProgram(
            f"reshape_irreps_{real}",
            "reshape_irreps.cu",
            tuple(SIGNATURES),
            "\n".join(lines) + "\n",
            description=str(d),
        )
        self._entries = Entries(self.program, SIGNATURES, context.config)

    def there(self, x: torch.Tensor) -> torch.Tensor:
        """[nodes, channels, components] of [nodes, irreps]."""
        out = x.new_empty((x.shape[0], self.mul, self.columns))
        self._launch("reshape_irreps", x, out)
        return out

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """[nodes, irreps] of [nodes, channels, components]."""
        out = x.new_empty((x.shape[0], self.mul * self.columns))
        self._launch("reshape_irreps_back", x, out)
        return out

    def _launch(self, entry: str, x: torch.Tensor, out: torch.Tensor) -> None:
        grid, block = (x.shape[0] * self.blocks, 1, 1), (THREADS, 1, 1)
        self._entries.on(x.device)[entry](grid, block, x, out)
