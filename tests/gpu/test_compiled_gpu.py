"""torch.compile on a GPU: kernels are opaque operations in what inductor compiles, with stock's numbers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from e3nn import o3
from small_models import mace, molecules, same

import e3nn_accel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
HIDDEN = "128x0e+128x1o"


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    e3nn_accel.disable()
    torch.compiler.reset()


def gradients(call: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
    out = call(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["linear", "skip connection", "product"])
def test_operations(name: str, backend: str) -> None:
    module, inputs = {
        "linear": lambda: (o3.Linear(HIDDEN, HIDDEN), (torch.randn(300, 512),)),
        "skip connection": lambda: (
            o3.FullyConnectedTensorProduct(HIDDEN, "5x0e", HIDDEN),
            (torch.randn(300, 512), torch.eye(5)[torch.arange(300) % 5]),
        ),
        "product": lambda: (
            o3.FullyConnectedTensorProduct("8x0e+8x1o", "2x0e+2x1o", "8x0e+8x1o"),
            (torch.randn(300, 32), torch.randn(300, 8)),
        ),
    }[name]()
    module, inputs = module.cuda(), [x.cuda().requires_grad_() for x in inputs]
    expected = gradients(module, *inputs)
    e3nn_accel.enable(backend="cuda")
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for _ in range(2):
        same(gradients(compiled, *inputs), expected, 1e-11)


def test_mace() -> None:
    """Prepared as MACE prepares it, with the gradients of a training step."""
    from mace.tools.compile import prepare

    model = prepare(mace, allow_autograd=True)().cuda()
    batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in molecules(2).items()}

    def step(call: Any) -> list[torch.Tensor]:
        here = {**batch, "positions": batch["positions"].clone().requires_grad_()}
        out = call(here, training=True)
        model.zero_grad()
        (out["forces"].square().sum() + out["energy"].sum()).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return [out["energy"].detach(), out["forces"].detach(), *grads]

    expected = step(model)
    e3nn_accel.enable()
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    for _ in range(2):
        same(step(compiled), expected, 1e-9)
    assert not e3nn_accel.explain(model).fallbacks
