"""The kernels of the symmetric contraction on the CPU, against float64 stock MACE, to the second derivative."""

from __future__ import annotations

import pytest
import torch
from contraction_parity import check
from mace_parts import Contraction

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [pytest.mark.mace, pytest.mark.usefixtures("float64", "kernels_on_host")]

SMALL = Contraction("0e+1o", "0e+1o", 3)
CASES = {
    "correlation 1": Contraction("0e+1o", "0e+1o", 1),
    "correlation 2, l=2": Contraction("0e+1o+2e", "0e+1o+2e", 2, channels=1),
    "correlation 3": Contraction("0e+1o", "0e+1o", 3, channels=5),
    "correlation 4": Contraction("0e+1o", "1o+0e", 4, channels=33),
    "both parities": Contraction("0e+0o+1o+1e", "0e+0o+1o+1e", 2),
    "MACE": Contraction("0e+1o+2e+3o", "0e+1o", 3, channels=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", list(CASES))
def test_values_and_derivatives(case: str, dtype: torch.dtype) -> None:
    """Within rounding of stock MACE."""
    check(CASES[case], 7, dtype)
