"""Products in tf32 and bf16, which have to be asked for, on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from precision_parity import ERRORS, errors, linear, skip

from e3nn_accel.config import Precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float64"),
]


@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize("make", [linear, skip])
def test_errors_are_those_of_the_format(make: Any, precision: Precision) -> None:
    module, inputs = make()
    least, most = ERRORS[precision]
    found = errors(module, inputs, torch.float32, "cuda", precision=precision)
    assert all(least < error < 2 * most for error in found.values()), found


@pytest.mark.parametrize("make", [linear, skip])
def test_float32_stays_float32_and_float64_is_never_rounded(make: Any) -> None:
    module, inputs = make()
    assert max(errors(module, inputs, torch.float32, "cuda").values()) < 2e-6
    found = errors(module, inputs, torch.float64, "cuda", precision="bf16")
    assert max(found.values()) < 1e-12
