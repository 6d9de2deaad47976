"""Attributes that a forward reads, assigned after planning: stock's numbers, and the reason in the report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import accelerated, draw, usage
from e3nn import o3
from e3nn.math import normalize2mom
from e3nn.nn import FullyConnectedNet

import e3nn_accel

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]


def net() -> Any:
    return FullyConnectedNet([3, 16, 12], torch.nn.functional.silu)


def harmonics() -> Any:
    return o3.SphericalHarmonics([0, 1, 2], normalize=True, normalization="component")


ASSIGNED: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "activation": (net, lambda m: setattr(m.layer0, "act", normalize2mom(torch.tanh))),
    "variance": (net, lambda m: setattr(m.layer1, "var_out", 4.0)),
    "normalize": (harmonics, lambda m: setattr(m, "normalize", False)),
    "normalization": (harmonics, lambda m: setattr(m, "normalization", "norm")),
}


@pytest.mark.parametrize("name", list(ASSIGNED))
def test_stock_takes_over(name: str) -> None:
    build, assign = ASSIGNED[name]
    module, x = build(), draw((5, 3), 1)
    before = module(x)
    changed = copy.deepcopy(module)
    assign(changed)
    expected = changed(x)
    assert not torch.allclose(expected, before)
    with accelerated(strict=False, backend="auto"):
        torch.testing.assert_close(module(x), before, rtol=1e-11, atol=1e-11)
        assert {backend for _, backend in usage(module)} == {"cuda"}
        assign(module)
        assert torch.equal(module(x), expected)
        e3nn_accel.explain(module)  # plans nothing anew
        assert torch.equal(module(x), expected)
        assert "were assigned after it was planned" in str(e3nn_accel.report())
        torch.testing.assert_close(changed(x), expected, rtol=1e-11, atol=1e-11)
        assert {backend for _, backend in usage(changed)} == {"cuda"}
