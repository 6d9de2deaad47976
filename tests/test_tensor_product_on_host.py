"""The kernels for tensor products on the CPU: all modes against float64 stock e3nn, to the second derivative."""

from __future__ import annotations

import pytest
import torch
from comparison import accelerated, draw, usage
from e3nn import o3
from product_parity import Product, check, every_mode
from slow_cases import slow_but

from e3nn_accel.backends.cuda import tensor_product
from e3nn_accel.config import Config
from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.patches.tensor_product import e3nn_accel_describe
from e3nn_accel.plan import PlanContext, Refusal

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
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
CASES = {
    "pairs as they are, shared weights": every_mode(3, "shared", mixing=False),
    "mixed by shared weights": every_mode(3, "internal", mixing=True),
    "everything, weights of rows": every_mode(3, "row"),
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


SINGLE = (
    "pairs as they are, shared weights",
    "mixed by shared weights",
    "33 channels",
    "channels of the second input",
)
"""What is tried in single precision, too."""


@pytest.mark.parametrize(
    "case",
    slow_but(
        CASES,
        "pairs as they are, shared weights",
        "mixed by shared weights",
        "everything, weights of rows",
        "33 channels",
        "channels, pairs and mixing",
        "wide mixing",
    ),
)
def test_values_and_derivatives(case: str) -> None:
    """Within rounding of stock e3nn, each path's part by itself."""
    check(CASES[case], 7, torch.float64)


@pytest.mark.parametrize("case", slow_but(SINGLE, "mixed by shared weights", "33 channels"))
def test_single_precision(case: str) -> None:
    check(CASES[case], 7, torch.float32)


@pytest.mark.parametrize("rows", slow_but([0, 1, 17], 0))
@pytest.mark.parametrize("case", ["33 channels", "wide mixing", "everything, shared weights"])
def test_odd_numbers_of_rows(case: str, rows: int) -> None:
    """None, and a batch and a bit."""
    check(CASES[case], rows, torch.float64)


def test_third_derivatives() -> None:
    """Derivatives of the second are composed of the first, also where there is a kernel for it."""
    for case in ("64 and 8 channels", "wide mixing"):
        module = CASES[case].build()
        operands = CASES[case].operands(module, 3, torch.float64)
        leaves = list(operands.values())

        def third() -> tuple[torch.Tensor, ...]:
            value = CASES[case].call(module, operands).pow(2).sum()  # noqa: B023 - called at once
            for n in range(2):
                found = torch.autograd.grad(value, leaves, create_graph=True)  # noqa: B023
                value = sum((t * (t + n).detach().cos()).sum() for t in found)
            return torch.autograd.grad(value, leaves)  # noqa: B023

        expected = third()
        with accelerated(self_check=False):
            found = third()
            assert {backend for _, backend in usage(module)} == {"cuda"}
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_operands_that_broadcast_and_are_not_contiguous() -> None:
    """Columns of wider rows, one row of the second input for all, leading dimensions."""
    module = CASES["33 channels"].build()
    x = draw((2, 3, 2 * module.irreps_in1.dim), 1)[..., ::2].requires_grad_()
    y = draw((3, module.irreps_in2.dim), 2).requires_grad_()
    w = draw((module.weight_numel, 2, 1), 3).permute(1, 2, 0).requires_grad_()
    compare_gradients(module, (x, y, w))


def test_columns_of_wider_rows() -> None:
    """Rows that need no other shape reach the kernels as they are, and second derivatives reach them."""
    module = CASES["33 channels"].build()
    shapes = module.irreps_in1.dim, module.irreps_in2.dim, module.weight_numel
    wide = (draw((dim, 4), seed).t().requires_grad_() for seed, dim in enumerate(shapes))
    compare_gradients(module, tuple(wide))


def compare_gradients(module: o3.TensorProduct, operands: tuple[torch.Tensor, ...]) -> None:
    """Value, first and second derivatives by the kernels and by stock e3nn."""

    def gradients() -> tuple[torch.Tensor, ...]:
        out = module(*operands)
        first = torch.autograd.grad(out.pow(2).sum(), operands, create_graph=True)
        return (out, *first, *torch.autograd.grad(sum(g.sin().sum() for g in first), operands))

    expected = gradients()
    with accelerated(self_check=False):
        found = gradients()
        assert usage(module) == {("tensor_product", "cuda"): 1}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (("4x8e", "3x0e", "4x8e"), "degree 8"),
        (("200x0e", "100x0e+1o", "2x0e"), "a path of 20000 pairs of channels"),
    ],
    ids=["species", "pairs"],
)
def test_refusals(module: tuple[str, str, str], reason: str) -> None:
    """With the reason; another backend has a plan."""
    descriptor = e3nn_accel_describe(o3.FullyConnectedTensorProduct(*module), "tensor_product")
    assert isinstance(descriptor, TensorProductDescriptor)
    context = PlanContext(torch.float64, torch.device("cpu"), Config())
    refused = tensor_product.plan(descriptor, context)
    assert isinstance(refused, Refusal)
    assert reason in refused.reason
