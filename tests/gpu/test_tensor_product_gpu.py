"""The kernels for tensor products against float64 stock e3nn: values, first and second derivatives, on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory asks for it
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from comparison import derivatives, usage
from e3nn import o3
from product_parity import Product, check, every_mode
from replays import assert_replay_equals_eager, warmed_up

import e3nn_accel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

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
UVW = tuple(
    (i, j, ir, "uvw", True, n)
    for i, j, ir, n in [(0, 0, "0e", 48), (1, 1, "0e", 48), (0, 1, "1o", 10), (1, 0, "1o", 10)]
)
CASES = {
    "pairs as they are": every_mode(3, "row", mixing=False),
    "pairs as they are, shared weights": every_mode(33, "shared", mixing=False),
    "mixed by rows": every_mode(3, "row", mixing=True),
    "mixed by rows, 33 channels": Product(
        "33x0e+33x1o", "0e+1o", tuple((i, j, ir, "uvw", True, 33) for i, j, ir, *_ in UVU if j < 2)
    ),
    "mixed by rows, in parts": every_mode(11, "row", mixing=True),
    "mixed by shared weights": every_mode(33, "internal", mixing=True),
    "everything, weights of rows": every_mode(5, "row"),
    "everything, shared weights": every_mode(5, "shared"),
    "single channels": every_mode(1, "row"),
    "no weights": every_mode(3, "shared", weighted=False),
    "128 channels": Product("128x0e+128x1o", "0e+1o+2e", UVU),
    "33 channels": Product("33x0e+33x1o", "0e+1o+2e", UVU),
    "128 channels, shared weights": Product("128x0e+128x1o", "0e+1o+2e", UVU, "shared"),
    "64 and 8 channels": Product("64x0e+8x1o", "0e+1o+2e", UVU),
    "192 channels": Product("192x0e+192x1o", "0e+1o+2e", UVU),
    "channels of the second input": Product(
        "0e+1o",
        "33x1o+9x0e",
        (
            (0, 0, "1o", "uvv", True, 0),
            (1, 0, "2e", "uvv", True, 0),
            (1, 1, "1o", "uvuv", False, 0),
        ),
    ),
    "DiffDock": Product("48x0e+10x1o", "0e+1o", UVW),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", list(CASES))
def test_values_and_derivatives(case: str, dtype: torch.dtype) -> None:
    """Within rounding of stock e3nn, each path's part by itself."""
    check(CASES[case], 41, dtype, device="cuda")


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("case", ["33 channels", "DiffDock", "everything, shared weights"])
def test_odd_numbers_of_rows(case: str, rows: int) -> None:
    check(CASES[case], rows, torch.float64, device="cuda")


@pytest.mark.parametrize(
    "case",
    ["128 channels", "128 channels, shared weights", "DiffDock", "everything, shared weights"],
)
def test_bit_reproducible(case: str) -> None:
    """Two runs give the same bits, values and gradients."""
    module, operands = on_gpu(CASES[case], 20000)
    with e3nn_accel.enabled(strict=True):
        runs = [derivatives(lambda o: CASES[case].call(module, o), operands) for _ in range(2)]
        assert usage(module) == {("tensor_product", "cuda"): 2}
    assert all(torch.equal(a, runs[1].tensors[name]) for name, a in runs[0].tensors.items())


@pytest.mark.parametrize(
    "leading",
    [((2, 3), (2, 3), (2, 3)), ((4,), (1,), (4,)), ((3, 1), (2,), (3, 2)), ((0,), (0,), (0,))],
)
def test_leading_dimensions(leading: tuple[tuple[int, ...], ...]) -> None:
    """As e3nn broadcasts them."""
    product = CASES["33 channels"]
    module = product.build().to("cuda", torch.float64)
    dims = (module.irreps_in1.dim, module.irreps_in2.dim, module.weight_numel)
    x, y, w = (
        torch.randn(*n, d, device="cuda", dtype=torch.float64)
        for n, d in zip(leading, dims, strict=True)
    )
    expected = module(x, y, w)
    with e3nn_accel.enabled(strict=True):
        found = module(x, y, w)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["128 channels", "DiffDock", "everything, shared weights"])
def test_captured_in_a_cuda_graph(case: str) -> None:
    """A replay of forward and backward equals the eager call on new contents of the same tensors."""
    product = CASES[case]
    module, operands = on_gpu(product, 500)
    leaves = list(operands.values())

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(product.call(module, operands).pow(2).sum(), leaves)

    with e3nn_accel.enabled(strict=True):
        warmed_up(gradients)
        assert_replay_equals_eager(gradients, operands["x"].normal_)


def on_gpu(product: Product, rows: int) -> tuple[o3.TensorProduct, dict[str, torch.Tensor]]:
    """A module in float32 and leaves that want gradients."""
    module = product.build().to("cuda", torch.float32)
    drawn = product.operands(module, rows, torch.float32)
    return module, {k: t.detach().cuda().requires_grad_() for k, t in drawn.items()}
