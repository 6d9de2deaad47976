"""The torch backend: every plan in ordinary torch operations, on any device.

It is the product where there is no GPU, and the readable reference for the kernels. Derivatives of
any order come from autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from e3nn_accel.backends.torch import (
    contraction,
    convolution,
    linear,
    species_linear,
    tensor_product,
)
from e3nn_accel.descriptor import (
    ContractionDescriptor,
    ConvolutionDescriptor,
    Descriptor,
    LinearDescriptor,
    RadialEmbeddingDescriptor,
    RadialMlpDescriptor,
    ReshapeDescriptor,
    SphericalHarmonicsDescriptor,
    TensorProductDescriptor,
)
from e3nn_accel.plan import Availability, Plan, PlanContext, Refusal

DTYPES = (torch.float32, torch.float64)


OF_TORCH_ALREADY = (
    RadialMlpDescriptor,
    RadialEmbeddingDescriptor,
    ReshapeDescriptor,
    SphericalHarmonicsDescriptor,
)


class TorchBackend:
    """Plans every operation whose stock form isn't torch operations as good already, in float32 and float64."""

    name = "torch"
    priority = 0

    def available(self) -> Availability:
        """Always: torch is there."""
        return Availability(True)

    def plan(self, descriptor: Descriptor, context: PlanContext) -> Plan | Refusal:
        """Plan, or refuse dtypes whose rounding stock e3nn and a plan would not share."""
        if context.dtype not in DTYPES:
            return Refusal(
                self.name,
                f"needs float32 or float64, got {str(context.dtype).removeprefix('torch.')}",
            )
        with torch.inference_mode(
            False
        ):  # the constants of a plan serve later calls that want gradients
            return self._plan(descriptor, context)

    def _plan(self, descriptor: Descriptor, context: PlanContext) -> Plan | Refusal:
        run: Callable[..., torch.Tensor]
        fewest = 0
        if isinstance(descriptor, LinearDescriptor):
            strategy, run = linear.plan(descriptor, context)
        elif isinstance(descriptor, ContractionDescriptor):
            strategy, run = contraction.plan(descriptor, context)
        elif isinstance(descriptor, ConvolutionDescriptor):
            reason = convolution.refusal(descriptor)
            if reason:
                return Refusal(self.name, reason)
            strategy, run = convolution.plan(descriptor, context)
        elif isinstance(descriptor, OF_TORCH_ALREADY):
            return Refusal(self.name, "stock e3nn's are torch operations, as fast as any other")
        elif species_linear.applies(descriptor):
            strategy, run = species_linear.plan(descriptor, context)
        else:
            assert isinstance(descriptor, TensorProductDescriptor)
            strategy, run = tensor_product.plan(descriptor, context)
            fewest = tensor_product.fewest_rows(descriptor, context)
            if fewest:
                strategy += f"; fewer than {fewest} rows are stock e3nn's by choice"
        return Plan(self.name, descriptor, strategy, run, fewest_rows=fewest)
