"""Launches the parts of a tensor product and adds up what they give, in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.backends.cuda.tensor_product_plan import PARTIAL_SUMS, Part, Segment, numbered
from e3nn_accel.compile import KernelProgram
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.irreps import dim_of
from e3nn_accel.launch import Dimensions, Kernel, aligned, load_all, multiprocessors
from e3nn_accel.ops.tensor_product import Wanted
from e3nn_accel.plan import PlanContext

SIGNATURES = {"forward": "PPPiqP", "backward": "PPPPiqiPPP", "double": "PPPPPPPiqiPPPP"}
NOTHING: Wanted = (False, False, False)
EVERYTHING: Wanted = (True, True, True)
MOST_BLOCKS = (1 << 31) - 1
BLOCKS_FOR_SUMS = 1024
"""Blocks where each makes a partial sum: enough to fill any device, few enough to add up."""


class ProductLaunch:
    """Kernels of one product in one dtype; `e3nn_accel.ops.tensor_product` differentiates with them."""

    def __init__(
        self,
        d: TensorProductDescriptor,
        parts: tuple[Part, ...],
        segments: tuple[Segment, ...],
        context: PlanContext,
    ) -> None:
        self.d, self.parts = d, parts
        self.real, self.config = REAL[context.dtype], context.config
        self.size = sum(segment.size for segment in segments)
        self.segmented = any(n.mixes and d.shared_weights for n in numbered(d))
        kernels_own = [
            n for n in numbered(d) if n.weight >= 0 and not (n.mixes and d.shared_weights)
        ]
        self.weighted = bool(kernels_own)
        covered = sum(n.weights for n in kernels_own)
        self.all_weights = covered == d.weight_numel
        self.fused_double = all(part.has_double for part in parts)
        self._residences = {
            (part.file, kind): part.residence(kind) for part in parts for kind in SIGNATURES
        }
        self.copies_rows = any(self._residences.values())
        self._sets_all = sum(part.covered for part in parts) == self.size
        self.reaches_all = (self._reaches_all(0), self._reaches_all(1))
        self._programs: dict[tuple[str, Wanted], tuple[KernelProgram, ...]] = {}
        self._kernels: dict[tuple[str, Wanted, torch.device], tuple[Kernel, ...]] = {}

    def programs(self) -> list[KernelProgram]:
        """What would be compiled, for ``kernels warm`` and for checks without a GPU."""
        found = [*self.programs_of("forward", NOTHING), *self.programs_of("backward", EVERYTHING)]
        return [*found, *(self.programs_of("double", NOTHING) if self.fused_double else ())]

    def programs_of(self, kind: str, wanted: Wanted) -> tuple[KernelProgram, ...]:
        """One program a part."""
        if (kind, wanted) not in self._programs:
            macros = [f"{kind.upper()}=1"]
            if kind == "backward":
                macros += [f"WANT_{n}=1" for n, want in zip("XYW", wanted, strict=True) if want]
            self._programs[kind, wanted] = tuple(
                KernelProgram(
                    f"tensor_product_{kind}_{self.real}" + (f"_{n}" if len(self.parts) > 1 else ""),
                    part.file,
                    (f"tensor_product_{kind}",),
                    part.header(kind, self.real),
                    tuple(self._exchanged(macros) if part.swapped else macros),
                    description=str(self.d),
                )
                for n, part in enumerate(self.parts)
            )
        return self._programs[kind, wanted]

    @staticmethod
    def _exchanged(macros: list[str]) -> list[str]:
        names = {"WANT_X=1": "WANT_Y=1", "WANT_Y=1": "WANT_X=1"}
        return sorted(names.get(macro, macro) for macro in macros)

    def kernels(self, kind: str, wanted: Wanted, device: torch.device) -> tuple[Kernel, ...]:
        """Compiled and loaded at their first use, in parallel."""
        key = (kind, wanted, device)
        if key not in self._kernels:
            loaded = load_all(self.programs_of(kind, wanted), device, self.config)
            self._kernels[key] = tuple(
                p.kernel(f"tensor_product_{kind}", SIGNATURES[kind]) for p in loaded
            )
        return self._kernels[key]

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, plain: bool
    ) -> torch.Tensor:
        """Rows [rows, dim_out], or all segments one after the other, flat."""
        rows = x.shape[0]
        out, w = self._result(x), self._ready(w)
        for kernel, part in zip(
            self.kernels("forward", NOTHING, x.device), self.parts, strict=True
        ):
            first, second = (y, x) if part.swapped else (x, y)
            grid, block, shared = self.grid(part, "forward", x)
            kernel(grid, block, first, second, w, int(plain), rows, out, shared=shared)
        return out

    def backward(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        plain: bool,
        wanted: Wanted,
    ) -> tuple[torch.Tensor | None, ...]:
        """(dx, dy, dw), None where not wanted."""
        found, w = _Gradients(self, x, y, w, wanted), self._ready(w)
        for kernel, part in zip(
            self.kernels("backward", wanted, x.device), self.parts, strict=True
        ):
            first, second = (y, x) if part.swapped else (x, y)
            into = found.of(part, "backward")
            operands = (first, second, w, g, int(plain), x.shape[0])
            results = (found.add, *into.gradients)
            kernel(into.grid, into.block, *operands, *results, shared=into.shared)
            found.take(into, part)
        return found.dx, found.dy, found.dw

    def double(
        self,
        g: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        hx: torch.Tensor,
        hy: torch.Tensor,
        hw: torch.Tensor,
        plain: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        """(dg, dx, dy, dw) of <hx, dx> + <hy, dy> + <hw, dw>, where every part has a kernel for it."""
        found, out = _Gradients(self, x, y, w, EVERYTHING), self._result(x)
        w, hw = self._ready(w), self._ready(hw)
        for kernel, part in zip(self.kernels("double", NOTHING, x.device), self.parts, strict=True):
            first, second, h1, h2 = (y, x, hy, hx) if part.swapped else (x, y, hx, hy)
            into = found.of(part, "double")
            operands = (first, second, w, g, h1, h2, hw, int(plain), x.shape[0])
            results = (found.add, out, *into.gradients)
            kernel(into.grid, into.block, *operands, *results, shared=into.shared)
            found.take(into, part)
        return out, found.dx, found.dy, found.dw

    def _result(self, x: torch.Tensor) -> torch.Tensor:
        """For the output; zero where no kernel writes."""
        rows = x.shape[0]
        shape = (rows * self.size,) if self.segmented else (rows, self.size)
        return (x.new_empty if self._sets_all else x.new_zeros)(shape)

    def _reaches_all(self, operand: int) -> bool:
        """Whether one kernel sets every component of the gradient of x (0) or y (1)."""
        part = self.parts[0]
        own = operand if not part.swapped else 1 - operand
        dim = dim_of(self.d.irreps_in1 if operand == 0 else self.d.irreps_in2)
        return len(self.parts) == 1 and part.reached(own) == dim and (own == 0 or part.chunks == 1)

    def _ready(self, w: torch.Tensor) -> torch.Tensor:
        """Weights that begin where a bulk copy may."""
        return aligned(w) if self.copies_rows else w

    def grid(
        self, part: Part, kind: str, like: torch.Tensor, sums: bool = False
    ) -> tuple[Dimensions, Dimensions, int]:
        """Grid, block and its dynamic shared memory; fewer blocks where each stays, or makes ``sums`` of dw."""
        blocks, threads = min(-(-len(like) // part.rows), MOST_BLOCKS), (part.threads, 1, 1)
        residence = self._residences[part.file, kind]
        if residence is not None:
            most = residence.blocks * multiprocessors(like.device)
            return (min(blocks, most), 1, 1), threads, residence.shared
        if sums:
            most = max(1, PARTIAL_SUMS // max(1, part.sums * self.d.weight_numel))
            blocks = min(blocks, BLOCKS_FOR_SUMS, most)
        return (blocks, part.chunks, 1), threads, 0


@dataclass(frozen=True)
class _Into:
    """Where one part's kernel writes: gradients of its first and second input and of the weights."""

    grid: Dimensions
    block: Dimensions
    shared: int
    gradients: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class _Gradients:
    """Gradients under construction, added up over parts in a fixed order.

    Attributes:
        add: Whether kernels add to what is there, 0 or 1.
    """

    def __init__(
        self,
        owner: ProductLaunch,
        x: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        wanted: Wanted,
    ) -> None:
        self.owner, self.x = owner, x
        self.add = int(len(owner.parts) > 1)
        self.sums = owner.d.shared_weights and wanted[2]
        whole = (*owner.reaches_all, owner.all_weights and not self.sums)
        self.dx, self.dy, self.dw = (
            (t.new_empty if all_of_it else t.new_zeros)(t.shape) if want else None
            for t, want, all_of_it in zip((x, y, w), wanted, whole, strict=True)
        )

    def of(self, part: Part, kind: str) -> _Into:
        """Blocks that share a row have a gradient of the second input each; blocks, a sum of dw each."""
        launch = self.owner.grid(part, kind, self.x, self.sums)
        first, second = (self.dy, self.dx) if part.swapped else (self.dx, self.dy)
        dw = self.dw
        if second is not None and part.chunks > 1:
            second = second.new_zeros((part.chunks, *second.shape))
        if dw is not None and self.sums:
            dw = dw.new_zeros((launch[0][0] * part.sums, *dw.shape))
        return _Into(*launch, (first, second, dw))

    def take(self, into: _Into, part: Part) -> None:
        """Add up what was written apart."""
        _, second, dw = into.gradients
        whole = self.dx if part.swapped else self.dy
        if whole is not None and second is not None and second is not whole:
            whole += second.sum(0)
        if self.dw is not None and dw is not None and dw is not self.dw:
            self.dw += dw.sum(0)
