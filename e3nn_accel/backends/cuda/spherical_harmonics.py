"""Spherical harmonics: a plan of one launch forward, one backward, and one for each second derivative."""

from __future__ import annotations

from itertools import accumulate

import torch

from e3nn_accel.backends.cuda.entries import Entries
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.backends.torch.spherical_harmonics import harmonics, norm
from e3nn_accel.compile import KernelProgram
from e3nn_accel.descriptor import SphericalHarmonicsDescriptor
from e3nn_accel.ops.rows import Pair, row_function, row_gradient
from e3nn_accel.plan import Plan, PlanContext, Refusal

SIGNATURES = {
    "harmonics": "PqP",
    "harmonics_along": "PPqP",
    "harmonics_gradient": "PPqP",
    "harmonics_gradient_along": "PPPqP",
}
SHARED = 46 * 1024
"""Bytes that a block's rows may take."""
MOST_THREADS = 64
MOST_DEGREE = 12
"""e3nn's own; 32 rows of more would not fit."""


def plan(d: SphericalHarmonicsDescriptor, context: PlanContext) -> Plan | Refusal:
    """Kernels for one list of degrees, compiled at their first use; or why there are none."""
    if max(d.degrees) == 0:  # stock's result is no function of the vectors, either
        value, columns = norm(0, 0, d.normalization), len(d.degrees)
        return Plan("cuda", d, "constant", lambda x: x.new_full((*x.shape[:-1], columns), value))
    if max(d.degrees) > MOST_DEGREE:
        return Refusal("cuda", f"degree {max(d.degrees)}, kernels go up to {MOST_DEGREE}")
    kernels = HarmonicsKernels(d, context)

    def run(vectors: torch.Tensor) -> torch.Tensor:
        return row_function(kernels, vectors)

    def gradients(
        g: torch.Tensor, operands: tuple[torch.Tensor, ...], wanted: tuple[bool, ...]
    ) -> tuple[torch.Tensor, ...]:
        return (row_gradient(kernels, g, *operands),)

    return Plan("cuda", d, "fused, one kernel", run, (kernels.program,), gradients)


class HarmonicsKernels:
    """`e3nn_accel.ops.rows` differentiates with these."""

    def __init__(self, d: SphericalHarmonicsDescriptor, context: PlanContext) -> None:
        self.descriptor = d
        self.columns = sum(2 * degree + 1 for degree in d.degrees)
        real = REAL[context.dtype]
        slots = sum(2 * degree + 1 for degree in set(d.degrees))
        pitch = max(slots, 3) | 1
        self.threads = (
            MOST_THREADS if MOST_THREADS * pitch * context.dtype.itemsize <= SHARED else 32
        )
        self.program = KernelProgram(
            f"spherical_harmonics_{real}",
            "spherical_harmonics.cu",
            tuple(SIGNATURES),
            _header(d, real, self.threads),
            description=str(d),
        )
        self._entries = Entries(self.program, SIGNATURES, context.config)

    def forward(self, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """[.., columns] of vectors [.., 3]."""
        out = x.new_empty((*x.shape[:-1], self.columns))
        self._launch("harmonics", out, x)
        return out

    def backward(self, g: torch.Tensor, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """The gradient by the vectors."""
        out = torch.empty_like(x)
        self._launch("harmonics_gradient", out, g, x)
        return out

    def second(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        h: torch.Tensor,
        wanted: tuple[bool, bool],
        *constants: torch.Tensor,
    ) -> Pair:
        """Those of the gradient: by g, and by the vectors."""
        dg = torch.empty_like(g) if wanted[0] else None
        dx = torch.empty_like(x) if wanted[1] else None
        if dg is not None:
            self._launch("harmonics_along", dg, x, h)
        if dx is not None:
            self._launch("harmonics_gradient_along", dx, g, x, h)
        return dg, dx

    def composed(self, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """The same in torch operations: for derivatives of the second ones."""
        return harmonics(self.descriptor, x)

    def _launch(self, entry: str, out: torch.Tensor, *operands: torch.Tensor) -> None:
        rows = out.shape[:-1].numel()
        grid, block = (-(-rows // self.threads), 1, 1), (self.threads, 1, 1)
        self._entries.on(out.device)[entry](grid, block, *operands, rows, out)


def _header(d: SphericalHarmonicsDescriptor, real: str, threads: int) -> str:
    degrees = list(dict.fromkeys(d.degrees))  # distinct ones, as they first come
    widths = [2 * degree + 1 for degree in degrees]
    starts = dict(zip(degrees, accumulate(widths, initial=0), strict=False))
    constants = {
        "REAL": real,
        "THREADS": threads,
        "LMAX": max(degrees),
        "NORMALIZE": int(d.normalize),
        "SLOTS": sum(widths),
        "COLUMNS": sum(2 * degree + 1 for degree in d.degrees),
        "STARTS": ", ".join(str(starts.get(degree, -1)) for degree in range(max(degrees) + 1)),
        "NORMS": ", ".join(
            repr(norm(degree, m, d.normalization))
            for degree in range(max(degrees) + 1)
            for m in range(degree + 1)
        ),
        "SEGMENTS": " ".join(
            f"SEGMENT({', '.join(map(str, s))})" for s in _segments(d.degrees, starts)
        ),
    }
    return "".join(f"#define {name} {value}\n" for name, value in constants.items())


def _segments(degrees: tuple[int, ...], starts: dict[int, int]) -> list[tuple[int, int, int, int]]:
    """(first column, first slot, width, whether these slots came before): all at once where none comes twice."""
    *columns, total = accumulate((2 * degree + 1 for degree in degrees), initial=0)
    if len(starts) == len(degrees):
        return [(0, 0, total, 0)]
    return [
        (column, starts[degree], 2 * degree + 1, int(degree in degrees[:n]))
        for n, (degree, column) in enumerate(zip(degrees, columns, strict=True))
    ]
