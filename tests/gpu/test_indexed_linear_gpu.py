"""The species-indexed linear's kernels against float64 stock e3nn: values, first and second derivatives, on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory asks for it
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from typing import Any

import pytest
import torch
from comparison import accelerated, draw
from indexed_parity import SHAPES, built, check
from mace_parts import ATTRS, node_attrs
from replays import assert_replay_equals_eager, warmed_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
MACE = ("128x0e+128x1o", "89x0e", "128x0e+128x1o")


@pytest.fixture(autouse=True)
def attrs_in_float64(float64: None) -> None:
    """They are drawn exactly and rounded with the other operands."""


@BOTH
@pytest.mark.parametrize("attrs", ATTRS)
def test_attrs(attrs: str, dtype: torch.dtype) -> None:
    """Sorted or not, absent species, scaled rows, rows that aren't one-hot, rows of zeros."""
    check(("33x0e+5x1o", "4x0e", "5x0e+70x1o"), node_attrs(attrs, 90, 4), dtype, "cuda")


@BOTH
@pytest.mark.parametrize("irreps", SHAPES.values(), ids=SHAPES)
def test_shapes(irreps: tuple[str, str, str], dtype: torch.dtype) -> None:
    species = int(irreps[1].split("x")[0])
    check(irreps, node_attrs("one row mixed", 12, species), dtype, "cuda")


@BOTH
@pytest.mark.parametrize("channels", [1, 5, 33, 128, 192])
def test_channels(channels: int, dtype: torch.dtype) -> None:
    irreps = f"{channels}x0e+{channels}x1o"
    check((irreps, "3x0e", irreps), node_attrs("all species", 50, 3), dtype, "cuda")


@BOTH
@pytest.mark.parametrize("rows", [0, 1, 2, 70, 600])
def test_numbers_of_rows(rows: int, dtype: torch.dtype) -> None:
    check(("8x0e+8x1o", "4x0e", "8x0e+8x1o"), node_attrs("all species", rows, 4), dtype, "cuda")


def on_gpu(rows: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """MACE's skip connection in float32, features that want gradients, species."""
    module = built(MACE).to("cuda", torch.float32)
    x = draw((rows, module.irreps_in1.dim), 1, torch.float32).cuda().requires_grad_()
    return module, x, node_attrs("all species", rows, 89).float().cuda()


def gradients(module: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the features and of the weights."""
    return torch.autograd.grad(module(x, y).pow(2).sum(), (x, module.weight))


def test_bit_reproducible() -> None:
    """Two runs give the same bits."""
    module, x, y = on_gpu(5000)
    with accelerated(backend="cuda"):
        first, second = (gradients(module, x, y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_captured_in_a_cuda_graph() -> None:
    """A replay equals the eager call on new features and on new species in the same tensors."""
    module, x, y = on_gpu(500)
    with accelerated(backend="cuda"):
        warmed_up(lambda: gradients(module, x, y))
        assert_replay_equals_eager(
            lambda: gradients(module, x, y), lambda: (x.normal_(), y.copy_(y.flip(0)))
        )
