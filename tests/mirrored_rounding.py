"""Stock e3nn with other rounding errors of its float32 results: just as exact.

A control for `other_suites.py`, by `suite_outcomes.py --mirrored N`. A test that one of these fails, too, asks for
stock's own rounding errors: e3nn's compare a module with its TorchScript by ``torch.allclose`` in float32, whose
absolute tolerance of 1e-8 a sum's rounding exceeds; it holds where both are the same code. 0 turns the errors around.
Any other N takes inputs that differ in their last bit, for N seeds: what one of them passes by chance another fails.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch

CLASSES = {
    "e3nn.o3": ("TensorProduct", "Linear"),
    "mace.modules.symmetric_contraction": ("SymmetricContraction",),
}
"""What is accelerated on a CPU. Subclasses inherit the call."""
LAST_BIT = 2.0**-23


class MirroredRounding:
    """A pytest plugin, in place before any conftest of the suite; the process ends with the run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def pytest_configure(self) -> None:
        """Put the call in place."""
        for module, names in CLASSES.items():
            try:
                found: Any = importlib.import_module(module)
            except ImportError:  # an environment without MACE
                continue
            for name in names:
                getattr(found, name).__call__ = self._call()

    def _call(self) -> Callable[..., Any]:
        def __call__(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.seed:
                return call_of_last_bits(self.seed, module, *args, **kwargs)
            return mirrored_call(module, *args, **kwargs)

        return __call__


def mirrored_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What stock e3nn would return had its errors the other sign, with stock's gradients."""
    out = torch.nn.Module.__call__(module, *args, **kwargs)
    if torch.jit.is_tracing() or out.dtype != torch.float32:
        return out
    with torch.no_grad():
        exact_args = tuple(doubled(x) for x in args)
        exact_kwargs = {name: doubled(x) for name, x in kwargs.items()}
        exact = copy.deepcopy(module).double()(*exact_args, **exact_kwargs)
        error = out.double() - exact
    return out - 2 * error.float()


def call_of_last_bits(seed: int, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What stock e3nn returns for inputs half of which are an ulp or so larger; the same ones each time."""
    if torch.jit.is_tracing():
        return torch.nn.Module.__call__(module, *args, **kwargs)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        generator = torch.Generator().manual_seed(seed)
        some = torch.randint(2, value.shape, generator=generator).to(value)
        return value * (1 + LAST_BIT * some)

    args, kwargs = tuple(map(moved, args)), {name: moved(x) for name, x in kwargs.items()}
    return torch.nn.Module.__call__(module, *args, **kwargs)


def doubled(value: Any) -> Any:
    """Tensors of float32 in float64, also in lists."""
    if isinstance(value, list | tuple):
        return type(value)(doubled(x) for x in value)
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        return value.double()
    return value
