"""The radial MLP's kernels on the CPU against float64 stock e3nn, to the second derivative."""

from __future__ import annotations

import pytest
import torch
from comparison import draw
from radial_parity import CASES, check

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]


@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case: str) -> None:
    module = CASES[case].build()
    check(module, draw((70, module.hs[0]), 3).requires_grad_(), torch.float64)


@pytest.mark.parametrize("case", ["MACE", "odd widths", "wider than a tile", "tanh"])
def test_single_precision(case: str) -> None:
    module = CASES[case].build()
    check(module, draw((300, module.hs[0]), 3).requires_grad_(), torch.float32)
