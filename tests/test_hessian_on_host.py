"""MACE's Hessian on the kernels, on the CPU: it batches the backward pass, and where that can't be goes row by row."""

from __future__ import annotations

import pytest
import torch
from comparison import accelerated

import e3nn_accel

pytest.importorskip("mace", reason="MACE isn't installed")

from small_models import mace, molecules

pytestmark = [
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]


def test_hessian() -> None:
    """Within rounding of stock e3nn, every module in a plan of the cuda backend."""
    model, batch = mace().requires_grad_(False).eval(), molecules(1)

    def hessian() -> torch.Tensor:
        found: torch.Tensor = model(dict(batch), compute_hessian=True)["hessian"].detach()
        return found

    expected = hessian()
    with accelerated(self_check=False, backend="cuda"):
        found = hessian()
        kinds = {row.operation: row.backend for row in e3nn_accel.report().rows}
    assert {kinds[name] for name in ("linear", "convolution", "contraction")} == {"cuda"}
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
