"""Rows that begin beyond 2^31 numbers, by every kernel that goes row by row, against float64 stock e3nn on a GPU.

Those of convolutions are in test_convolution_gpu.py. A gradient flows into the first rows and the last, so that
stock e3nn needs no others, and the gradients of all rows between them are zero.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from typing import Any

import pytest
import torch
from comparison import accelerated, relative_error, strategy, usage
from linear_parity import built
from product_parity import TOLERANCE, Product
from radial_parity import Net

from e3nn_accel.backends.cuda import tensor_product_staged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float64"),
]

LIMIT = 2**31
ENDS = 40
"""Rows at each end that are compared."""
UVU = tuple(
    (i, j, ir, "uvu", True, 0)
    for i, j, ir in [(0, 0, "0e"), (0, 1, "1o"), (1, 0, "1o"), (1, 1, "0e"), (1, 1, "1e")]
)
UVW = tuple(
    (i, j, ir, "uvw", True, n)
    for i, j, ir, n in [(0, 0, "0e", 48), (1, 1, "0e", 48), (0, 1, "1o", 10), (1, 0, "1o", 10)]
)
CHANNELS = Product("128x0e+128x1o", "0e+1o", UVU)
PAIRS = Product("12x1o", "12x1o", ((0, 0, "1e", "uvuv", True, 0),))
DIFFDOCK = Product("48x0e+10x1o", "0e+1o", UVW)
PRODUCTS = {
    "channels": (CHANNELS, "a thread a channel"),
    "pairs": (PAIRS, "pairs of channels"),
    "mixed": (DIFFDOCK, "weights of rows"),
    "mixed, by bulk copies": (DIFFDOCK, "weights of rows by bulk copies"),
}


def room_for(gibibytes: int) -> None:
    """Skips where so much isn't free, what earlier tests have left to torch's allocator given back."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
        pytest.skip(f"wants {gibibytes} GiB of free memory")


def beyond(*widths: int) -> int:
    """Rows of these widths of which one reaches beyond the limit, by more than what is compared."""
    return LIMIT // max(widths) + 1000


def ends_of(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t[:ENDS], t[-ENDS:]])


def check(
    exact: Any,
    operation: str,
    widths: tuple[int, ...],
    rows: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cuda",
) -> str:
    """Values and first derivatives by all operands and parameters; how it ran."""
    exact = exact.to(device)
    ours = copy.deepcopy(exact).to(dtype)
    with torch.no_grad():
        for a, b in zip(exact.parameters(), ours.parameters(), strict=True):
            a.copy_(b)  # the same numbers, rounded once
    drawn = {"dtype": dtype, "device": device}
    inputs = [torch.randn(rows, width, requires_grad=True, **drawn) for width in widths]  # type: ignore[arg-type]
    with accelerated(self_check=False, backend="cuda"):
        out = ours(*inputs)
        g = torch.zeros_like(out)
        g[:ENDS].normal_()
        g[-ENDS:].normal_()
        found = torch.autograd.grad(out, [*inputs, *ours.parameters()], g)
        assert usage(ours) == {(operation, "cuda"): 1}
        ran = strategy(ours)
    of_rows, of_parameters = found[: len(inputs)], found[len(inputs) :]
    for t in of_rows:
        assert int(torch.count_nonzero(t[ENDS:-ENDS])) == 0
    results = [ends_of(t) for t in (out.detach(), *of_rows)]
    leaves = [ends_of(t.detach()).double().requires_grad_() for t in inputs]
    value = exact(*leaves)
    expected = torch.autograd.grad(value, [*leaves, *exact.parameters()], ends_of(g).double())
    of_values, of_gradients = TOLERANCE[dtype]
    tolerances = [of_values, *[of_gradients] * len(found)]
    for ours_of, stocks, tolerance in zip(
        [*results, *of_parameters], [value.detach(), *expected], tolerances, strict=True
    ):
        assert ours_of.shape == stocks.shape
        assert relative_error(ours_of, stocks) <= tolerance
    return ran


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_with_offsets_beyond_2_to_the_31(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the result, or of the weights; by each kernel."""
    room_for(60)
    product, words = PRODUCTS[case]
    if case == "mixed":
        monkeypatch.setattr(tensor_product_staged, "SHORTEST", LIMIT)
    module = product.build()
    widths = (module.irreps_in1.dim, module.irreps_in2.dim, module.weight_numel)
    ran = check(module, "tensor_product", widths, beyond(*widths, module.irreps_out.dim))
    assert words in ran
    assert ("bulk" in ran) == ("bulk" in case)


@pytest.mark.parametrize(
    ("dtype", "gibibytes"), [(torch.float32, 60), (torch.float64, 100)], ids=["float32", "float64"]
)
def test_linears_with_offsets_beyond_2_to_the_31(dtype: torch.dtype, gibibytes: int) -> None:
    """Of what goes in and of what comes out: by products of halves, and in float64, on Hopper by warps that copy."""
    room_for(gibibytes)
    module = built("128x0e+128x1o", "128x0e+128x1o")
    check(module, "linear", (512,), beyond(512), dtype)


def test_a_linear_of_odd_rows_with_offsets_beyond_2_to_the_31() -> None:
    """Which aren't copied four numbers at a time, and not cut in halves."""
    room_for(60)
    module = built("65x0e+65x1o", "33x0e+129x1o")
    check(module, "linear", (module.irreps_in.dim,), beyond(module.irreps_out.dim))


def test_radial_weights_with_offsets_beyond_2_to_the_31() -> None:
    """A net's last layer."""
    room_for(50)
    check(Net((8, 64, 64, 64, 1280)).build(), "radial_mlp", (8,), beyond(1280))


def test_hidden_layers_with_offsets_beyond_2_to_the_31() -> None:
    """Their results and the gradients that flow in."""
    room_for(60)
    check(Net((8, 64, 64, 64, 8)).build(), "radial_mlp", (8,), beyond(64))
