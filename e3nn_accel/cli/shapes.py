"""Models of well-known shapes with random weights, for `bench --shape`.

Timings depend on a model's shape, not on its weights; energies of these models mean nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from e3nn_accel.structures import InputError, default_dtype, import_mace


class Shape(NamedTuple):
    """What a shape is made of, in MACE's words."""

    hidden_irreps: str
    elements: tuple[int, ...]
    r_max: float
    num_bessel: int
    avg_num_neighbors: float


SHAPES = {
    "mp0-medium": Shape("128x0e + 128x1o", tuple(range(1, 90)), 6.0, 10, 60.0),
    "off-large": Shape(
        "192x0e + 192x1o + 192x2e", (1, 6, 7, 8, 9, 15, 16, 17, 35, 53), 5.0, 8, 60.0
    ),
    "tiny": Shape("8x0e + 8x1o", (1, 8, 14), 4.0, 4, 10.0),
}


def build(name: str) -> Any:
    """A ScaleShiftMACE of the shape, float32, the same weights each time.

    Raises:
        InputError: MACE is not installed.
    """
    if not import_mace():
        raise InputError("mace-torch is not installed: pip install 'e3nn_accel[mace]'")
    from e3nn import o3
    from mace.modules import interaction_classes as blocks
    from mace.modules.models import ScaleShiftMACE

    shape = SHAPES[name]
    with torch.random.fork_rng(devices=[]), default_dtype(torch.float32):
        torch.manual_seed(0)
        return ScaleShiftMACE(
            r_max=shape.r_max,
            num_bessel=shape.num_bessel,
            num_polynomial_cutoff=5,
            max_ell=3,
            interaction_cls=blocks["RealAgnosticResidualInteractionBlock"],
            interaction_cls_first=blocks["RealAgnosticInteractionBlock"],
            num_interactions=2,
            num_elements=len(shape.elements),
            hidden_irreps=o3.Irreps(shape.hidden_irreps),
            MLP_irreps=o3.Irreps("16x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=np.zeros(len(shape.elements)),
            avg_num_neighbors=shape.avg_num_neighbors,
            atomic_numbers=list(shape.elements),
            correlation=3,
            radial_type="bessel",
            radial_MLP=[64, 64, 64],
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        )


def structure(name: str, atoms: int) -> Any:
    """At least so many atoms, of elements that the shape knows: silicon, or else water."""
    return silicon(atoms) if 14 in SHAPES[name].elements else water(atoms)


def water(atoms: int) -> Any:
    """A periodic box of at least so many atoms in molecules that are turned at random, at the density of water."""
    import ase.build

    random, spacing = np.random.default_rng(0), 3.1
    repeats = 1
    while 3 * repeats**3 < atoms:
        repeats += 1
    found = ase.Atoms(cell=[spacing * repeats] * 3, pbc=True)
    for place in np.ndindex(repeats, repeats, repeats):
        molecule = ase.build.molecule("H2O")  # type: ignore[no-untyped-call]
        molecule.rotate(random.uniform(0, 360), random.normal(size=3))
        molecule.translate(spacing * np.array(place))
        found += molecule
    found.positions += random.normal(scale=0.03, size=found.positions.shape)
    return found


def silicon(atoms: int) -> Any:
    """Diamond silicon of at least so many atoms, in cubic cells, randomly displaced."""
    import ase.build

    repeats = max(1, round((atoms / 8) ** (1 / 3)))
    while 8 * repeats**3 < atoms:
        repeats += 1
    found = ase.build.bulk("Si", cubic=True) * (repeats, repeats, repeats)
    random = np.random.default_rng(0)
    found.positions += random.normal(scale=0.03, size=found.positions.shape)
    return found
