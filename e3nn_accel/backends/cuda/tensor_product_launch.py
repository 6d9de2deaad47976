"""Launches the parts of a tensor product and adds up what they give, in a fixed order."""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.tensor_product_plan import PARTIAL_SUMS, Part, Segment, numbered
from e3nn_accel.compile import KernelProgram
from e3nn_accel.descriptor import TensorProductDescriptor, dim_of
from e3nn_accel.launch import Kernel, load_all
from e3nn_accel.ops.tensor_product import Wanted
from e3nn_accel.plan import PlanContext

REAL = {torch.float32: "float", torch.float64: "double"}
SIGNATURES = {"forward": "PPPiqP", "backward": "PPPPiqiPPP"}
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
        covered = sum(n.count for n in kernels_own)
        self.all_weights = covered == d.weight_numel
        self._programs: dict[tuple[str, Wanted], tuple[KernelProgram, ...]] = {}
        self._kernels: dict[tuple[str, Wanted, torch.device], tuple[Kernel, ...]] = {}

    def programs(self) -> list[KernelProgram]:
        """What would be compiled, for ``kernels warm`` and for checks without a GPU."""
        return [*self.programs_of("forward", NOTHING), *self.programs_of("backward", EVERYTHING)]

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
        whole = sum(part.covered for part in self.parts) == self.size
        shape = (rows * self.size,) if self.segmented else (rows, self.size)
        out = (x.new_empty if whole else x.new_zeros)(shape)
        for kernel, part in zip(self.kernels("forward", NOTHING, x.device), self.parts, strict=True):
            first, second = (y, x) if part.swapped else (x, y)
            kernel(*self._grid(part, rows, False), first, second, w, int(plain), rows, out)
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
        rows = x.shape[0]
        sums = self.d.shared_weights and wanted[2]
        dx, dy = (
            self._new(of, wanted[n], self._reaches_all(n)) for n, of in enumerate((x, y))
        )
        dw = self._new(w, wanted[2], self.all_weights and not sums)
        for kernel, part in zip(self.kernels("backward", wanted, x.device), self.parts, strict=True):
            grid, block = self._grid(part, rows, sums)
            first, second = (y, x) if part.swapped else (x, y)
            d_first, d_second = (dy, dx) if part.swapped else (dx, dy)
            # Blocks that share a row have a dy each, which are added up.
            chunks = d_second is not None and part.chunks > 1
            d_second_here = second.new_zeros((part.chunks, *second.shape)) if chunks else d_second
            dw_here = w.new_zeros((grid[0] * part.sums, *w.shape)) if sums else dw
            add = int(len(self.parts) > 1)
            kernel(
                grid, block, first, second, w, g, int(plain), rows, add, d_first, d_second_here, dw_here
            )  # fmt: skip
            if chunks and d_second is not None and d_second_here is not None:
                d_second += d_second_here.sum(0)
            if sums and dw is not None and dw_here is not None:
                dw += dw_here.sum(0)
        return dx, dy, dw

    def _new(self, like: torch.Tensor, wanted: bool, whole: bool) -> torch.Tensor | None:
        return (like.new_empty if whole else like.new_zeros)(like.shape) if wanted else None

    def _reaches_all(self, operand: int) -> bool:
        """Whether one kernel sets every component of the gradient of x (0) or y (1)."""
        part = self.parts[0]
        own = operand if not part.swapped else 1 - operand
        dim = dim_of(self.d.irreps_in1 if operand == 0 else self.d.irreps_in2)
        return len(self.parts) == 1 and part.reached(own) == dim and (own == 0 or part.chunks == 1)

    def _grid(self, part: Part, rows: int, sums: bool) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        blocks = min(-(-rows // part.rows), MOST_BLOCKS)
        if sums:
            most = max(1, PARTIAL_SUMS // max(1, part.sums * self.d.weight_numel))
            blocks = min(blocks, BLOCKS_FOR_SUMS, most)
        return (blocks, part.chunks, 1), (part.threads, 1, 1)
