"""Vectors and lengths of edges by kernels on the CPU, and which of MACE's calls they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import draw
from edge_vector_parity import CASES, check, drawn, ours, stock
from host_kernels import HostCompiler
from host_launch import HostError
from slow_cases import slow_but

from e3nn_accel import edge_geometry
from e3nn_accel.backends.cuda.edge_vectors import EdgeVectors
from e3nn_accel.config import Config

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("kernels_on_host")]
WHICH = ("both", "vectors", "lengths")


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float64), ids=str)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("case", CASES)
def test_all_derivatives(case: str, which: str, dtype: torch.dtype) -> None:
    check(case, which, dtype)


def test_gradcheck() -> None:
    """By finite differences, of edges that all have a length."""
    positions, shifts = (draw((n, 3), n).requires_grad_() for n in (4, 5))
    edge_index = torch.tensor([[0, 1, 1, 2, 3], [1, 0, 2, 2, 0]])
    function = lambda x, s: ours(x, s, edge_index)  # noqa: E731
    assert torch.autograd.gradcheck(function, (positions, shifts))
    assert torch.autograd.gradgradcheck(function, (positions, shifts))


def test_an_edge_without_length() -> None:
    """Has the gradient that torch gives a norm of zero, and spoils no other's second derivative."""
    positions = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 1, 0]])
    shifts = torch.zeros(4, 3, dtype=torch.float64)
    dv, dl = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    firsts = [
        torch.autograd.grad(
            f(positions, shifts, edge_index), positions, (dv, dl), create_graph=True
        )
        for f in (ours, stock)
    ]
    torch.testing.assert_close(firsts[0], firsts[1])
    (second,) = torch.autograd.grad(firsts[0][0].sin().sum(), positions)
    assert second.isfinite().all()


def test_gradients_are_torchs_to_the_bit() -> None:
    """Of an edge: sums over edges have an order of their own."""
    operands, edge_index = drawn("several blocks", torch.float32)
    found, expected = (
        torch.autograd.grad(f(*operands[:2], edge_index), operands[1], operands[2:])
        for f in (ours, stock)
    )
    lengths = [f(*operands[:2], edge_index)[1] for f in (ours, stock)]
    same = torch.eq(*lengths).squeeze(1)
    assert same.float().mean() > 0.5
    assert torch.equal(found[0][same], expected[0][same])


@pytest.mark.parametrize("wrong", slow_but([70, -71], -71))
@pytest.mark.parametrize("end", [0, 1])
def test_no_such_atom(wrong: int, end: int, kernels_on_host: HostCompiler) -> None:
    """Stops the kernel, as it stops torch's."""
    kernels_on_host.sanitizer = "address"
    (positions, shifts, _, _), edge_index = drawn("several blocks", torch.float64)
    edge_index = edge_index.clone()
    edge_index[end, 5] = wrong
    with pytest.raises(HostError, match="__trap"):
        ours(positions, shifts, edge_index)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(sanitizer: str, kernels_on_host: HostCompiler) -> None:
    kernels_on_host.sanitizer = sanitizer
    check("several blocks", "both", torch.float64)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """MACE's function with kernels for the CPU; what took each call."""
    taken: list[str] = []

    class Noted(EdgeVectors):
        def vectors(self, *operands: Any) -> Any:
            taken.append("kernels")
            return super().vectors(*operands)

    monkeypatch.setitem(edge_geometry.kernels, "cpu", Noted(Config()))
    return taken


def mace_function(taken: list[str]) -> Any:
    def get_edge_vectors_and_lengths(
        positions: Any, edge_index: Any, shifts: Any, normalize: bool = False
    ) -> Any:
        taken.append("stock")
        return stock(positions, shifts, edge_index)

    return edge_geometry.by_kernels(get_edge_vectors_and_lengths)


def test_calls_of_a_capture(on_the_cpu: list[str]) -> None:
    """Alone: another's forward may differentiate by vectors."""
    (positions, shifts, _, _), edge_index = drawn("several blocks", torch.float64)
    function = mace_function(on_the_cpu)
    expected = function(positions, edge_index, shifts)
    with edge_geometry.while_captured():
        found = function(positions=positions, edge_index=edge_index, shifts=shifts)
    function(positions, edge_index, shifts)
    assert on_the_cpu == ["stock", "kernels", "stock"]
    torch.testing.assert_close(found, expected)


def test_other_calls_are_maces(on_the_cpu: list[str]) -> None:
    (positions, shifts, _, _), edge_index = drawn("several blocks", torch.float64)
    function = mace_function(on_the_cpu)
    with edge_geometry.while_captured():
        function(positions, edge_index, shifts, normalize=False)
        function(positions, edge_index.int(), shifts)
        function(positions, edge_index, shifts.float())
        function(positions.half(), edge_index, shifts.half())
        function(positions, edge_index, shifts[:1])
        with pytest.raises(TypeError):
            function(positions)
    assert on_the_cpu == ["stock"] * 5
