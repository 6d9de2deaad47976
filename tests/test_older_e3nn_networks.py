"""e3nn's networks of 2021, unmodified: points with gates (January and February), convolutions of voxels."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import graph_packages
import pytest
import torch
from comparison import Operands, accelerated, assert_close, derivatives, draw, randomise
from e3nn import o3

import e3nn_accel

pytestmark = pytest.mark.usefixtures("float64", "eager_e3nn")

HIDDEN, OUT = o3.Irreps("2x0e + 2x0o + 2x1e + 2x1o"), o3.Irreps("2x0o + 1o + 2e")
TOLERANCE = 1e-10

Example = tuple[torch.nn.Module, Operands, Callable[[torch.nn.Module, Operands], torch.Tensor]]


def points(module: str, name: str) -> Example:
    """Two clouds of points, whose species are one-hot or any other scalars."""
    settings = {
        "irreps_in": o3.Irreps("3x0e + 1o"), "irreps_hidden": HIDDEN, "irreps_out": OUT,
        "irreps_node_attr": o3.Irreps("4x0e"), "irreps_edge_attr": o3.Irreps.spherical_harmonics(2),
        "layers": 1, "max_radius": 2.5, "number_of_basis": 4, "radial_layers": 1, "radial_neurons": 8,
        "num_neighbors": 4.0, "num_nodes": 4.0,
    }  # fmt: skip
    net = getattr(importlib.import_module(f"e3nn.nn.models.{module}"), name)(**settings)
    batch = torch.tensor([0] * 4 + [1] * 3)
    operands = {"pos": draw((7, 3), 1), "x": draw((7, 6), 2), "z": draw((7, 4), 3)}
    return net, operands, lambda net, operands: net({**operands, "batch": batch})


def voxels() -> Example:
    """A product's ``right`` makes the kernel of a convolution; ``right`` is stock e3nn's always."""
    from e3nn.nn.models.v2104.voxel_convolution import Convolution

    net = Convolution("0e + 1e", "0e + 1o + 1e", o3.Irreps.spherical_harmonics(2), 3.0, 3)
    return net, {"x": draw((2, 4, 4, 4, 4), 1)}, lambda net, operands: net(operands["x"])


EXAMPLES = {
    "January": lambda: points("gate_points_2101", "Network"),
    "February": lambda: points("gate_points_2102", "Network"),
    "voxels": voxels,
}


class Calling(torch.nn.Module):
    """A network with the way it is called, for functional_call."""

    def __init__(self, net: torch.nn.Module, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.net, self.call_net = net, call

    def forward(self, operands: Operands) -> torch.Tensor:
        return self.call_net(self.net, operands)


@pytest.mark.parametrize("name", EXAMPLES)
def test_values_and_derivatives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every input and every parameter, and a second time, with nothing on stock e3nn that was called."""
    graph_packages.provide(monkeypatch)
    net, inputs, call = EXAMPLES[name]()
    randomise(net, 10)
    parameters = {n: p.detach() for n, p in net.named_parameters() if p.numel()}
    operands = {n: t.clone().requires_grad_() for n, t in (inputs | parameters).items()}

    def function(given: Operands) -> torch.Tensor:
        weights = {f"net.{n}": given[n] for n in parameters}
        chosen = {n: given[n] for n in inputs}
        return torch.func.functional_call(Calling(net, call), weights, (chosen,))

    stock = derivatives(function, operands)
    with accelerated():
        ours = derivatives(function, operands)
        ran = {row.operation for row in e3nn_accel.report().rows if row.backend == "torch"}
        assert ran == ({"linear"} if name == "voxels" else {"tensor_product"})
        assert not e3nn_accel.report().fallbacks
    assert_close(ours, stock, TOLERANCE)
