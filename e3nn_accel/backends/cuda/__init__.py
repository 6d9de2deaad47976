"""The cuda backend: kernels compiled at run time by NVRTC, loaded through CuPy.

It has kernels for the fused convolution, tensor products edge by edge, species-indexed linears, ``o3.Linear``,
the symmetric contraction, the radial MLP, spherical harmonics, and MACE's radial embedding and reshape_irreps. What it
refuses of all but the last four, the torch backend plans on the same device.
"""

from __future__ import annotations

import torch

from e3nn_accel.descriptor import (
    ContractionDescriptor,
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


class CudaBackend:
    """Plans every operation for tensors on an NVIDIA GPU."""

    name = "cuda"
    priority = 10
    device_type = "cuda"

    def available(self) -> Availability:
        """Whether kernels can be compiled and launched, with the reason if not."""
        from e3nn_accel.availability import cuda_availability

        return cuda_availability()

    def plan(self, descriptor: Descriptor, context: PlanContext) -> Plan | Refusal:
        """Plan, or say why not."""
        from e3nn_accel.backends.cuda import (
            contraction,
            convolution,
            linear,
            radial_embedding,
            radial_mlp,
            reshape_irreps,
            spherical_harmonics,
            tensor_product,
        )

        if context.dtype not in DTYPES:
            return Refusal(
                self.name,
                f"needs float32 or float64, got {str(context.dtype).removeprefix('torch.')}",
            )
        if isinstance(descriptor, TensorProductDescriptor):
            return tensor_product.plan(descriptor, context)
        if isinstance(descriptor, LinearDescriptor):
            return linear.plan(descriptor, context)
        if isinstance(descriptor, ContractionDescriptor):
            return contraction.plan(descriptor, context)
        if isinstance(descriptor, RadialMlpDescriptor):
            return radial_mlp.plan(descriptor, context)
        if isinstance(descriptor, SphericalHarmonicsDescriptor):
            return spherical_harmonics.plan(descriptor, context)
        if isinstance(descriptor, RadialEmbeddingDescriptor):
            return radial_embedding.plan(descriptor, context)
        if isinstance(descriptor, ReshapeDescriptor):
            return reshape_irreps.plan(descriptor, context)
        reason = convolution.refusal(descriptor)
        return Refusal(self.name, reason) if reason else convolution.plan(descriptor, context)
