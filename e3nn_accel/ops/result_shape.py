"""The shape of what a plan returns, from its descriptor and the operands' shapes alone; sizes may be symbolic."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from e3nn_accel.descriptor import (
    ContractionDescriptor,
    ConvolutionDescriptor,
    Descriptor,
    LinearDescriptor,
    RadialEmbeddingDescriptor,
    RadialMlpDescriptor,
    ReshapeDescriptor,
    SphericalHarmonicsDescriptor,
)
from e3nn_accel.irreps import dim_of

Shape = tuple[int, ...]


def result_shape(descriptor: Descriptor, operands: Sequence[torch.Tensor]) -> Shape:
    """What stock e3nn returns for these operands (in the order of `Plan.run`).

    Raises:
        RuntimeError: Leading dimensions that don't broadcast.
    """
    x = operands[0]
    if isinstance(descriptor, LinearDescriptor):
        leading = x.shape[:-1] if descriptor.f_in is None else x.shape[:-2]
        columns = () if descriptor.f_out is None else (descriptor.f_out,)
        return (*leading, *columns, dim_of(descriptor.irreps_out))
    if isinstance(descriptor, ConvolutionDescriptor):
        return (x.shape[0], dim_of(descriptor.product.irreps_out))
    if isinstance(descriptor, ContractionDescriptor):
        width = sum(2 * output.l + 1 for output in descriptor.outputs)
        return (x.shape[0], descriptor.channels * width)
    if isinstance(descriptor, RadialMlpDescriptor):
        return (*x.shape[:-1], descriptor.widths[-1])
    if isinstance(descriptor, SphericalHarmonicsDescriptor):
        return (*x.shape[:-1], sum(2 * degree + 1 for degree in descriptor.degrees))
    if isinstance(descriptor, RadialEmbeddingDescriptor):
        return (x.shape[0], descriptor.basis)
    if isinstance(descriptor, ReshapeDescriptor):
        return (x.shape[0], descriptor.mul, descriptor.columns)
    of_rows = operands[:2] if descriptor.shared_weights else operands[:3]
    shape = torch.broadcast_shapes(*(operand.shape[:-1] for operand in of_rows))
    return (*shape, dim_of(descriptor.irreps_out))
