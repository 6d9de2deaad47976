"""Sums by groups against torch's own, in float64, of rows that come in any order."""

from __future__ import annotations

import torch
from comparison import poisoned_memory

from e3nn_accel.backends.cuda.group_sums import MOST_COLUMNS, GroupSums
from e3nn_accel.config import Config

SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (3, 3), (MOST_COLUMNS,)]
"""Of a row."""
SIZES = {
    "some": [0, 5, 1, 31, 32, 33, 0, 70, 2],
    "one": [100],
    "one of many": [0] * 300 + [2000] + [0] * 7,
    "none with any": [0, 0],
}
"""Of the groups."""


def check(
    sizes: list[int], shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Rows that belong to nothing are among them, and aren't contiguous."""
    generator = torch.Generator().manual_seed(0)
    used = sum(sizes)
    rows = torch.randn((2 * used + 8, *shape), generator=generator, dtype=dtype)[::2]
    order = torch.randperm(len(rows), generator=generator)[:used]
    first = torch.tensor([0, *sizes]).cumsum(0)
    expected = torch.stack(
        [rows[order[first[n] : first[n + 1]]].double().sum(0) for n in range(len(sizes))]
    )
    given = [t.to(device) for t in (order.int(), first.int())]
    with poisoned_memory():
        found = GroupSums(Config()).sum(rows.to(device), *given)
    assert found.dtype == dtype
    limit = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.double().cpu(), expected, rtol=limit, atol=30 * limit)
