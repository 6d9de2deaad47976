"""Spherical harmonics in torch operations: what third derivatives are made of.

The same recursion as in ``kernels/spherical_harmonics.cu``. Stock e3nn has its own torch operations, so this is
no plan of the torch backend's.
"""

from __future__ import annotations

from math import factorial, pi, prod, sqrt

import torch

from e3nn_accel.descriptor import SphericalHarmonicsDescriptor


def harmonics(d: SphericalHarmonicsDescriptor, vectors: torch.Tensor) -> torch.Tensor:
    """[.., components of all degrees] of vectors [.., 3]."""
    u = torch.nn.functional.normalize(vectors, dim=-1) if d.normalize else vectors
    x, y, z = u.unbind(-1)
    t = x * x + y * y + z * z
    found: dict[tuple[int, int], torch.Tensor] = {}
    c, s = torch.ones_like(x), torch.zeros_like(x)
    for m in range(max(d.degrees) + 1):
        lower = torch.zeros_like(x)
        q = torch.full_like(x, prod(range(2 * m - 1, 0, -2)))
        for degree in range(m, max(d.degrees) + 1):
            found[degree, m] = norm(degree, m, d.normalization) * q * c
            if m:
                found[degree, -m] = norm(degree, m, d.normalization) * q * s
            higher = ((2 * degree + 1) * y * q - (degree + m) * t * lower) / (degree + 1 - m)
            lower, q = q, higher
        c, s = z * c - x * s, z * s + x * c
    components = [found[degree, m] for degree in d.degrees for m in range(-degree, degree + 1)]
    return torch.stack(components, -1)


def norm(degree: int, m: int, normalization: str) -> float:
    """What the polynomial Q_l^m c_m is multiplied with, for e3nn's normalization of components."""
    ratio = factorial(degree - m) / factorial(degree + m)
    squares = {"norm": 1.0, "component": 2 * degree + 1, "integral": (2 * degree + 1) / (4 * pi)}
    return sqrt(squares[normalization] * ratio * (2 if m else 1))
