"""`mace.tools.compile.prepare` and torch.compile, as MACE's own tests use them: no graph or break more than stock's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_models import mace, molecules, same

import e3nn_accel
from e3nn_accel import compat

pytestmark = [
    pytest.mark.mace,
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "nothing left to the compiler": {"strict": True},
}
FLAGS: dict[str, dict[str, bool]] = {
    "inference": {},
    "stress": {"training": True, "compute_stress": True},
}
COMPILABLE = FLAGS["stress"]
"""MACE's own tests compile with ``training=True``: AOTAutograd refuses a graph that stock's forces have freed."""


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Each test traces for itself."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def prepared() -> Any:
    """A small MACE as MACE prepares it."""
    pytest.importorskip("mace")
    from mace.tools.compile import prepare

    return prepare(mace)()


def batch() -> dict[str, Any]:
    """As MACE's tests hand it to a compiled model."""
    found = dict(molecules(2))
    found["positions"] = found["positions"].clone().requires_grad_()
    return found


def counts(model: Any, flags: dict[str, bool]) -> tuple[int, int]:
    """Graphs and breaks, as torch tells them."""
    torch.compiler.reset()
    found = torch._dynamo.explain(model)(batch(), **flags)
    return found.graph_count, found.graph_break_count


def tensors(out: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a model returns."""
    return {name: t.detach() for name, t in out.items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(FLAGS["inference"], id="inference"),
        pytest.param(FLAGS["stress"], id="stress", marks=pytest.mark.slow),
    ],
)
def test_graphs_and_breaks(flags: dict[str, bool], options: dict[str, Any]) -> None:
    """One graph, no break, with and without us."""
    model = prepared()
    assert counts(model, flags) == (1, 0)
    e3nn_accel.enable(**options)
    assert counts(model, flags) == (1, 0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param("aot_eager", marks=pytest.mark.slow),
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
def test_values(backend: str, options: dict[str, Any]) -> None:
    """Everything that the compiled model returns is what stock's returns uncompiled."""
    model = prepared()
    expected = tensors(model(batch(), **COMPILABLE))
    e3nn_accel.enable(**options)
    compiled: Callable[..., Any] = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        same(tensors(compiled(batch(), **COMPILABLE)), expected, 1e-9)
    operations = {row.operation for row in e3nn_accel.report().rows if row.backend == "torch"}
    planned = bool(options) and compat.COMPILER_TRACES_CALLS
    assert ("convolution" in operations) == planned
    if planned:
        assert {"linear", "tensor_product"} <= operations


@pytest.mark.slow
@pytest.mark.parametrize("options", [None, *OPTIONS.values()], ids=["stock", *OPTIONS])
def test_what_stock_cannot(options: dict[str, Any] | None) -> None:
    """Without ``training=True`` the compiler's error is the same with and without us."""
    model = prepared()
    if options is not None:
        e3nn_accel.enable(**options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="second time"):
        compiled(batch(), **FLAGS["inference"])
