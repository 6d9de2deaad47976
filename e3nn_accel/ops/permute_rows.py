"""Move rows to slots: ``out[s] = rows[source[s]]``, where every row has exactly one slot and some slots stay empty.

The derivative of a gather is a scatter-add in general; where every row is used once it is a gather
too, which is several times faster than torch's index_add and needs no zero-filled buffer.
"""

from __future__ import annotations

from typing import Any

import torch


def rows_to_slots(rows: torch.Tensor, source: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Lay rows out in slots; empty slots are zero.

    Args:
        rows: [rows, width].
        source: [slots], the row of each slot; ``len(rows)`` marks an empty slot.
        slot: [rows], the slot of each row.

    Returns:
        [slots, width]
    """
    out: torch.Tensor = _RowsToSlots.apply(rows, source, slot)  # type: ignore[no-untyped-call]
    return out


class _RowsToSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, source: torch.Tensor, slot: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(source, slot)
        if len(source) == len(slot):
            return rows.index_select(0, source)
        out = rows.new_zeros((len(source), rows.shape[1]))
        out[slot] = rows
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        source, slot = ctx.saved_tensors
        return _SlotsToRows.apply(grads[0], source, slot), None, None  # type: ignore[no-untyped-call]


class _SlotsToRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, slots: torch.Tensor, source: torch.Tensor, slot: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(source, slot)
        return slots.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        source, slot = ctx.saved_tensors
        return _RowsToSlots.apply(grads[0], source, slot), None, None  # type: ignore[no-untyped-call]
