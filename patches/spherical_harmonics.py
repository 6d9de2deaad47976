"""``e3nn.o3.SphericalHarmonics``, which ``o3.spherical_harmonics`` makes anew at each call."""

from __future__ import annotations

from typing import Any

import torch

from e3nn_accel.as_planned import AsPlanned
from e3nn_accel.descriptor import Descriptor, SphericalHarmonicsDescriptor
from e3nn_accel.hookspecs import Call, Target, hookimpl
from e3nn_accel.patches.arguments import mismatch, wrong_last_dimension

_as_planned = AsPlanned(lambda m: (m.normalize, m.normalization, *m._ls_list))


def bind(module: Any, x: torch.Tensor) -> Call | str:
    """The vectors of ``SphericalHarmonics.forward``, or why stock e3nn takes the call."""
    reason = mismatch(x) or wrong_last_dimension("x", x, 3)
    if not torch.compiler.is_compiling():  # which can't trace this
        reason = reason or _as_planned.change(module)
    return reason or Call("spherical_harmonics", (x,))


@hookimpl
def e3nn_accel_targets() -> list[Target]:
    """SphericalHarmonics alone; those of angles compute otherwise."""
    return [
        Target(
            "e3nn.o3:SphericalHarmonics",
            bind,
            "spherical_harmonics",
            traceable=True,
            backend="cuda",
        )
    ]


@hookimpl
def e3nn_accel_describe(module: torch.nn.Module, operation: str) -> Descriptor | None:
    """Degrees in their order, and both normalisations; parities change nothing."""
    from e3nn import o3

    if operation != "spherical_harmonics" or not isinstance(module, o3.SphericalHarmonics):
        return None
    m: Any = module
    _as_planned.keep(module)
    degrees = tuple(int(degree) for degree in m._ls_list)
    return SphericalHarmonicsDescriptor(degrees, bool(m.normalize), str(m.normalization))
