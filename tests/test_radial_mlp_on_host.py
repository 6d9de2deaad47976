"""The radial MLP's kernels on the CPU against float64 stock e3nn, to the second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import accelerated, draw, poisoned_memory, usage
from host_kernels import HostCompiler, race_shown
from kernel_barriers import barriers, without
from linear_parity import rows_alone_and_together
from radial_parity import CASES, Net, check
from slow_cases import slow_but

from e3nn_accel.backends.cuda import CudaBackend, indexed_linear_launch
from e3nn_accel.backends.cuda.radial_mlp_kernels import RadialMlpKernels
from e3nn_accel.config import Config
from e3nn_accel.health import registry
from e3nn_accel.plan import Plan, PlanContext, Refusal

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]


@pytest.mark.parametrize("case", slow_but(CASES, "MACE", "odd widths", "wider than a tile", "relu"))
def test_values_and_derivatives(case: str) -> None:
    module = CASES[case].build()
    check(module, draw((70, module.hs[0]), 3).requires_grad_(), torch.float64)


@pytest.mark.parametrize(
    "case",
    [
        "MACE",
        "odd widths",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("wider than a tile", "tanh")),
    ],
)
def test_single_precision(case: str) -> None:
    module = CASES[case].build()
    check(module, draw((300, module.hs[0]), 3).requires_grad_(), torch.float32)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), ()])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    module = Net((8, 16, 16, 12)).build()
    check(module, draw((*shape, 8), 3).requires_grad_(), torch.float64)


def test_no_edges_no_gradient() -> None:
    """Weights have a gradient of zeros then, as with stock."""
    module = Net((8, 16, 12)).build()
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        out = module(draw((0, 8), 1).requires_grad_())
        found = torch.autograd.grad(out.sum(), list(module.parameters()))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in found)


@pytest.mark.parametrize(
    "case", slow_but(["columns", "transposed", "expanded", "offset"], "columns", "expanded")
)
def test_operands_that_are_not_contiguous(case: str) -> None:
    x = {
        "columns": draw((70, 11), 1)[:, 2:10],
        "transposed": draw((8, 70), 1).T,
        "expanded": draw((1, 8), 1).expand(70, 8),
        "offset": draw((561,), 1)[1:].view(70, 8),
    }[case]
    module = Net((8, 16, 16, 12)).build()
    module.layer1.weight = torch.nn.Parameter(module.layer1.weight.detach().T.contiguous().T)
    check(module, x.requires_grad_(), torch.float64)


@pytest.mark.parametrize(
    "wanted",
    slow_but(["x", "layer0", "layer1", "layer2", "x layer2", "layer0 layer1"], "x", "x layer2"),
)
def test_only_the_gradients_that_are_asked_for(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights cost nothing; neither do those that ``autograd.grad`` isn't asked for."""
    given: list[tuple[bool, ...]] = []
    original = RadialMlpKernels.backward

    def backward(self: Any, g: Any, x: Any, weights: Any, asked: tuple[bool, ...]) -> Any:
        given.append(asked)
        return original(self, g, x, weights, asked)

    monkeypatch.setattr(RadialMlpKernels, "backward", backward)
    module, x = Net((8, 16, 16, 12)).build(), draw((70, 8), 3).requires_grad_()
    leaves = {"x": x} | {n.removesuffix(".weight"): p for n, p in module.named_parameters()}
    chosen = [leaves[name] for name in wanted.split()]
    expected = torch.autograd.grad(module(x).square().sum(), chosen)
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        found = torch.autograd.grad(module(x).square().sum(), chosen)
    for ours, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)
    asked = tuple(name in wanted for name in ("x", "layer0", "layer1"))
    assert given == ([asked] if any(asked) else [])


@pytest.mark.parametrize("act", ["silu", pytest.param("tanh", marks=pytest.mark.slow)])
def test_gradgradcheck(act: str) -> None:
    """By every operand together, to the second order; and a derivative of the third by torch's own."""
    function = {"silu": torch.nn.functional.silu, "tanh": torch.tanh}[act]
    module = Net((3, 5, 4, 6), function).build()
    names = [name for name, _ in module.named_parameters()]
    operands = (draw((6, 3), 3).requires_grad_(), *module.parameters())

    def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(
            module, dict(zip(names, weights, strict=True)), (x,)
        )
        return out

    with accelerated(self_check=False, backend="cuda"):
        assert torch.autograd.gradcheck(call, operands)
        assert torch.autograd.gradgradcheck(call, operands)
        ours = third(call, operands)
        assert set(usage(module)) == {("radial_mlp", "cuda")}
    for found, stock in zip(ours, third(call, operands), strict=True):
        torch.testing.assert_close(found, stock, rtol=1e-9, atol=1e-9)


def third(call: Any, operands: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Derivatives of the norm of derivatives of the norm of derivatives."""
    value = call(*operands)
    for _ in range(2):
        value = sum(
            t.square().sum()
            for t in torch.autograd.grad(value.square().sum(), operands, create_graph=True)
        )
    return torch.autograd.grad(value, operands)


def test_rows_depend_on_nothing_but_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: so padding changes nothing."""
    # whose last layer has another kernel for many rows than for few
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: 1 << 20)
    module = Net((8, 16, 16, 12)).build().float()
    found = rows_alone_and_together(module, draw((140, 8), 1, torch.float32))
    assert all(torch.equal(*each) for each in found)


def test_many_tiles_a_block_give_the_same_bits() -> None:
    """Sums have a fixed order."""
    module, x = Net((8, 64, 64, 12)).build().float(), draw((500, 8), 1, torch.float32)
    x.requires_grad_()
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        leaves = (x, *module.parameters())
        first, again = (torch.autograd.grad(module(x).square().sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("net", "architecture", "reason"),
    [
        (Net((8, 16, 12), torch.nn.functional.gelu), 0, "activation gelu, known are silu"),
        (Net((8, 16, 12)), 75, "compute capability 7.5"),
        (Net((8, 16, 0)), 0, "no path"),
    ],
    ids=["gelu", "Turing", "nothing"],
)
def test_refusals(net: Net, architecture: int, reason: str) -> None:
    described = registry().describe(net.build(), "radial_mlp")
    context = PlanContext(torch.float64, torch.device("cpu"), Config(), architecture)
    refused = described
    if not isinstance(described, Refusal):
        refused = CudaBackend().plan(described, context)
    assert isinstance(refused, Refusal)
    assert reason in refused.reason


def test_what_does_not_fit_is_said() -> None:
    context = PlanContext(torch.float64, torch.device("cpu"), Config(), 86)
    described = registry().describe(CASES["MACE"].build(), "radial_mlp")
    plan = CudaBackend().plan(described, context)
    assert isinstance(plan, Plan)
    assert "bytes of shared memory, there are 101376" in plan.strategy


SMALL = Net((5, 24, 40, 16, 6))
FILE = "radial_mlp.cu"


def both_gradients() -> None:
    """By the kernel for frozen weights and by that for all; a block has several tiles."""
    module, x = SMALL.build(), draw((150, 5), 3).requires_grad_()
    leaves = [x, *module.parameters()]
    with accelerated(self_check=False, backend="cuda"):
        for wanted in ([x], leaves):
            torch.autograd.grad(module(x).square().sum(), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("barrier", barriers(FILE))
def test_a_missing_barrier_is_a_race(barrier: int, kernels_on_host: HostCompiler) -> None:
    """ThreadSanitizer says so, of each."""
    kernels_on_host.sanitizer, kernels_on_host.change = "thread", without(FILE, barrier)
    with race_shown():
        both_gradients()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(
    sanitizer: str, dtype: torch.dtype, kernels_on_host: HostCompiler
) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    check(SMALL.build(), draw((150, 5), 3).requires_grad_(), dtype)
