"""Tensors copied in one launch on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as the other files of this folder
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from copies_parity import OFFSETS, SIZES, check, check_types

from e3nn_accel.backends.cuda.tensor_copies import SLOTS, TensorCopies
from e3nn_accel.config import Config
from e3nn_accel.graphs import copying

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_every_byte(offsets: tuple[int, int]) -> None:
    check(SIZES, offsets, "cuda")


def test_types() -> None:
    check_types("cuda")


@pytest.mark.parametrize("number", [1, SLOTS, SLOTS + 1])
@pytest.mark.parametrize("apart", [False, True], ids=["", "one lies in pieces"])
def test_what_a_launch_takes(number: int, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what torch copies instead."""
    copies = TensorCopies(Config())
    monkeypatch.setitem(copying.copiers, "cuda", copies)
    calls: list[int] = []
    copy = copies.copy
    monkeypatch.setattr(copies, "copy", lambda a, b: (calls.append(len(a)), copy(a, b)))
    sources = [torch.randn(40, n + 1, device="cuda") for n in range(number)]
    if apart:
        sources[-1] = torch.randn(40, 2 * number, device="cuda")[:, ::2]
    targets = [torch.zeros_like(source).contiguous() for source in sources]
    copying.copy_all(targets, sources)
    assert all(map(torch.equal, targets, sources))
    assert calls == ([number] if number <= SLOTS and not apart else [])


def test_offsets_beyond_2_to_the_31() -> None:
    """Tensors of more bytes, and of more numbers, than that."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("wants 12 GiB of free memory")
    source = torch.zeros(2**32 + 12, dtype=torch.uint8, device="cuda")
    source[-70:] = torch.arange(70, device="cuda")
    target = torch.ones_like(source)
    TensorCopies(Config()).copy([target], [source])
    assert torch.equal(target, source)
