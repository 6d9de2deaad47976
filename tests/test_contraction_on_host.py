"""The kernels of the symmetric contraction on the CPU, against float64 stock MACE, to the second derivative."""

from __future__ import annotations

import pytest
import torch
from comparison import accelerated, usage
from contraction_parity import check, check_operands
from host_kernels import HostCompiler
from mace_parts import ATTRS, Contraction, node_attrs
from slow_cases import slow_but

from e3nn_accel.backends.cuda import contraction_kernels
from e3nn_accel.backends.cuda.contraction import plan
from e3nn_accel.backends.cuda.contraction_schedule import Schedule
from e3nn_accel.config import Config
from e3nn_accel.descriptor import ContractionDescriptor
from e3nn_accel.patches.symmetric_contraction import e3nn_accel_describe
from e3nn_accel.plan import Plan, PlanContext, Refusal

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [
    pytest.mark.mace,
    pytest.mark.once,
    pytest.mark.usefixtures("float64", "kernels_on_host"),
]

SMALL = Contraction("0e+1o", "0e+1o", 3)
CASES = {
    "correlation 1": Contraction("0e+1o", "0e+1o", 1),
    "correlation 2, l=3": Contraction("0e+1o+2e+3o", "0e+1o+2e", 2, channels=1),
    "correlation 3": Contraction("0e+1o", "0e+1o", 3, channels=5),
    "correlation 4": Contraction("0e+1o", "1o+0e", 4, channels=33),
    "both parities": Contraction("0e+0o+1o+1e", "0e+0o+1o+1e", 2),
    "something that nothing reaches": Contraction("0e+1o", "0e+2e", 2),
}
LARGE = Contraction("0e+1o+2e+3o", "0e+1o+2e", 3, channels=2)


@pytest.mark.parametrize("case", slow_but(CASES, "correlation 1", "correlation 3", "both parities"))
def test_values_and_derivatives(case: str) -> None:
    """Within rounding of stock MACE."""
    check(CASES[case], 7, torch.float64)


@pytest.mark.parametrize("case", slow_but(["correlation 2, l=3", "correlation 3"], "correlation 3"))
def test_single_precision(case: str) -> None:
    check(CASES[case], 7, torch.float32)


def test_wrong_weights() -> None:
    """MACE's own errors: a kernel doesn't see where weights end."""
    shape = CASES["correlation 3"]
    module, x, y = shape.build(), shape.features(4), node_attrs("all species", 4)
    weights = [p for p in module.parameters() if p.numel()]
    for weight in weights:
        whole = weight.data
        with accelerated(backend="cuda", self_check=False):
            module(x, y)
            weight.data = whole[..., :-1].clone()
            with pytest.raises(RuntimeError) as ours:
                module(x, y)
            assert usage(module)["contraction", "cuda"] == 1
        with pytest.raises(RuntimeError) as stock:
            module(x, y)
        assert str(ours.value) == str(stock.value)
        weight.data = whole


@pytest.mark.slow
def test_rotation_equivariance() -> None:
    """Rotated and inverted features give a rotated and inverted result, from MACE's largest plan."""
    from e3nn import o3

    module, x, y = LARGE.build(), LARGE.features(4), node_attrs("all species", 4)
    rotation = -o3.matrix_x(torch.tensor(0.7)) @ o3.matrix_y(torch.tensor(1.9))
    into = o3.Irreps(LARGE.components).D_from_matrix(rotation)
    out = o3.Irreps([(2, ir) for _, ir in o3.Irreps(LARGE.outputs)]).D_from_matrix(rotation)
    with accelerated(backend="cuda"), torch.no_grad():
        found, expected = module(x @ into.T, y), module(x, y) @ out.T
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_gradgradcheck() -> None:
    """Second derivatives by features and weights against finite differences."""
    shape = Contraction("0e+1o", "0e+1o", 2, channels=1, species=2)
    module, y = shape.build(), node_attrs("all species", 2, 2)
    operands = (shape.features(2).requires_grad_(), *module.parameters())
    with accelerated(backend="cuda"):
        assert torch.autograd.gradgradcheck(lambda x, *_: module(x, y), operands)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitized(sanitizer: str, kernels_on_host: HostCompiler) -> None:
    """No race, nothing read or written that isn't there; one block is full, the other isn't."""
    kernels_on_host.sanitizer = sanitizer
    check(Contraction("0e+1o", "0e+1o", 2, channels=33), 5, torch.float64, "one row mixed")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mace(dtype: torch.dtype) -> None:
    """A thousand terms, in several passes."""
    check(LARGE, 7, dtype)


@pytest.mark.parametrize("attrs", slow_but(ATTRS, "sorted", "random", "one row mixed"))
@pytest.mark.parametrize("gradient", [False, True], ids=["constant", "wants gradient"])
def test_node_attrs(attrs: str, gradient: bool) -> None:
    """One-hot or not; blocks find the weights on the device."""
    check(SMALL, 7, torch.float64, attrs, gradient)


@pytest.mark.parametrize("nodes", [1, 40])
def test_numbers_of_nodes(nodes: int) -> None:
    """A part of a block, and several shares of a species' nodes."""
    check(SMALL, nodes, torch.float64, "absent species")


def test_no_nodes() -> None:
    """An empty result, and zero gradients; MACE itself can't reshape no rows."""
    module = SMALL.build()
    x = SMALL.features(0).requires_grad_()
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    with accelerated(self_check=False, backend="cuda"):
        out = module(x, node_attrs("all species", 0))
        found = torch.autograd.grad(out.sum(), leaves)
        assert usage(module) == {("contraction", "cuda"): 1}
    assert out.shape == (0, module.irreps_out.dim)
    assert not any(bool(t.any()) for t in found)


@pytest.mark.slow
def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be too long a code loops over tables."""
    monkeypatch.setattr(contraction_kernels, "MOST_LINES", 0)
    check(CASES["correlation 4"], 5, torch.float64)
    check(CASES["correlation 2, l=3"], 5, torch.float64, "one row mixed")


SCHEDULES = {
    "several passes and sections": Schedule(registers=0, section=10),
    "together": Schedule(threads=64, section=10, together=True, each=3),
    "several teams a node": Schedule(threads=32, each=2),
    "large blocks": Schedule(threads=256, blocks=2),
}


@pytest.mark.parametrize("name", slow_but(SCHEDULES, "several passes and sections"))
def test_schedules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was chosen by measuring, results are the same."""
    monkeypatch.setattr(contraction_kernels, "chosen", lambda *of: SCHEDULES[name])
    assert len(kernels().passes("forward", False)) > 2 or "passes" not in name
    check(SMALL, 5, torch.float64, "one row mixed")
    check(Contraction("0e+1o", "0e+1o", 2, channels=37), 5, torch.float32)


def test_a_view_that_begins_anywhere() -> None:
    """Rows of 16 bytes or more are read so many bytes at a time."""
    x = SMALL.features(6, dtype=torch.float32)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    module = SMALL.build(torch.float32)
    with accelerated(self_check=False, backend="cuda"):
        y = node_attrs("all species", 6).float()
        assert shifted.data_ptr() % 16
        assert torch.equal(module(shifted, y), module(x, y))


def test_operands_that_are_not_contiguous() -> None:
    """Features as MACE's reshape leaves them; one row of node_attrs for all."""
    x = SMALL.features(6).transpose(1, 2).contiguous().transpose(1, 2)
    y = node_attrs("one species", 1).expand(6, -1)
    assert not x.is_contiguous()
    check_operands(SMALL.build(), x, y)


def test_frozen_weights() -> None:
    """A model in evaluation."""
    check_operands(
        SMALL.build().requires_grad_(False), SMALL.features(5), node_attrs("all species", 5)
    )


def test_third_derivatives() -> None:
    """Those of the second are torch's own."""
    module, x = SMALL.build(), SMALL.features(3).requires_grad_()
    y = node_attrs("one row mixed", 3)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]

    def third() -> tuple[torch.Tensor, ...]:
        value = module(x, y).pow(2).sum()
        for _ in range(2):
            found = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((t * t.detach().cos()).sum() for t in found)
        return torch.autograd.grad(value, leaves)

    expected = third()
    with accelerated(self_check=False, backend="cuda"):
        found = third()
        assert usage(module) == {("contraction", "cuda"): 1}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_self_check_passes() -> None:
    """A plan is compared with stock MACE before its first use, and kept."""
    module = SMALL.build()
    with accelerated(self_check=True, backend="cuda"):
        module(SMALL.features(4), node_attrs("all species", 4))
        assert usage(module) == {("contraction", "cuda"): 1}


def test_weight_gradients_are_reproducible() -> None:
    """The same bits each time, also where nodes come in another order of species."""
    module, x = SMALL.build(), SMALL.features(50)
    y = node_attrs("all species", 50)
    weights = [p for p in module.parameters() if p.requires_grad]
    with accelerated(self_check=False, backend="cuda"):
        first, second = (torch.autograd.grad(module(x, y).sum(), weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_refusals() -> None:
    """With the reason; another backend has a plan."""
    assert "no path" in str(planned(Contraction("0e", "1o", 1)))


def kernels() -> contraction_kernels.FusedContraction:
    descriptor = e3nn_accel_describe(SMALL.build(), "contraction")
    assert isinstance(descriptor, ContractionDescriptor)
    from e3nn_accel.backends.cuda.contraction_paths import Paths

    context = PlanContext(torch.float64, torch.device("cpu"), Config())
    return contraction_kernels.FusedContraction(Paths.of(descriptor, 2e-16), context, "")


def planned(shape: Contraction) -> Plan | Refusal:
    descriptor = e3nn_accel_describe(shape.build(), "contraction")
    assert isinstance(descriptor, ContractionDescriptor)
    return plan(descriptor, PlanContext(torch.float64, torch.device("cpu"), Config()))
