"""Rows summed by groups on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory asks for it
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from group_parity import SHAPES, SIZES, check

from e3nn_accel.backends.cuda.group_sums import GroupSums
from e3nn_accel.config import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_group(sizes: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(SIZES[sizes], shape, dtype, "cuda")


def test_offsets_beyond_2_to_the_31() -> None:
    """Rows that begin beyond 2^31 numbers."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("wants 12 GiB of free memory")
    columns = 16
    count = 2**31 // columns + 100
    rows = torch.zeros(count, columns, device="cuda")
    rows[-70:] = torch.randn(70, columns, device="cuda")
    order = torch.arange(count - 70, count, dtype=torch.int32, device="cuda")
    first = torch.tensor([0, 30, 70], dtype=torch.int32, device="cuda")
    found = GroupSums(Config()).sum(rows, order, first)
    expected = torch.stack([rows[-70:-40].double().sum(0), rows[-40:].double().sum(0)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
