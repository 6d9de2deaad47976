"""How far results in tf32 and bf16 are from float64 stock e3nn's."""

from __future__ import annotations

from typing import Any

import torch
from comparison import accelerated, derivatives, draw, usage
from e3nn import o3
from linear_parity import built

from e3nn_accel.config import Precision

ERRORS: dict[Precision, tuple[float, float]] = {"tf32": (1e-4, 6e-4), "bf16": (8e-4, 5e-3)}
"""Of products of two numbers, norm-wise, at least and at most: half and twice 3e-4 and 2.3e-3, or a little more."""
IRREPS = "33x0e+20x1o"
Inputs = tuple[torch.Tensor, ...]


def linear() -> tuple[Any, Inputs]:
    return built(IRREPS, "40x0e+17x1o"), (draw((70, 93), 3),)


def skip() -> tuple[Any, Inputs]:
    module = o3.FullyConnectedTensorProduct(IRREPS, "5x0e", "40x0e+17x1o")
    attrs = torch.nn.functional.one_hot(torch.arange(70) % 5, 5).to(torch.get_default_dtype())
    return module, (draw((70, 93), 3), attrs)


def errors(
    module: Any, inputs: Inputs, dtype: torch.dtype, device: str = "cpu", **options: Any
) -> dict[str, float]:
    """Relative to stock float64 on the same numbers, norm-wise, of values and both derivatives."""
    operation = "linear" if len(inputs) == 1 else "tensor_product"
    ours = module.to(device, dtype)
    inputs = tuple(t.to(device, dtype) for t in inputs)
    x = inputs[0]

    def found_by(m: Any, of: torch.dtype) -> Any:
        operands = {"x": x.detach().to(of).requires_grad_(), **dict(m.named_parameters())}
        others = [t.to(of) for t in inputs[1:]]
        return derivatives(lambda o: m(o["x"], *others), operands).tensors

    with accelerated(backend="cuda", **options):  # with its self-check, which has to allow for it
        found = found_by(ours, dtype)
        assert set(usage(ours)) == {(operation, "cuda")}
    expected = found_by(module.double(), torch.float64)
    return {
        name: float((found[name].double() - exact).norm() / exact.norm())
        for name, exact in expected.items()
        if float(exact.norm())
    }
