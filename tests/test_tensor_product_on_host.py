"""The kernels for tensor products on the CPU: all modes against float64 stock e3nn, to the second derivative."""

from __future__ import annotations

import pytest
import torch
from product_parity import Product, check, every_mode

pytestmark = pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host")

DTYPES = [torch.float32, torch.float64]
UVU = tuple(
    (i, j, ir, "uvu", True, 0)
    for i, j, ir in [
        (0, 0, "0e"),
        (0, 1, "1o"),
        (1, 0, "1o"),
        (1, 1, "0e"),
        (1, 1, "1e"),
        (1, 1, "2e"),
        (0, 2, "2e"),
        (1, 2, "1o"),
    ]
)
CASES = {
    "pairs as they are": every_mode(3, "row", mixing=False),
    "pairs as they are, shared weights": every_mode(3, "shared", mixing=False),
    "mixed by rows": every_mode(3, "row", mixing=True),
    "mixed by shared weights": every_mode(3, "internal", mixing=True),
    "everything, weights of rows": every_mode(2, "row"),
    "everything, shared weights": every_mode(2, "shared"),
    "single channels": every_mode(1, "row"),
    "no weights": every_mode(3, "shared", weighted=False),
    "33 channels": Product("33x0e+33x1o", "0e+1o+2e", UVU),
    "33 channels, shared weights": Product("33x0e+33x1o", "0e+1o+2e", UVU, "shared"),
    "64 and 8 channels": Product("64x0e+8x1o", "0e+1o+2e", UVU),
    "160 channels": Product("160x0e", "0e+1o", UVU[:2]),
    "channels of the second input": Product(
        "0e+1o",
        "33x1o+9x0e",
        (
            (0, 0, "1o", "uvv", True, 0),
            (1, 0, "2e", "uvv", True, 0),
            (1, 1, "1o", "uvuv", False, 0),
        ),
    ),
    "channels, pairs and mixing": Product(
        "9x1o",
        "0e+9x1o",
        ((0, 0, "1o", "uvu", True, 0), (0, 1, "0e", "uuu", True, 0), (0, 1, "1e", "uvw", True, 5)),
    ),
    "wide mixing": Product(
        "40x0e+2x1o",
        "0e+1o",
        (
            (0, 0, "0e", "uvw", True, 150),
            (0, 1, "1o", "uvw", True, 40),
            (1, 1, "0e", "uvw", True, 150),
        ),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", list(CASES))
def test_values_and_derivatives(case: str, dtype: torch.dtype) -> None:
    check(CASES[case], 7, dtype)
