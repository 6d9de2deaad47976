"""Plans whose kernels' resources are recorded: those of models in use, and awkward ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from convolution_parity import every_path
from e3nn import o3
from e3nn.nn import FullyConnectedNet
from mace_parts import Contraction

from e3nn_accel.backends.cuda import contraction as contraction_plan
from e3nn_accel.backends.cuda import (
    indexed_linear,
    linear,
    radial_embedding,
    radial_mlp,
    reshape_irreps,
    tensor_product,
)
from e3nn_accel.backends.cuda import spherical_harmonics as harmonics_plan
from e3nn_accel.backends.cuda.convolution_kernels import KINDS, FusedConvolution, Variant
from e3nn_accel.backends.cuda.edge_vectors import EdgeVectors
from e3nn_accel.backends.cuda.edges import EdgeSort
from e3nn_accel.backends.cuda.group_sums import MOST_COLUMNS, GroupSums
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.backends.cuda.share_sums import ShareSums
from e3nn_accel.backends.cuda.tensor_copies import TensorCopies
from e3nn_accel.cli.products import PRODUCTS, Product, work
from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config, Precision
from e3nn_accel.descriptor import (
    ContractionDescriptor,
    ConvolutionDescriptor,
    LinearDescriptor,
    RadialEmbeddingDescriptor,
    RadialMlpDescriptor,
    ReshapeDescriptor,
    SphericalHarmonicsDescriptor,
    TensorProductDescriptor,
)
from e3nn_accel.health import registry
from e3nn_accel.plan import Plan, PlanContext

Programs = Callable[[torch.dtype, int], list[KernelProgram]]
"""Of a dtype and a compute capability."""

BOTH = (torch.float32, torch.float64)
SINGLE = (torch.float32,)
ARCHITECTURES = (75, 80, 90, 100, 120)
"""Turing, Ampere, Hopper, and both Blackwells."""
BEFORE_BLACKWELL = (75, 80, 90)
"""Machine code for sm_100 and sm_120 takes minutes for a large plan (`e3nn_accel.nvrtc.SLOW_FROM`)."""
WITH_TF32 = (80, 90)
"""Of those, what linears have kernels for."""
SH = "0e+1o+2e+3o"
ALL_TO_3 = "+".join(f"64x{degree}{parity}" for degree in range(4) for parity in "eo")


@dataclass(frozen=True)
class RecordedPlan:
    """A plan of the table.

    Attributes:
        programs: Every program of the plan, those of derivatives too.
        dtypes: In which they are recorded.
        architectures: For which.
        takes_long: To compile: in .ci/full alone.
        of_mace: Its module is one of MACE's, which has to be installed.
    """

    programs: Programs
    dtypes: tuple[torch.dtype, ...] = SINGLE
    architectures: tuple[int, ...] = ARCHITECTURES
    takes_long: bool = False
    of_mace: bool = False

    def all_programs(self, architecture: int) -> Iterator[KernelProgram]:
        """In each dtype."""
        for dtype in self.dtypes:
            yield from self.programs(dtype, architecture)


def convolution(irreps1: str, irreps2: str, target: str) -> Programs:
    """Of the fused convolution with a path for each pair of inputs and each output."""
    return partial(_convolution, irreps1, irreps2, target)


def _convolution(
    irreps1: str, irreps2: str, target: str, dtype: torch.dtype, architecture: int
) -> list[KernelProgram]:
    module = every_path(irreps1, irreps2, target, compile_left_right=False, compile_right=False)
    descriptor = registry().describe(module, "convolution")
    assert isinstance(descriptor, ConvolutionDescriptor), descriptor
    context = PlanContext(dtype, torch.device("cuda", 0), Config(), architecture)
    kernels = FusedConvolution(descriptor.product, context)
    variants = [
        Variant(kind, staged=staged)
        for staged in (False, True)
        for kind in KINDS
        if not staged or kernels.staged[kind]
    ]
    return [part.program for variant in variants for part in kernels.parts(variant)]


def species_indexed(*irreps: str) -> Programs:
    """Of a fully connected product with one-hot scalars."""
    return partial(_species_indexed, irreps)


def _species_indexed(
    irreps: tuple[str, ...], dtype: torch.dtype, architecture: int
) -> list[KernelProgram]:
    module = o3.FullyConnectedTensorProduct(*irreps, compile_left_right=False, compile_right=False)
    descriptor = registry().describe(module, "tensor_product")
    assert isinstance(descriptor, TensorProductDescriptor), descriptor
    context = PlanContext(dtype, torch.device("cuda", 0), Config(), architecture)
    plan = indexed_linear.plan(descriptor, context)
    assert isinstance(plan, Plan), plan
    return list(plan.programs)


def single_matrix(*irreps: str, precision: Precision = "float32") -> Programs:
    """Of an ``o3.Linear``."""
    return partial(_single_matrix, irreps, Config(backend="cuda", precision=precision))


def _single_matrix(
    irreps: tuple[str, ...], config: Config, dtype: torch.dtype, architecture: int
) -> list[KernelProgram]:
    descriptor = registry().describe(o3.Linear(*irreps), "linear")
    assert isinstance(descriptor, LinearDescriptor), descriptor
    plan = linear.plan(
        descriptor, PlanContext(dtype, torch.device("cuda", 0), config, architecture)
    )
    assert isinstance(plan, Plan), plan
    return list(plan.programs)


def radial(*widths: int) -> Programs:
    """Of a radial MLP."""
    return partial(_radial, widths)


def _radial(widths: tuple[int, ...], dtype: torch.dtype, architecture: int) -> list[KernelProgram]:
    net = FullyConnectedNet(list(widths), torch.nn.functional.silu)
    descriptor = registry().describe(net, "radial_mlp")
    assert isinstance(descriptor, RadialMlpDescriptor), descriptor
    context = PlanContext(dtype, torch.device("cuda", 0), Config(), architecture)
    plan = radial_mlp.plan(descriptor, context)
    assert isinstance(plan, Plan), plan
    return list(plan.programs)


def contraction(outputs: str, correlation: int = 3, components: str = SH) -> Programs:
    """Of MACE's symmetric contraction, 128 channels."""
    return partial(_contraction, Contraction(components, outputs, correlation, channels=128))


def _contraction(shape: Contraction, dtype: torch.dtype, architecture: int) -> list[KernelProgram]:
    descriptor = registry().describe(shape.build(), "contraction")
    assert isinstance(descriptor, ContractionDescriptor), descriptor
    context = PlanContext(dtype, torch.device("cuda", 0), Config(), architecture)
    plan = contraction_plan.plan(descriptor, context)
    assert isinstance(plan, Plan), plan
    return list(plan.programs)


def spherical_harmonics(degrees: int) -> Programs:
    """Of all degrees up to one, of directions."""
    return partial(_spherical_harmonics, degrees)


def _spherical_harmonics(
    highest: int, dtype: torch.dtype, architecture: int
) -> list[KernelProgram]:
    d = SphericalHarmonicsDescriptor(tuple(range(highest + 1)), True, "component")
    return _programs_of(harmonics_plan.plan, d, dtype, architecture)


def _radial_embedding(dtype: torch.dtype, architecture: int) -> list[KernelProgram]:
    d = RadialEmbeddingDescriptor(10, True)
    return _programs_of(radial_embedding.plan, d, dtype, architecture)


def _reshape(dtype: torch.dtype, architecture: int) -> list[KernelProgram]:
    d = ReshapeDescriptor(128, (1, 3, 5, 7))
    return _programs_of(reshape_irreps.plan, d, dtype, architecture)


def _product_of(name: str) -> Programs:
    """Of a product of `bench --ops`, row by row."""
    return partial(_product, next(product for product in PRODUCTS if product.name == name))


def _product(product: Product, dtype: torch.dtype, architecture: int) -> list[KernelProgram]:
    return _programs_of(tensor_product.plan, _described(product, dtype), dtype, architecture)


@cache
def _described(product: Product, dtype: torch.dtype) -> object:
    """Once for all architectures: e3nn takes half a second to build one."""
    module = work(product, 2, dtype, torch.device("cpu")).module
    return registry().describe(module, "tensor_product")


def _edges(dtype: torch.dtype, architecture: int) -> list[KernelProgram]:
    return [EdgeSort(Config()).program]


def _edge_vectors(dtype: torch.dtype, architecture: int) -> list[KernelProgram]:
    return [EdgeVectors(Config()).program(dtype)]


def _copies(dtype: torch.dtype, architecture: int) -> list[KernelProgram]:
    return [TensorCopies(Config()).program]


def _sums(dtype: torch.dtype, architecture: int) -> list[KernelProgram]:
    """Of rows by groups, and of blocks' shares."""
    by_groups = [GroupSums(Config()).program(columns, dtype) for columns in (3, MOST_COLUMNS)]
    return [*by_groups, ShareSums(1280, REAL[dtype], dtype.itemsize, Config()).program]


def _programs_of(
    plan: Callable[[Any, PlanContext], object],
    descriptor: object,
    dtype: torch.dtype,
    architecture: int,
) -> list[KernelProgram]:
    context = PlanContext(dtype, torch.device("cuda", 0), Config(), architecture)
    found = plan(descriptor, context)
    assert isinstance(found, Plan), found
    return list(found.programs)


PLANS = {
    "MACE layer 1": RecordedPlan(convolution("128x0e", SH, SH), BOTH),
    "MACE layer 2": RecordedPlan(
        convolution("128x0e+128x1o", SH, SH), BOTH, architectures=BEFORE_BLACKWELL
    ),
    "MACE large layer 2": RecordedPlan(
        convolution("128x0e+128x1o+128x2e", SH, SH), architectures=BEFORE_BLACKWELL, takes_long=True
    ),
    # half a minute for each architecture
    "NequIP l=3": RecordedPlan(
        convolution(ALL_TO_3, SH, ALL_TO_3), architectures=(90,), takes_long=True
    ),
    "SevenNet": RecordedPlan(
        convolution("128x0e+64x1e+32x2e", "0e+1e+2e", "0e+1e+2e"),
        architectures=BEFORE_BLACKWELL,
        takes_long=True,
    ),
    "odd multiplicities": RecordedPlan(convolution("5x0e+3x1o", "0e+1o", "0e+1o")),
    "several channels of the second input": RecordedPlan(
        convolution("8x0e+8x1o", "2x0e+3x1o", "0e+1o")
    ),
    "skip connection, 89 species": RecordedPlan(
        species_indexed("128x0e+128x1o", "89x0e", "128x0e+128x1o"),
        BOTH,
        architectures=WITH_TF32,
    ),
    "linear, MACE": RecordedPlan(
        single_matrix("128x0e+128x1o", "128x0e+128x1o"), BOTH, architectures=WITH_TF32
    ),
    "linear, MACE, tf32": RecordedPlan(
        single_matrix("128x0e+128x1o", "128x0e+128x1o", precision="tf32"), architectures=WITH_TF32
    ),
    "linear, MACE, bf16": RecordedPlan(
        single_matrix("128x0e+128x1o", "128x0e+128x1o", precision="bf16"), architectures=WITH_TF32
    ),
    "skip connection, odd multiplicities": RecordedPlan(
        species_indexed("5x0e+33x1o+3x2e", "3x0e", "33x0e+5x1o+3x2e"),
        architectures=WITH_TF32,
        takes_long=True,
    ),
    "radial MLP, MACE": RecordedPlan(
        radial(8, 64, 64, 64, 1280), BOTH, architectures=WITH_TF32, takes_long=True
    ),
    "radial MLP, odd widths": RecordedPlan(
        radial(5, 100, 33), architectures=WITH_TF32, takes_long=True
    ),
    "contraction, MACE": RecordedPlan(
        contraction("0e+1o"), BOTH, architectures=BEFORE_BLACKWELL, takes_long=True, of_mace=True
    ),
    "contraction, last layer": RecordedPlan(
        contraction("0e"), architectures=BEFORE_BLACKWELL, of_mace=True
    ),
    "contraction, MACE large": RecordedPlan(
        contraction("0e+1o+2e"), architectures=(90,), takes_long=True, of_mace=True
    ),
    "tensor product, DiffDock": RecordedPlan(_product_of("diffdock"), BOTH, takes_long=True),
    "tensor product, tetris": RecordedPlan(
        _product_of("tetris"), architectures=BEFORE_BLACKWELL, takes_long=True
    ),
    "tensor product, MACE layer 2": RecordedPlan(
        _product_of("mace layer 2, row by row"), architectures=BEFORE_BLACKWELL, takes_long=True
    ),
    "spherical harmonics, MACE": RecordedPlan(spherical_harmonics(3), BOTH),
    "spherical harmonics up to 11": RecordedPlan(
        spherical_harmonics(11), BOTH, (90,), takes_long=True
    ),
    "radial embedding": RecordedPlan(_radial_embedding, BOTH),
    "reshape of irreps": RecordedPlan(_reshape, BOTH),
    "edges of small graphs": RecordedPlan(_edges, (torch.float32,)),
    "vectors of edges": RecordedPlan(_edge_vectors, BOTH),
    "copies of tensors": RecordedPlan(_copies, (torch.float32,)),
    "sums of groups and shares": RecordedPlan(_sums, BOTH),
}
