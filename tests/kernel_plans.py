"""Plans whose kernels' resources are recorded: those of models in use, and awkward ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from convolution_parity import every_path

from e3nn_accel.backends.cuda.convolution import FusedConvolution
from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config
from e3nn_accel.descriptor import ConvolutionDescriptor
from e3nn_accel.health import registry
from e3nn_accel.plan import PlanContext

Programs = Callable[[torch.dtype], list[KernelProgram]]

BOTH = (torch.float32, torch.float64)
SINGLE = (torch.float32,)
ARCHITECTURES = (75, 80, 90, 100, 120)
"""Turing, Ampere, Hopper, and both Blackwells."""
BEFORE_BLACKWELL = (75, 80, 90)
"""NVRTC 13.5 takes some thirty times as long for sm_100 and sm_120: minutes for a large plan."""
SH = "0e+1o+2e+3o"
ALL_TO_3 = "+".join(f"64x{degree}{parity}" for degree in range(4) for parity in "eo")


@dataclass(frozen=True)
class RecordedPlan:
    """A plan of the table.

    Attributes:
        programs: Every program of the plan in a dtype, those of derivatives too.
        dtypes: In which they are recorded.
        architectures: For which.
        takes_long: To compile: in .ci/full alone.
    """

    programs: Programs
    dtypes: tuple[torch.dtype, ...] = SINGLE
    architectures: tuple[int, ...] = ARCHITECTURES
    takes_long: bool = False

    def all_programs(self) -> Iterator[KernelProgram]:
        """In each dtype."""
        for dtype in self.dtypes:
            yield from self.programs(dtype)


def convolution(irreps1: str, irreps2: str, target: str) -> Programs:
    """Of the fused convolution with a path for each pair of inputs and each output."""
    return partial(_convolution, irreps1, irreps2, target)


def _convolution(
    irreps1: str, irreps2: str, target: str, dtype: torch.dtype
) -> list[KernelProgram]:
    module = every_path(irreps1, irreps2, target, compile_left_right=False, compile_right=False)
    descriptor = registry().describe(module, "convolution")
    assert isinstance(descriptor, ConvolutionDescriptor), descriptor
    context = PlanContext(dtype, torch.device("cuda", 0), Config())
    kernels = FusedConvolution(descriptor.product, context)
    return kernels.programs(("forward", "backward", "double", "gather"))


PLANS = {
    "MACE layer 1": RecordedPlan(convolution("128x0e", SH, SH), BOTH),
    "MACE layer 2": RecordedPlan(convolution("128x0e+128x1o", SH, SH), BOTH),
    "MACE large layer 2": RecordedPlan(
        convolution("128x0e+128x1o+128x2e", SH, SH), architectures=BEFORE_BLACKWELL
    ),
    # half a minute for each architecture
    "NequIP l=3": RecordedPlan(
        convolution(ALL_TO_3, SH, ALL_TO_3), architectures=(90,), takes_long=True
    ),
    "SevenNet": RecordedPlan(
        convolution("128x0e+64x1e+32x2e", "0e+1e+2e", "0e+1e+2e"), architectures=BEFORE_BLACKWELL
    ),
    "odd multiplicities": RecordedPlan(convolution("5x0e+3x1o", "0e+1o", "0e+1o")),
    "several channels of the second input": RecordedPlan(
        convolution("8x0e+8x1o", "2x0e+3x1o", "0e+1o")
    ),
}
