"""Whether a batch agrees with MACE's own: the same tensors, and the same edges in whatever order."""

from __future__ import annotations

from typing import Any

import torch

from e3nn_accel.neighbours.frame import PER_EDGE

AT_CUTOFF = 1e-6
"""Edges so near to the cutoff may be there or not: rounding decides, and they contribute nothing."""


def difference(ours: dict[str, Any], mace: dict[str, Any], cutoff: float) -> str:
    """What differs, or an empty string."""
    if ours.keys() != mace.keys():
        return f"entries {', '.join(sorted(ours.keys() ^ mace.keys()))}"
    for name, wanted in mace.items():
        if name not in PER_EDGE and not _alike(ours[name], wanted):
            return name
    if _edges(ours, cutoff) != _edges(mace, cutoff):
        return "edges"
    return ""


def _alike(found: Any, wanted: Any) -> bool:
    if not torch.is_tensor(wanted):
        return type(found) is type(wanted) and bool(found == wanted)
    if found.dtype != wanted.dtype or found.shape != wanted.shape or found.device != wanted.device:
        return False
    return torch.allclose(found, wanted, rtol=1e-6, atol=0.0, equal_nan=True)


def _edges(batch: dict[str, Any], cutoff: float) -> dict[tuple[int, ...], int]:
    """How often each edge is there, by sender, receiver and cell; without those at the cutoff."""
    tensors = {name: batch[name].detach().cpu() for name in (*PER_EDGE, "positions")}
    sender, receiver = tensors["edge_index"]
    positions = tensors["positions"].double()
    length = (positions[receiver] - positions[sender] + tensors["shifts"].double()).norm(dim=1)
    inside = length < cutoff - AT_CUTOFF * max(cutoff, float(positions.abs().max()))
    rows = torch.cat([tensors["edge_index"].T, tensors["unit_shifts"].long()], 1)[inside]
    found: dict[tuple[int, ...], int] = {}
    for row in rows.tolist():
        found[tuple(row)] = found.get(tuple(row), 0) + 1
    return found
