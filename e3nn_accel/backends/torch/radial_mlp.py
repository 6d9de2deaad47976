"""Layers of a radial MLP in torch operations: what kernels leave, and what second derivatives are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from e3nn_accel.descriptor import RadialLayer

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def run_layers(
    layers: Sequence[RadialLayer], x: torch.Tensor, weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """[rows, in] to [rows, out], one layer after the other."""
    for layer, weight in zip(layers, weights, strict=True):
        x = activated(layer, x @ (weight * layer.scale))
    return x


def activated(layer: RadialLayer, z: torch.Tensor) -> torch.Tensor:
    """What the layer makes of its product."""
    if layer.activation == "identity":
        return z
    return ACTIVATIONS[layer.activation](z) * layer.gain
