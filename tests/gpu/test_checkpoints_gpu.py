"""Real trained models on a GPU: the numbers of stock e3nn, and kernels for every product and linear.

Checkpoints are looked for where tests/test_checkpoints.py does; where there are none, all but the shipped model are
skipped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

pytest.importorskip("mace", reason="MACE isn't installed")

from e3nn import o3
from test_checkpoints import CASES, SHIPPED, assert_equal_to_stock, checkpoint, structures

import e3nn_accel
from e3nn_accel.parity import compare
from e3nn_accel.reporting import Row
from e3nn_accel.structures import load_mace, read_structures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.mace,
    pytest.mark.checkpoints,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OURS = (o3.TensorProduct, o3.FullyConnectedTensorProduct, o3.Linear)
BOTH = pytest.mark.parametrize("dtype", ["float32", "float64"])
NAMES = {cls.__name__ for cls in OURS}


def assert_on_kernels(rows: Iterable[Row]) -> None:
    """Each of the classes has rows, and none on anything but kernels."""
    found = [row for row in rows if row.cls in NAMES]
    assert {row.cls for row in found} == NAMES
    assert not [row for row in found if row.backend != "cuda"]


def check(model: Any, atoms: Any, dtype: str, train: bool = False) -> None:
    """As `e3nn-accel verify` compares; what has run, and what every module would run.

    In as many views as a structure's size asks for: on a GPU stock's own float32 stress of 160 atoms is off by 1e-6
    in one run and by 1.7e-6 in the next, for its sums are atomic.
    """
    with e3nn_accel.enabled():
        parity = compare(model, atoms, [dtype], train=train, device="cuda")
        assert_on_kernels(e3nn_accel.report().rows)
    assert_equal_to_stock(parity)
    model = model.to("cuda", getattr(torch, dtype))
    rows = e3nn_accel.explain(model).rows
    assert_on_kernels(rows)
    wanted = {path for path, module in model.named_modules() if type(module) in OURS}
    assert wanted <= {row.path for row in rows}


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_checkpoints(name: str, dtype: str) -> None:
    check(checkpoint(name), structures(name), dtype)


@BOTH
def test_the_shipped_model(dtype: str) -> None:
    """Gradients of a loss by every parameter, too."""
    model = load_mace(SHIPPED / "water_ethanol.model")
    check(model, read_structures(SHIPPED / "structures.xyz")[:1], dtype, train=True)
