"""Files that e3nn 0.4.4 wrote: what stock e3nn of today makes of them, numbers or an error, so do we."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import Behaviour, draw

import e3nn_accel
from e3nn_accel.compat import version_of

FILE = Path(__file__).parent / "files" / "e3nn_0.4.4.pt"
"""Two modules in float64 by their names, torch.save of e3nn 0.4.4: see `MADE_BY`."""

MADE_BY = """
import torch
from e3nn import o3
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
modules = {"Linear": o3.Linear("2x0e+1x1o", "2x0e+1x1o"),
           "FullyConnectedTensorProduct": o3.FullyConnectedTensorProduct("2x0e+1x1o", "1x0e+1x1o", "2x0e+1x1o")}
torch.save(modules, "e3nn_0.4.4.pt")
"""
INPUTS = {"Linear": (5,), "FullyConnectedTensorProduct": (5, 4)}


def results() -> torch.Tensor:
    """Outputs of both modules, and gradients by their weights."""
    modules: dict[str, Any] = torch.load(FILE, weights_only=False)
    found = []
    for name, dims in INPUTS.items():
        module = modules[name]
        out = module(*(draw((3, dim), seed) for seed, dim in enumerate(dims)))
        found += [out.flatten(), torch.autograd.grad(out.square().sum(), module.weight)[0]]
    return torch.cat(found).detach()


def test_the_same_numbers_or_the_same_error() -> None:
    """Enabled before the file is read."""
    stock = Behaviour.of(results)
    with e3nn_accel.enabled(strict=True):
        Behaviour.of(results).assert_like(stock)
        report = e3nn_accel.report()
    if version_of("e3nn") == "0.4.4":
        assert stock.error is None
    assert stock.error is not None or {row.backend for row in report.rows} == {"torch"}
    assert (stock.error is None) == bool(report.rows)


@pytest.mark.skipif(version_of("e3nn") == "0.4.4", reason="e3nn 0.4.4 reads its own files")
def test_a_refused_file_leaves_nothing_behind() -> None:
    """After the error, everything goes on."""
    stock = Behaviour.of(results)
    if stock.error is None:
        pytest.skip("this e3nn reads files of 0.4.4")
    from small_models import build, inputs_of, same

    module = build("Linear")
    inputs = inputs_of(module)
    expected = module(*inputs)
    with e3nn_accel.enabled(strict=True):
        Behaviour.of(results).assert_like(stock)
        same(module(*inputs), expected)
        assert e3nn_accel.report().rows[0].backend == "torch"
