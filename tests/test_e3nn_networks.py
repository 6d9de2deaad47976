"""e3nn's own example networks, unmodified: tetris, points with a gate, graphs with attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import Operands, accelerated, assert_close, derivatives, draw, randomise, usage
from e3nn import o3
from e3nn.nn.models.v2106.gate_points_message_passing import MessagePassing
from e3nn.nn.models.v2106.gate_points_networks import NetworkForAGraphWithAttributes, SimpleNetwork
from e3nn.util.jit import script

import e3nn_accel

pytestmark = pytest.mark.usefixtures("float64", "eager_e3nn")

TETRIS = torch.tensor([
    [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 0)],  # chiral, left
    [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, -1, 0)],  # chiral, right
    [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)],  # square
    [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3)],  # line
    [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)],  # corner
    [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)],  # L
    [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1)],  # T
    [(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 0)],  # zigzag
])  # fmt: skip
TOLERANCE = 1e-10
STEPS = 20

Example = tuple[torch.nn.Module, Operands, Callable[..., torch.Tensor]]


def points(pool: bool) -> Example:
    """Two clouds of points, vectors at each; positions are differentiated, as for forces."""
    net = SimpleNetwork(
        "3x0e + 2x1o", "4x0e + 1x1o", 2.5, 3.0, 5.0, mul=3, layers=2, pool_nodes=pool
    )
    batch = torch.tensor([0] * 5 + [1] * 3)
    operands = {"pos": draw((8, 3), 1), "x": draw((8, 9), 2)}
    return net, operands, lambda m, pos, x: m({"pos": pos, "x": x, "batch": batch})


def attributes() -> Example:
    """A graph with attributes of nodes and edges that aren't scalars: products of every l."""
    net = NetworkForAGraphWithAttributes(
        "3x0e + 2x1o", "4x0e + 1x1o", "1e", "3x0o + 1e", 2.0, 3.0, 5.0, mul=2, layers=2
    )
    edge_index = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]])  # e3nn 0.6 takes it whole
    ends = {"edge_index": edge_index, "edge_src": edge_index[0], "edge_dst": edge_index[1]}
    operands = {
        "pos": draw((3, 3), 1), "node_input": draw((3, 9), 2), "node_attr": draw((3, 7), 3),
        "edge_attr": draw((4, 3), 4),
    }  # fmt: skip
    return net, operands, lambda m, **inputs: m(ends | inputs)


def messages() -> Example:
    """Message passing by itself, over edges that are given."""
    net = MessagePassing(["0e", "2x0e + 1e", "0e + 2x1e", "1e"], "0e + 1e", "0e + 1e", [2, 10], 3.0)
    edges = torch.tensor([0, 1, 2, 3, 1]), torch.tensor([1, 0, 3, 2, 2])
    operands = {
        "x": draw((4, 1), 1),
        "attr": draw((4, 4), 2),
        "edge": draw((5, 4), 3),
        "radial": draw((5, 2), 4),
    }

    def run(
        m: Any, x: torch.Tensor, attr: torch.Tensor, edge: torch.Tensor, radial: torch.Tensor
    ) -> torch.Tensor:
        return m(x, attr, *edges, edge, radial)

    return net, operands, run


EXAMPLES = {
    "points, pooled": lambda: points(True),
    "points": lambda: points(False),
    "attributes": attributes,
    "messages": messages,
}


def assert_nothing_on_stock(net: torch.nn.Module) -> None:
    """Every product and linear that was called ran in a plan."""
    called = [m for m in net.modules() if isinstance(m, o3.TensorProduct | o3.Linear)]
    counts = [usage(m) for m in called if any(i.path_shape for i in m.instructions)]
    assert counts
    assert all({backend for _, backend in count} <= {"torch"} for count in counts)
    assert not e3nn_accel.report().fallbacks


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "points" else n for n in EXAMPLES],
)
def test_values_and_derivatives(name: str) -> None:
    """By every input and every parameter, and a second time: what training on forces takes."""
    net, inputs, call = EXAMPLES[name]()
    randomise(net, 10)
    parameters = {n: p.detach() for n, p in net.named_parameters() if p.numel()}
    operands = {n: t.clone().requires_grad_() for n, t in (inputs | parameters).items()}

    def function(all_of_them: Operands) -> torch.Tensor:
        chosen = {n: all_of_them[n] for n in parameters}
        given = {n: all_of_them[n] for n in inputs}
        return torch.func.functional_call(
            Calling(net, call), {f"net.{n}": t for n, t in chosen.items()}, (given,)
        )

    stock = derivatives(function, operands)
    with accelerated():
        ours = derivatives(function, operands)
        assert_nothing_on_stock(net)
    assert_close(ours, stock, TOLERANCE)


class Calling(torch.nn.Module):
    """A network with the way it is called, for functional_call."""

    def __init__(self, net: torch.nn.Module, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.net, self.call_net = net, call

    def forward(self, inputs: Operands) -> torch.Tensor:
        return self.call_net(self.net, **inputs)


def test_no_edges() -> None:
    """Points that are far apart: convolutions of no rows."""
    net, inputs, call = points(True)
    inputs["pos"] = 100 * torch.arange(24.0).reshape(8, 3)
    stock = call(net, **inputs)
    with accelerated():
        torch.testing.assert_close(call(net, **inputs), stock, rtol=TOLERANCE, atol=TOLERANCE)


def tetris() -> torch.nn.Module:
    """The network of e3nn's example, with fewer copies of each irrep."""
    torch.manual_seed(0)
    return SimpleNetwork("0e", "0o + 6x0e", 1.5, 2.0, 4.0, mul=4, layers=2)


def classify(net: torch.nn.Module) -> torch.Tensor:
    """Scores of the eight pieces."""
    pos, batch = TETRIS.flatten(0, 1).double(), torch.arange(8).repeat_interleave(4)
    return net({"pos": pos, "x": torch.ones(32, 1), "batch": batch})


def losses(net: torch.nn.Module) -> list[float]:
    """Of training it on seven of the eight pieces, as the example does."""
    labels = torch.eye(7).index_select(0, torch.tensor([0, 0, 1, 2, 3, 4, 5, 6]))
    labels[1, 0] = -1
    optimizer, found = torch.optim.Adam(net.parameters(), lr=1e-3), []
    for _ in range(STEPS):
        loss = (classify(net) - labels)[1:].pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_training_on_tetris() -> None:
    """The same losses at every step, and the same network in the end."""
    stock = tetris()
    ours = copy.deepcopy(stock)
    expected = losses(stock)
    assert expected[-1] < expected[0]
    with accelerated():
        torch.testing.assert_close(losses(ours), expected, rtol=1e-8, atol=0.0)
        assert_nothing_on_stock(ours)
        scores = classify(ours)
    torch.testing.assert_close(scores, classify(stock), rtol=1e-7, atol=1e-7)


def test_script_while_enabled() -> None:
    """TorchScript of a layer is stock e3nn's, and gives what the plans give."""
    net, inputs, _ = messages()
    layer = net.layers[0].first
    args = (inputs["x"], inputs["attr"], torch.tensor([0, 1, 2, 3, 1]), torch.tensor([1, 0, 3, 2, 2]),
            inputs["edge"], inputs["radial"])  # fmt: skip
    with accelerated():
        torch.testing.assert_close(
            script(layer)(*args), layer(*args), rtol=TOLERANCE, atol=TOLERANCE
        )
