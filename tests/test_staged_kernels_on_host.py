"""The convolution's kernels that move whole rows, on the CPU, where copies are as late as they may be."""

from __future__ import annotations

import pytest
import torch
from comparison import accelerated, derivatives
from convolution_parity import check, every_path, fused, hub, operands_of
from graphs import random_edges
from slow_cases import slow_but

from e3nn_accel.backends.cuda import convolution_kernels
from e3nn_accel.backends.cuda.convolution_kernels import FusedConvolution, Variant
from e3nn_accel.overwriting import OVERWRITTEN, differentiated_once

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host", "hopper"),
]

SH = "0e+1o+2e+3o"
CASES = {
    "MACE layer 1": ("36x0e", SH, SH),
    "MACE layer 2": ("36x0e+36x1o", SH, SH),
    "four warps": ("128x0e+128x1o", "0e+1o", "0e+1o"),
    "mixed multiplicities": ("64x0e+32x1e+4x2e", "0e+1e", "0e+1e+2e"),
    "several channels of the second input": ("8x0e+8x1o", "2x0e+3x1o", "0e+1o"),
}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """Plans are made for compute capability 9.0; notes which variants of the kernels run."""
    seen: list[Variant] = []
    choose = FusedConvolution.variant

    def noted(self: FusedConvolution, *args: object) -> Variant:
        found = choose(self, *args)  # type: ignore[arg-type]
        if len(args) == 3:  # with operands, so it is to run and not planned
            seen.append(found)
        return found

    monkeypatch.setattr(convolution_kernels, "architecture_of", lambda device: 90)
    monkeypatch.setattr(FusedConvolution, "variant", noted)
    return seen


def kinds(seen: list[Variant]) -> set[tuple[str, bool]]:
    """Which kinds ran, and whether staged."""
    return {(v.kind, v.staged) for v in seen}


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float32), ids=str)
@pytest.mark.parametrize("case", list(CASES))
def test_values_and_derivatives(case: str, dtype: torch.dtype, hopper: list[Variant]) -> None:
    """First and second derivatives, by every operand, with more edges of a node than a batch holds."""
    module, ends = every_path(*CASES[case]), hub()
    check(module, ends, operands_of(module, 7, ends.shape[1], dtype), dtype)
    assert kinds(hopper) == {("forward", True), ("backward", True), ("double", True)}


@pytest.mark.parametrize(("nodes", "edges"), [(4, 0), (1, 3), (1, 70), (40, 6)])
def test_odd_graphs(nodes: int, edges: int, hopper: list[Variant]) -> None:
    """No edges, one node, one node with several batches, mostly isolated nodes."""
    module = every_path("8x0e+8x1o", "0e+1o", "0e+1o")
    ends = random_edges(nodes, edges, seed=2)
    check(module, ends, operands_of(module, nodes, edges, torch.float64), torch.float64)
    assert ("forward", True) in kinds(hopper)


@pytest.mark.parametrize("blocks", [2, 5])
def test_blocks_that_share_a_receiver(
    blocks: int, hopper: list[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few receivers: some shares are empty, some longer than a batch."""
    monkeypatch.setattr(convolution_kernels, "shares", lambda *of: blocks)
    monkeypatch.setattr(convolution_kernels, "sums_of_shares", lambda *of: blocks)
    module, ends = every_path("8x0e+8x1o", "0e+1o", "0e+1o"), hub()
    check(module, ends, operands_of(module, 7, ends.shape[1], torch.float64), torch.float64)
    assert {("forward", True), ("backward", True)} <= kinds(hopper)


@pytest.mark.parametrize("wanted", ["x", "w", "xy", "yw", "xw"])
def test_only_the_gradients_that_are_asked_for(wanted: str, hopper: list[Variant]) -> None:
    """Some gradients alone equal the same gradients among all."""
    module, ends = every_path("8x0e+8x1o", "0e+1o", "0e+1o"), hub()
    check(module, ends, operands_of(module, 7, 60, torch.float64, wanted), torch.float64)
    assert ("backward", True) in kinds(hopper)


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float64), ids=str)
def test_a_gradient_over_the_weights(dtype: torch.dtype, hopper: list[Variant]) -> None:
    """The same bits as beside them; a second walk through the graph is torch's error."""
    module, ends = every_path("36x0e+36x1o", "0e+1o", "0e+1o").to(dtype), hub()
    operands = operands_of(module, 7, ends.shape[1], dtype)
    names, leaves = list(operands), list(operands.values())
    with accelerated(backend="cuda", self_check=False):
        convolve = fused(module, ends)
        expected = torch.autograd.grad(convolve(operands).square().sum(), leaves)
        with differentiated_once():
            computed = {**operands, "weight": operands["weight"] * 1}
            loss = convolve(computed).square().sum()
        last = torch.autograd.grad(loss, [computed[n] for n in names], retain_graph=True)
        found = [*last[:2], last[2].clone()]
        assert last[2].data_ptr() == computed["weight"].data_ptr()
        with pytest.raises(RuntimeError, match=OVERWRITTEN):
            torch.autograd.grad(loss, leaves)
    assert ("backward", True) in kinds(hopper)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("whose", ["a leaf", "not aligned", "differentiated twice"])
def test_weights_that_are_kept(whose: str, hopper: list[Variant]) -> None:
    """Those of the caller, those that another kernel reads, and those that second derivatives want."""
    module, ends = every_path("8x0e+8x1o", "0e+1o", "0e+1o"), hub()
    operands = operands_of(module, 7, ends.shape[1], torch.float64)
    weight = operands["weight"]
    if whose == "not aligned":
        room = torch.empty(weight.numel() + 1, dtype=weight.dtype)
        operands["weight"] = weight = room[1:].view_as(weight).copy_(weight * 1)
    elif whose == "differentiated twice":
        operands["weight"] = weight = weight * 1
    before = weight.detach().clone()
    with accelerated(backend="cuda", self_check=False), differentiated_once():
        loss = fused(module, ends)(operands).square().sum()
        gradient = torch.autograd.grad(
            loss, list(operands.values()), create_graph=whose == "differentiated twice"
        )[2]
    assert torch.equal(weight, before)
    assert gradient.data_ptr() != weight.data_ptr()


def test_weights_that_something_else_keeps() -> None:
    """Its gradient is torch's error rather than one of other weights."""
    module, ends = every_path("8x0e+8x1o", "0e+1o", "0e+1o"), hub()
    operands = operands_of(module, 7, ends.shape[1], torch.float64)
    with accelerated(backend="cuda", self_check=False), differentiated_once():
        weight = operands["weight"] * 1
        squares = weight.square().sum()  # made before, so that its gradient comes after
        loss = fused(module, ends)({**operands, "weight": weight}).square().sum() + squares
        with pytest.raises(RuntimeError, match=OVERWRITTEN):
            torch.autograd.grad(loss, list(operands.values()))


def test_operands_that_are_not_aligned(hopper: list[Variant]) -> None:
    """A view that starts within 16 bytes takes the kernels that move single numbers."""
    module, ends = every_path("8x0e+8x1o", "0e+1o", "0e+1o"), hub()
    operands = operands_of(module, 7, 60, torch.float32)
    shifted = torch.empty(operands["weight"].numel() + 1, dtype=torch.float32)[1:].view_as(
        operands["weight"]
    )
    operands["weight"] = shifted.copy_(operands["weight"].detach()).requires_grad_()
    check(module, ends, operands, torch.float32)
    assert kinds(hopper) == {("forward", False), ("backward", False), ("double", False)}


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float64), ids=str)
def test_float_atomics_are_an_option(dtype: torch.dtype, hopper: list[Variant]) -> None:
    """Asked for, the features' gradient is added up by them, but not against torch's own switch."""
    module, ends = every_path("36x0e+36x1o", "0e+1o", "0e+1o").to(dtype), hub()
    operands = operands_of(module, 7, 60, dtype)
    with accelerated(backend="cuda", self_check=False):
        exact = derivatives(fused(module, ends), operands)
    assert not any(v.atomics for v in hopper)
    with accelerated(backend="cuda", self_check=False, deterministic=False):
        found = derivatives(fused(module, ends), operands)
        assert {v.kind for v in hopper if v.atomics} == {"backward", "double"}
        hopper.clear()
        torch.use_deterministic_algorithms(True)
        try:
            derivatives(fused(module, ends), operands)
        finally:
            torch.use_deterministic_algorithms(False)
    assert not any(v.atomics for v in hopper)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor, exact.tensors[name], rtol=tolerance, atol=tolerance)
