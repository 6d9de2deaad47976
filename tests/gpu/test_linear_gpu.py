"""o3.Linear's kernels against float64 stock e3nn: values, first and second derivatives, on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # poisoned memory asks for it
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from comparison import accelerated, draw, usage
from e3nn import o3
from linear_parity import (
    CASES,
    IN_HALVES,
    STAGED,
    WEIGHTS_IN_HALVES,
    WEIGHTS_STAGED,
    built,
    check,
    scaled,
    scaled_weights,
    shrinkage,
)
from replays import assert_replay_equals_eager, warmed_up

from e3nn_accel import launch
from e3nn_accel.backends.cuda import indexed_linear_launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float64"),
]

MACE = ("128x0e+128x1o", "128x0e+128x1o")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 70, 600])
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives(case: str, rows: int, dtype: torch.dtype) -> None:
    module = built(*CASES[case])
    x = draw((rows, module.irreps_in.dim), 3).requires_grad_()
    check(module, x, dtype, device="cuda")


@pytest.mark.parametrize("rows", [1, 70, 5000])
@pytest.mark.parametrize("case", IN_HALVES)
def test_in_halves(case: str, rows: int) -> None:
    """Of many rows and of few."""
    module = built(*IN_HALVES[case])
    x = draw((rows, module.irreps_in.dim), 3).requires_grad_()
    check(module, x, torch.float32, device="cuda")


OF_MANY_ROWS = [
    *((irreps, torch.float32) for irreps in WEIGHTS_IN_HALVES.values()),
    *((irreps, torch.float64) for irreps in {**STAGED, **WEIGHTS_STAGED}.values()),
]


@pytest.mark.parametrize("rows", [1, 70, 5000])
@pytest.mark.parametrize(("irreps", "dtype"), OF_MANY_ROWS, ids=str)
def test_kernels_of_many_rows(
    irreps: tuple[str, str], dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any number of rows; on Hopper with warps that copy for the others, and blocks that have a tile of weights."""
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", -1)
    module = built(*irreps)
    x = draw((rows, module.irreps_in.dim), 3).requires_grad_()
    check(module, x, dtype, device="cuda")


def test_sizes_of_channels_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a gradient of weights, whose powers of two change from step to step: none is lost beside others."""
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", -1)
    errors, sizes = scaled_weights("cuda")
    assert (errors <= 1e-6 * sizes).all()


def test_sizes_of_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is lost beside others."""
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", -1)
    errors, sizes = scaled("cuda")
    assert (errors <= 1e-6 * sizes).all()


@pytest.mark.parametrize("width", [16, 64, 256])
def test_errors_of_single_precision_do_not_add_up(width: int) -> None:
    """As they would if nothing made up for tensor cores that round towards zero: it is 5e-8 then."""
    found = shrinkage("cuda", width, rows=40000)
    assert max(map(abs, found.values())) < 1.5e-8, found


def test_captured_in_a_cuda_graph() -> None:
    """A replay equals the eager call, bit by bit."""
    module = built(*MACE).to("cuda", torch.float32)
    x = draw((500, module.irreps_in.dim), 1, torch.float32).cuda().requires_grad_()

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(module(x).pow(2).sum(), (x, module.weight))

    with accelerated(backend="cuda"):
        warmed_up(gradients)
        assert usage(module) == {("linear", "cuda"): 3}
        assert_replay_equals_eager(gradients, x.normal_)


ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
LONG = ("2048x0e+512x1o", "2048x0e+512x1o")
OF_WEIGHTS = {"indexed_linear_weights"}
IN_HALVES_ON_HOPPER = {"linear_weights_in_halves", "sum_of_blocks"} if ON_HOPPER else OF_WEIGHTS
STAGED_ON_HOPPER = (
    {"linear_staged", "linear_weights_staged", "sum_of_blocks"}
    if ON_HOPPER
    else {"indexed_linear"} | OF_WEIGHTS
)
REPRODUCIBLE = {
    # irreps, rows, dtype, and the kernels that are launched
    "many rows": (MACE, 20_000, torch.float32, {"halve_weights", "linear_in_halves"} | IN_HALVES_ON_HOPPER),
    "few rows": (MACE, 70, torch.float32, {"indexed_linear"} | OF_WEIGHTS),
    "few rows, sums in slices": (LONG, 40, torch.float32, {"indexed_linear", "sum_shares"} | OF_WEIGHTS),
    "many rows, float64": (MACE, 20_000, torch.float64, STAGED_ON_HOPPER),
    "few rows, sums in slices, float64": (LONG, 40, torch.float64, {"indexed_linear", "sum_shares"} | OF_WEIGHTS),
}  # fmt: skip


@pytest.mark.parametrize("case", REPRODUCIBLE)
def test_bit_reproducible(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs give the same bits: the result, the gradients of features and of weights."""
    irreps, rows, dtype, kernels = REPRODUCIBLE[case]
    launched: set[str] = set()
    kernel_of = launch.LoadedProgram.kernel

    def noted(self: launch.LoadedProgram, name: str, parameters: str) -> Any:
        kernel = kernel_of(self, name, parameters)

        def run(*arguments: Any, **shared: int) -> None:
            launched.add(name)
            kernel(*arguments, **shared)

        return run

    monkeypatch.setattr(launch.LoadedProgram, "kernel", noted)
    module = built(*irreps).to("cuda", dtype)
    x = draw((rows, module.irreps_in.dim), 1, dtype).cuda().requires_grad_()
    with accelerated(self_check=False, backend="cuda"):
        runs = []
        for _ in range(2):
            out = module(x)
            g = torch.cos(out.detach())
            runs.append((out, *torch.autograd.grad(out, (x, module.weight), g)))
        assert usage(module) == {("linear", "cuda"): 2}
    assert launched == kernels
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_feature_columns(rows: int, dtype: torch.dtype) -> None:
    module = built(*MACE, f_in=2, f_out=3)
    check(module, draw((rows, 2, 512), 3).requires_grad_(), dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_weights_of_each_row(rows: int, dtype: torch.dtype) -> None:
    module = o3.Linear(*MACE, shared_weights=False, internal_weights=False)
    x = draw((rows, 512), 3).requires_grad_()
    w = draw((rows, module.weight_numel), 4).requires_grad_()
    check(module, x, dtype, device="cuda", w=w)
