"""MACE's radial embedding: a plan of one launch forward, one backward, and one for second derivatives."""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.entries import Entries
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.branches import beside, is_ready
from e3nn_accel.compile import KernelProgram
from e3nn_accel.descriptor import RadialEmbeddingDescriptor
from e3nn_accel.ops.rows import Pair, row_function, row_gradient
from e3nn_accel.plan import Plan, PlanContext, Refusal

SIGNATURES = {
    "radial": "PPPPPqP",
    "radial_gradient": "PPPPPPqP",
    "radial_second": "PPPPPPPqPP",
}
THREADS = 64


def plan(d: RadialEmbeddingDescriptor, context: PlanContext) -> Plan | Refusal:
    """Kernels for so many Bessel functions, compiled at their first use."""
    if d.basis < 1:
        return Refusal("cuda", "there is no basis function")
    kernels = RadialKernels(d, context)

    branched = beside(lambda lengths, *constants: row_function(kernels, lengths, *constants))

    def run(lengths: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        return is_ready(branched(lengths, *constants))

    def gradients(
        g: torch.Tensor, operands: tuple[torch.Tensor, ...], wanted: tuple[bool, ...]
    ) -> tuple[torch.Tensor, ...]:
        # no constant of a plan that is run requires a gradient: `patches.radial_embedding.bind`
        return (row_gradient(kernels, g, *operands),)

    return Plan("cuda", d, "fused, one kernel", run, (kernels.program,), gradients)


class RadialKernels:
    """`e3nn_accel.ops.rows` differentiates with these; constants are w [basis], c, r_max and p, of one number each."""

    def __init__(self, d: RadialEmbeddingDescriptor, context: PlanContext) -> None:
        self.basis = d.basis
        real = REAL[context.dtype]
        sizes = {"REAL": real, "THREADS": THREADS, "BASIS": d.basis}
        sizes["EXPONENT"] = "int" if d.integer_exponent else real
        self.program = KernelProgram(
            f"radial_embedding_{real}",
            "radial_embedding.cu",
            tuple(SIGNATURES),
            "".join(f"#define {name} {value}\n" for name, value in sizes.items()),
            description=str(d),
        )
        self._entries = Entries(self.program, SIGNATURES, context.config)

    def forward(self, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """[edges, basis] of lengths [edges, 1]."""
        edges = x.shape[0]
        out = x.new_empty((edges, self.basis))
        self._launch("radial", out.numel(), x, *constants, edges, out)
        return out

    def backward(self, g: torch.Tensor, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """The gradient by the lengths."""
        edges, out = x.shape[0], torch.empty_like(x)
        self._launch("radial_gradient", edges, g, x, *constants, edges, out)
        return out

    def second(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        h: torch.Tensor,
        wanted: tuple[bool, bool],
        *constants: torch.Tensor,
    ) -> Pair:
        """Those of the gradient: by g, and by the lengths."""
        dg = torch.empty_like(g) if wanted[0] else None
        dx = torch.empty_like(x) if wanted[1] else None
        edges = x.shape[0]
        self._launch("radial_second", edges, g, x, h, *constants, edges, dg, dx)
        return dg, dx

    def composed(self, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        """The same in torch operations: for derivatives of the second ones."""
        w, prefactor, r_max, p = constants
        ratio, p = x / r_max, p.to(torch.int)
        envelope = (
            1
            - (p + 1.0) * (p + 2.0) / 2 * ratio**p
            + p * (p + 2.0) * ratio ** (p + 1)
            - p * (p + 1.0) / 2 * ratio ** (p + 2)
        )
        return prefactor * (torch.sin(w * x) / x) * (envelope * (x < r_max))

    def _launch(self, entry: str, threads: int, *arguments: torch.Tensor | int | None) -> None:
        like = arguments[0]
        assert isinstance(like, torch.Tensor)
        grid, block = (-(-threads // THREADS), 1, 1), (THREADS, 1, 1)
        self._entries.on(like.device)[entry](grid, block, *arguments)
