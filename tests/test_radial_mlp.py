"""When a radial MLP stays with stock e3nn, and that nothing about the module changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import draw, usage
from e3nn.nn import FullyConnectedNet
from e3nn.util.jit import script
from radial_parity import Net
from torch.nn.utils import parametrizations, parametrize

import e3nn_accel
from e3nn_accel import compat

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eager_e3nn", "float64")]
NET = Net((8, 16, 12))
REASON = {
    "hook": "has hooks",
    "hook of a layer": "layer1 has hooks",
    "hook of an activation": "layer0 has hooks",
    "another layer": "layer1 is no plain layer of e3nn's but a Linear",
    "parametrised": "layer0 is no plain layer of e3nn's but a Parametrized",
    "a layer's forward": "layer1 is no plain layer",
    "subclass": "a forward of its own",
    "half": "needs float32 or float64",
    "integers": "not floating point",
}


class Subclass(FullyConnectedNet):
    """With a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice as much."""
        return 2 * super().forward(x)


def prepared(case: str) -> tuple[Any, torch.Tensor]:
    """A module that is unusual in one way, and its input."""
    net, x = NET.build(), draw((5, 8), 1)
    hook: Callable[..., torch.Tensor] = lambda module, args, out: 2 * out  # noqa: E731
    if case == "hook":
        net.register_forward_hook(hook)
    elif case == "hook of a layer":
        net.layer1.register_forward_hook(hook)
    elif case == "hook of an activation":
        net.layer0.act.register_forward_hook(hook)
    elif case == "another layer":
        net.layer1 = torch.nn.Linear(16, 12)
    elif case == "parametrised":
        parametrizations.orthogonal(net.layer0)
        assert parametrize.is_parametrized(net.layer0)
    elif case == "a layer's forward":
        net.layer1.forward = lambda x: 3 * x
    elif case == "subclass":
        net = Subclass([8, 16, 12], torch.nn.functional.silu)
    elif case == "half":
        net, x = net.bfloat16(), x.bfloat16()
    elif case == "integers":
        x = x.long()
    return net, x


@pytest.mark.usefixtures("kernels_on_host")
@pytest.mark.parametrize("case", REASON)
def test_what_stays_with_stock(case: str) -> None:
    """With the reason in the report, and stock's result or error."""
    net, x = prepared(case)
    expected = net(x) if case != "integers" else None
    e3nn_accel.enable()
    if expected is None:
        with pytest.raises(RuntimeError):
            net(x)
    else:
        assert torch.equal(net(x), expected)
    [row] = e3nn_accel.report().rows
    assert row.backend == "e3nn"
    assert REASON[case] in row.detail


@pytest.mark.usefixtures("kernels_on_host")
def test_the_self_check_passes_and_strict_is_content() -> None:
    net, x = NET.build(), draw((5, 8), 1)
    expected = net(x)
    e3nn_accel.enable(strict=True, verify=True)
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net(input=x), expected)
    [row] = e3nn_accel.report().rows
    assert (row.operation, row.backend, row.calls) == ("radial_mlp", "cuda", 2)
    assert row.detail == "hidden layers in one kernel, the last in another"


@pytest.mark.usefixtures("kernels_on_host")
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "save"])
def test_copies(way: str) -> None:
    """A copy is the module, planned like it, and nothing of ours is in it."""
    net, x = NET.build(), draw((5, 8), 1)
    state = pickle.dumps(net)
    e3nn_accel.enable(strict=True, self_check=False)
    expected = net(x)
    assert pickle.dumps(net) == state
    if way == "deepcopy":
        twin = copy.deepcopy(net)
    elif way == "pickle":
        twin = pickle.loads(state)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is FullyConnectedNet
    assert list(twin.state_dict()) == ["layer0.weight", "layer1.weight"]
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.layer0.weight.mul_(2)
    assert not torch.allclose(twin(x), expected)  # no weights are kept
    assert {row.backend for row in e3nn_accel.report().rows} == {"cuda"}


@pytest.mark.usefixtures("kernels_on_host")
def test_torchscript_is_stock() -> None:
    net, x = NET.build(), draw((5, 8), 1)
    expected = net(x)
    e3nn_accel.enable(strict=True, self_check=False)
    net(x)
    scripted = script(copy.deepcopy(net))
    torch.testing.assert_close(scripted(x), expected)
    assert "e3nn_accel" not in str(scripted.graph)
    e3nn_accel.disable()
    assert "__call__" not in vars(FullyConnectedNet)


@pytest.mark.usefixtures("kernels_on_host")
def test_compiled_by_torch_as_one_operation() -> None:
    net, x = NET.build(), draw((5, 8), 1).requires_grad_()
    leaves = (x, *net.parameters())
    expected = torch.autograd.grad(net(x).square().sum(), leaves)
    e3nn_accel.enable(strict=True)
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(str(graph.code))
        return graph

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), leaves)
    traced = int(compat.COMPILER_TRACES_CALLS)
    assert [graph.count("e3nn_accel.run") for graph in graphs] == [traced]
    for ours, stock in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


def test_on_the_cpu_it_is_stock() -> None:
    """By choice: nothing is counted, strict mode has nothing to say."""
    net, x = NET.build(), draw((5, 8), 1)
    expected = net(x)
    e3nn_accel.enable(strict=True)
    assert torch.equal(net(x), expected)
    assert not e3nn_accel.report().rows
    [line] = e3nn_accel.explain(net).by_choice
    assert "FullyConnectedNet on stock e3nn by choice" in line


def test_layers_that_were_exchanged(kernels_on_host: Any) -> None:
    """Stock takes over, with no harm to the plan of other nets."""
    net, other, x = NET.build(), NET.build(), draw((5, 8), 1)
    e3nn_accel.enable()
    net(x)
    wider = Net((8, 20, 12)).build()
    net.layer0, net.layer1 = wider.layer0, wider.layer1
    found = net(x)
    assert "assigned after it was planned" in str(e3nn_accel.report())
    other(x)
    assert {backend for _, backend in usage(other)} == {"cuda"}
    e3nn_accel.disable()
    assert torch.equal(found, net(x))


def test_weights_of_other_shapes_stay_with_stock(kernels_on_host: Any) -> None:
    """Wider ones, assigned after the plan was made."""
    net, x = NET.build(), draw((5, 8), 1)
    e3nn_accel.enable()
    net(x)
    wider = Net((8, 20, 12)).build()
    net.layer0.weight, net.layer1.weight = wider.layer0.weight, wider.layer1.weight
    with pytest.warns(e3nn_accel.FallbackWarning, match="operands of other shapes"):
        found = net(x)
    e3nn_accel.disable()
    assert torch.equal(found, net(x))
