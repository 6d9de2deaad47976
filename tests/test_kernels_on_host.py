"""The cuda backend on the CPU: its plans, operations and kernels against float64 stock e3nn."""

from __future__ import annotations

import pytest
import torch
from comparison import accelerated, draw, poisoned_memory, usage
from convolution_parity import check, every_path, fused, hub, operands_of, shared_outputs, unfused
from graphs import GRAPHS
from slow_cases import slow_but

import e3nn_accel
from e3nn_accel.backends.cuda import convolution_kernels
from e3nn_accel.backends.cuda.convolution_schedule import Schedule, shares, sums_of_shares
from e3nn_accel.graphs.padding import Capacity, Size

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]

SH = "0e+1o+2e+3o"
TARGET = "0e+0o+1e+1o+2e+2o"
CASES = {
    "MACE layer 1": ("40x0e", SH, SH),
    "MACE layer 2": ("33x0e+33x1o", SH, SH),
    "several warps and chunks": ("160x0e+160x1o", "0e+1o", "0e+1o"),
    "mixed multiplicities": ("64x0e+33x1e+5x2e", "0e+1e+2e", "0e+1e+2e"),
    "odd multiplicities": ("5x0e+3x1o", "0e+1o", "0e+1o"),
    "several channels of the second input": ("8x0e+8x1o", "2x0e+3x1o", "0e+1o"),
    "several groups": ("+".join(f"8x{degree}" for degree in TARGET.split("+")), "0e+1o+2e", TARGET),
}
SMALL = ("5x0e+3x1o", "0e+1o", "0e+1o")


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float64), ids=str)
@pytest.mark.parametrize("case", list(CASES))
def test_values_and_derivatives(case: str, dtype: torch.dtype) -> None:
    """First and second derivatives, by every operand."""
    module, ends = every_path(*CASES[case]), hub()
    check(module, ends, operands_of(module, 7, ends.shape[1], dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unweighted_paths_and_shared_outputs(dtype: torch.dtype) -> None:
    module, ends = shared_outputs(), hub()
    check(module, ends, operands_of(module, 7, ends.shape[1], dtype), dtype)


@pytest.mark.parametrize("graph", [name for name in GRAPHS if name != "no nodes"])
def test_odd_graphs(graph: str) -> None:
    """No edges, one edge, isolated nodes, one receiver, and so on."""
    module, (nodes, ends) = every_path(*SMALL), GRAPHS[graph]
    check(module, ends, operands_of(module, nodes, ends.shape[1], torch.float64), torch.float64)


@pytest.mark.parametrize("blocks", [2, 5])
def test_blocks_that_share_a_receiver(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are few of them; some shares are empty."""
    monkeypatch.setattr(convolution_kernels, "shares", lambda *of: blocks)
    monkeypatch.setattr(convolution_kernels, "sums_of_shares", lambda *of: blocks)
    for module in (every_path(*CASES["several groups"]), shared_outputs()):
        ends = hub()
        check(module, ends, operands_of(module, 7, ends.shape[1], torch.float64), torch.float64)


@pytest.mark.parametrize(
    ("nodes", "edges", "expected"),
    [(64, 3000, 8), (1000, 46000, 1), (64, 500, 1), (1, 500, 16), (0, 0, 1), (9, 0, 1)],
)
def test_how_many_share_a_receiver(nodes: int, edges: int, expected: int) -> None:
    """As many as fill the device, if they have enough to do."""
    layout = Schedule(threads=128, chunks=1, edges=32, blocks=4)
    assert shares(layout, nodes, edges, multiprocessors=132) == expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [(0, 1), (1, 4), (165, 4), (166, 2), (330, 2), (331, 1), (9999, 1)],
)
def test_how_many_share_a_sum(nodes: int, expected: int) -> None:
    """Fewer: what they make is added up by another launch."""
    assert sums_of_shares(1, nodes, multiprocessors=132) == expected


@pytest.mark.parametrize(
    "nodes", [1, 2, 9, 20, 64, 100, 108, 128, 192, 200, 216, 250, 343, 512, 1000]
)
def test_replays_add_up_in_the_same_order(nodes: int) -> None:
    """A graph and what it is padded to, on an H100."""
    padded = Capacity.of(Size(nodes, 40 * nodes, graphs=1)).nodes
    assert padded > nodes
    assert sums_of_shares(1, padded, 132) == sums_of_shares(1, nodes, 132)


@pytest.mark.parametrize("wanted", ["x", "y", "w", "xy", "xw", "yw"])
def test_only_the_gradients_that_are_asked_for(wanted: str) -> None:
    """Kernels are compiled for what is wanted of them."""
    module, ends = every_path(*SMALL), hub()
    operands = operands_of(module, 7, ends.shape[1], torch.float64, wanted)
    check(module, ends, operands, torch.float64)


def test_operands_that_are_not_contiguous() -> None:
    """Columns out of wider rows, transposed weights, one row of the second input for all edges."""
    module, ends = every_path(*SMALL), hub()
    edges = ends.shape[1]
    operands = {
        "x": draw((7, 2 * module.irreps_in1.dim), 1)[:, ::2].requires_grad_(),
        "y": draw((1, module.irreps_in2.dim), 2).expand(edges, -1).requires_grad_(),
        "weight": draw((module.weight_numel, edges), 3).T.requires_grad_(),
    }
    assert not any(t.is_contiguous() for t in operands.values())
    check(module, ends.T.contiguous().T, operands, torch.float64)


def test_a_gradient_without_memory_of_its_own() -> None:
    """That of a sum is one number, expanded."""
    module, ends = every_path(*SMALL), hub()
    operands = operands_of(module, 7, ends.shape[1], torch.float64)
    leaves = list(operands.values())
    expected = torch.autograd.grad(unfused(module, ends)(operands).sum(), leaves)
    with accelerated(self_check=False), poisoned_memory():
        found = torch.autograd.grad(fused(module, ends)(operands).sum(), leaves)
    for ours, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


def test_self_check_passes() -> None:
    """A plan is compared with stock e3nn before its first use, and kept."""
    module, ends = every_path(*SMALL), hub()
    with e3nn_accel.enabled(strict=True, self_check=True):
        fused(module, ends)(operands_of(module, 7, ends.shape[1], torch.float64))
        assert usage(module) == {("convolution", "cuda"): 1}


def test_third_derivatives() -> None:
    """Composed of the first two."""
    module, ends = every_path(*SMALL), hub()
    exact = operands_of(module, 7, ends.shape[1], torch.float64)

    def third(out: torch.Tensor) -> list[torch.Tensor]:
        level = (out**3).sum()
        for order in range(3):
            found = torch.autograd.grad(level, list(exact.values()), create_graph=order < 2)
            level = sum((t**2).sum() for t in found)  # type: ignore[assignment]
        return list(found)

    expected = third(unfused(module, ends)(exact))
    with accelerated(self_check=False), poisoned_memory():
        found = third(fused(module, ends)(exact))
    for ours, stock in zip(found, expected, strict=True):
        assert float((ours - stock).norm()) <= 1e-11 * float(stock.norm())
