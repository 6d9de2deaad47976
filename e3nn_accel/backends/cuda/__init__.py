"""The cuda backend: kernels compiled at run time by NVRTC, loaded through CuPy.

It has kernels for the fused convolution and for tensor products edge by edge; asked for by name, for
species-indexed linears, ``o3.Linear`` and the symmetric contraction, too, which no GPU has timed yet. What
it refuses, the torch backend plans on the same device.
"""

from __future__ import annotations

import torch

from e3nn_accel.descriptor import (
    ContractionDescriptor,
    Descriptor,
    LinearDescriptor,
    TensorProductDescriptor,
)
from e3nn_accel.plan import Availability, Plan, PlanContext, Refusal

DTYPES = (torch.float32, torch.float64)
UNTIMED = "its kernels haven't been timed on a GPU: backend='cuda' asks for them"


class CudaBackend:
    """Plans convolutions, tensor products and contractions for tensors on an NVIDIA GPU."""

    name = "cuda"
    priority = 10
    device_type = "cuda"

    def available(self) -> Availability:
        """Whether kernels can be compiled and launched, with the reason if not."""
        from e3nn_accel.availability import cuda_availability

        return cuda_availability()

    def plan(self, descriptor: Descriptor, context: PlanContext) -> Plan | Refusal:
        """Plan a convolution, a tensor product, a linear or a contraction, or say why not."""
        from e3nn_accel.backends.cuda import contraction, convolution, linear, tensor_product

        if context.dtype not in DTYPES:
            return Refusal(
                self.name,
                f"needs float32 or float64, got {str(context.dtype).removeprefix('torch.')}",
            )
        if context.config.backend != self.name and _untimed(descriptor):
            return Refusal(self.name, UNTIMED)
        if isinstance(descriptor, TensorProductDescriptor):
            return tensor_product.plan(descriptor, context)
        if isinstance(descriptor, LinearDescriptor):
            return linear.plan(descriptor, context)
        if isinstance(descriptor, ContractionDescriptor):
            return contraction.plan(descriptor, context)
        reason = convolution.refusal(descriptor)
        return Refusal(self.name, reason) if reason else convolution.plan(descriptor, context)


def _untimed(descriptor: Descriptor) -> bool:
    if isinstance(descriptor, TensorProductDescriptor):
        from e3nn_accel.backends.torch import species_linear

        return species_linear.applies(descriptor)
    return isinstance(descriptor, LinearDescriptor | ContractionDescriptor)
