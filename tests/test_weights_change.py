"""Weights change in every way a user has; results follow stock e3nn at once, nothing is stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comparison import accelerated, assert_ran_on_torch, draw
from graphs import random_edges
from mace_parts import Contraction, one_hot
from strategies import Case

from e3nn_accel.interception import suspend

pytestmark = pytest.mark.usefixtures("eager_e3nn", "float64")

NODES, EDGES = 6, 15


@dataclass(frozen=True)
class Subject:
    """A module with weights of its own, and one fixed call of it."""

    build: Callable[[], Any]
    inputs: Callable[[Any], tuple[torch.Tensor, ...]]
    operation: str


LINEAR = Case("Linear", ("3x0e+2x1o", "2x0e+3x1o"), (("biases", True),))
UVU = Case(
    "TensorProduct",
    (
        "3x0e+2x1o",
        "1x0e+1x1o",
        "3x0e+3x1o+2x0e",
        ((0, 0, 0, "uvu", True, 1.0), (1, 1, 2, "uvu", True, 1.0)),
    ),
)
SKIP = Case("FullyConnectedTensorProduct", ("3x0e+2x1o", "4x0e", "2x0e+2x1o"))
GENERAL = Case("FullyConnectedTensorProduct", ("3x0e+2x1o", "1x0e+2x1o", "2x0e+2x1o"))
CONTRACTION = Contraction("0e+1o", "0e+1o", 3)


def _attrs() -> torch.Tensor:
    return one_hot([0, 2, 1, 3, 0, 2], 4)


def _product_inputs(m: Any) -> tuple[torch.Tensor, ...]:
    return draw((NODES, m.irreps_in1.dim), 1), draw((NODES, m.irreps_in2.dim), 2)


def _convolution_inputs(m: Any) -> tuple[torch.Tensor, ...]:
    x, y = draw((NODES, m.irreps_in1.dim), 1), draw((EDGES, m.irreps_in2.dim), 2)
    return x, y, m.weight, random_edges(NODES, EDGES)


SUBJECTS = {
    "linear": Subject(LINEAR.build, lambda m: (draw((NODES, m.irreps_in.dim), 1),), "linear"),
    "product": Subject(GENERAL.build, _product_inputs, "tensor_product"),
    "species": Subject(SKIP.build, lambda m: (_product_inputs(m)[0], _attrs()), "tensor_product"),
    "convolution": Subject(UVU.build, _convolution_inputs, "convolution"),
    "contraction": Subject(
        CONTRACTION.build, lambda m: (CONTRACTION.features(NODES), _attrs()), "contraction"
    ),
}


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "contraction":
        pytest.importorskip("mace", reason="MACE isn't installed")
    return SUBJECTS[request.param]


def unfused(subject: Subject, module: Any) -> torch.Tensor:
    """The same call as stock e3nn has it: a convolution in three steps."""
    inputs = subject.inputs(module)
    if subject.operation != "convolution":
        out: torch.Tensor = module(*inputs)
        return out
    x, y, weight, edges = inputs
    messages = module(x[edges[0]], y, weight)
    return messages.new_zeros((len(x), messages.shape[1])).index_add(0, edges[1], messages)


def fused(subject: Subject, module: Any) -> torch.Tensor:
    """The call as it is accelerated."""
    out: torch.Tensor = module(*subject.inputs(module))
    return out


def check(subject: Subject, module: Any) -> torch.Tensor:
    """One accelerated call equals stock's, with and without gradients."""
    with suspend(), torch.no_grad():
        expected = unfused(subject, module)
    torch.testing.assert_close(fused(subject, module), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(fused(subject, module), expected, rtol=1e-12, atol=1e-12)
    assert_ran_on_torch(module, subject.operation)
    return expected


def changes(subject: Subject, change: Callable[[Any], object]) -> None:
    """A change of the weights changes the result, and the change is seen at once."""
    module = subject.build()
    with accelerated():
        before = check(subject, module)
        change(module)
        assert not torch.allclose(check(subject, module), before), "nothing changed"


def _noise(parameter: torch.Tensor) -> torch.Tensor:
    return draw(tuple(parameter.shape), 99)


def test_in_place(subject: Subject) -> None:
    """A write that torch counts."""

    def change(module: Any) -> None:
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.7).add_(_noise(p))

    changes(subject, change)


def test_through_data(subject: Subject) -> None:
    """A write that torch doesn't count: address and version stay."""

    def change(module: Any) -> None:
        for p in module.parameters():
            seen = p.data_ptr(), p._version
            p.data.copy_(_noise(p))
            assert (p.data_ptr(), p._version) == seen

    changes(subject, change)


def test_swapped_storage_and_back(subject: Subject) -> None:
    """``weight.data`` exchanged for one call, as LoRA does at inference, then put back."""
    module = subject.build()
    with accelerated():
        before = check(subject, module)
        kept = {name: p.data for name, p in module.named_parameters()}
        for p in module.parameters():
            p.data = _noise(p)
        changed = check(subject, module)
        for name, p in module.named_parameters():
            p.data = kept[name]
        assert torch.equal(check(subject, module), before)
    assert not torch.allclose(changed, before)


def test_load_state_dict(subject: Subject) -> None:
    """Other weights from a file."""
    other = {
        k: v for k, v in subject.build().state_dict().items() if "weight" in k and "zeroed" not in k
    }
    state = {k: _noise(v) for k, v in other.items() if v.numel()}
    changes(subject, lambda module: module.load_state_dict(state, strict=False))


def test_new_parameter_object(subject: Subject) -> None:
    """A Parameter replaced by another one."""

    def change(module: Any) -> None:
        for owner in module.modules():
            for name, p in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, torch.nn.Parameter(_noise(p)))

    changes(subject, change)


def test_address_used_again(subject: Subject) -> None:
    """Each step's weights are new tensors at the address of the last step's, version 0."""
    module = subject.build()
    memory = [p.detach().numpy().copy() for p in module.parameters()]
    results = []
    with accelerated():
        for seed in range(4):
            for array, p in zip(memory, module.parameters(), strict=True):
                array[:] = draw(array.shape, seed).numpy()
                p.data = torch.from_numpy(array)
                assert (p.data_ptr(), p.data._version) == (array.ctypes.data, 0)
            results.append(check(subject, module))
    assert not torch.allclose(results[0], results[1])


def test_moving_average(subject: Subject) -> None:
    """torch_ema evaluates with averaged parameters, and restores the others through ``.data``."""
    torch_ema = pytest.importorskip("torch_ema", reason="torch_ema isn't installed")
    module = subject.build()
    average = torch_ema.ExponentialMovingAverage(module.parameters(), decay=0.5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    with accelerated():
        for _ in range(3):
            optimizer.zero_grad()
            fused(subject, module).square().sum().backward()
            optimizer.step()
            average.update()
            trained = check(subject, module)
            with average.average_parameters():
                averaged = check(subject, module)
            assert torch.equal(check(subject, module), trained)
            assert not torch.allclose(averaged, trained)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_follows_stock(subject: Subject, optimizer: type[torch.optim.Optimizer]) -> None:
    """The same losses and weights step by step."""
    module = subject.build()
    twin = copy.deepcopy(module)
    expected = _train(lambda: unfused(subject, twin), twin, optimizer)
    with accelerated():
        found = _train(lambda: fused(subject, module), module, optimizer)
        assert_ran_on_torch(module, subject.operation)
    assert found[-1] != found[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-10, atol=0)
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


def _train(
    call: Callable[[], torch.Tensor], module: Any, kind: Callable[..., torch.optim.Optimizer]
) -> list[float]:
    """Losses of a few steps."""
    optimizer = kind(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (call() - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.mace
def test_lora() -> None:
    """MACE's LoRA wrapper of a Linear: training by two products, inference by swapped weights."""
    lora = pytest.importorskip("mace.modules.lora", reason="MACE isn't installed")
    base = Case("Linear", ("3x0e+2x1o", "2x0e+3x1o")).build()
    module = lora.LoRAO3Linear(base, rank=2)
    for p in module.lora_B.parameters():
        p.data.copy_(_noise(p))
    x = draw((5, base.irreps_in.dim), 1)
    expected, plain = module(x), base(x)
    with accelerated():
        for _ in range(2):
            torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(base(x), plain, rtol=1e-12, atol=1e-12)
            with torch.no_grad():
                torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(base(x), plain, rtol=1e-12, atol=1e-12)
        assert_ran_on_torch(base, "linear")
