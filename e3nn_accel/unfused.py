"""A convolution's four-argument call taken apart, where no plan takes it whole."""

from __future__ import annotations

from typing import Any

import torch


def is_fused(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a product is called as ``conv_tp(node_feats, edge_attrs, weights, edge_index)``."""
    edge_index = args[3] if len(args) == 4 else kwargs.get("edge_index")
    return edge_index is not None and hasattr(module, "_in1_dim")


def unfused(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Gather, product and scatter one after the other, as an interaction block does itself."""
    given = dict(zip(("x", "y", "weight", "edge_index"), args, strict=False)) | kwargs
    return _unfused(module, **given)


def _unfused(
    module: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    edge_index: torch.Tensor,
) -> torch.Tensor:
    sender, receiver = edge_index[0], edge_index[1]
    messages: torch.Tensor = module(x[sender], y, weight)
    out = messages.new_zeros((x.shape[0], messages.shape[1]))
    return out.scatter_add(0, receiver.unsqueeze(1).expand_as(messages), messages)
