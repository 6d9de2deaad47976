"""Rows taken many times over: their gradients, while a model call is captured.

Under stress MACE takes each atom's and each edge's strain from that of its structure, ``strain[batch]``.
torch sums the gradient of such a row by one warp that goes through all of its uses: 8 ms for 46 thousand
edges of one structure on an H100, where all else took 3.5. Here the sum is over all uses at once, as
deterministic as torch's. It costs a copy of the gradient for each row that there is to choose from, so
that it is taken where these are few.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FEW_ROWS = 16
"""To choose from: as many copies of the gradient are made."""
MANY_USES = 64
"""Of each row on average; below, torch's own gradient is as fast."""


class FewRows(TorchFunctionMode):
    """Within it, ``rows[index]`` with few rows and a long index has a gradient that is fast to find."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.__getitem__ and _few_for_many(*args):
            return _Gather.apply(*args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def _few_for_many(rows: torch.Tensor, index: Any) -> bool:
    return (
        type(index) is torch.Tensor
        and index.dtype == torch.int64
        and index.dim() == 1
        and rows.dim() > 0
        and rows.requires_grad
        and torch.is_grad_enabled()
        and 0 < rows.shape[0] <= FEW_ROWS
        and index.shape[0] >= MANY_USES * rows.shape[0]
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.count = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (index,) = grads, ctx.saved_tensors
        numbers = torch.arange(ctx.count, device=index.device)
        uses = (index.unsqueeze(1) == numbers).view(*index.shape, ctx.count, *[1] * (g.dim() - 1))
        return torch.where(uses, g.unsqueeze(1), g.new_zeros(())).sum(0), None
