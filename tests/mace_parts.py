"""MACE's symmetric contractions, built by MACE itself, with random weights in every basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comparison import draw, randomise

CHANNELS, SPECIES = 3, 4


@dataclass(frozen=True)
class Contraction:
    """What to build.

    Attributes:
        components: Irreps of the features without multiplicities, "0e+1o".
        outputs: Irreps of the result without multiplicities.
    """

    components: str
    outputs: str
    correlation: int
    channels: int = CHANNELS
    species: int = SPECIES
    use_reduced_cg: bool = False

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """A SymmetricContraction with random weights."""
        from e3nn import o3
        from mace.modules.symmetric_contraction import SymmetricContraction

        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            module = SymmetricContraction(
                irreps_in=o3.Irreps([(self.channels, ir) for _, ir in o3.Irreps(self.components)]),
                irreps_out=o3.Irreps([(self.channels, ir) for _, ir in o3.Irreps(self.outputs)]),
                correlation=self.correlation,
                use_reduced_cg=self.use_reduced_cg,
                num_elements=self.species,
            )
        finally:
            torch.set_default_dtype(before)
        return randomise(module, seed)

    def features(
        self, nodes: int, seed: int = 5, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """[nodes, channels, components]"""
        from e3nn import o3

        return draw((nodes, self.channels, o3.Irreps(self.components).dim), seed, dtype)


def one_hot(kinds: list[int], species: int = SPECIES) -> torch.Tensor:
    """node_attrs of these species."""
    found = torch.zeros(len(kinds), species, dtype=torch.float64)
    for row, kind in enumerate(kinds):
        found[row, kind] = 1
    return found


def node_attrs(name: str, nodes: int, species: int = SPECIES) -> torch.Tensor:
    """One-hot rows of several kinds, and rows that only stock e3nn's formula gets right."""
    kinds = {
        "all species": [n * 7 % species for n in range(nodes)],
        "one species": [1] * nodes,
        "sorted": sorted(n * 7 % species for n in range(nodes)),
        "absent species": [(0, species - 1)[n % 2] for n in range(nodes)],
    }
    if name in kinds:
        return one_hot(kinds[name], species)
    attrs = one_hot(kinds["all species"], species)
    if name == "scaled one-hot":
        return attrs * draw((nodes, 1), 77)
    if name == "random":
        return draw((nodes, species), 78)
    if name == "zero rows":
        attrs[::2] = 0
        return attrs
    assert name == "one row mixed", name
    attrs[-1] = draw((species,), 79)
    return attrs


ATTRS = (
    "all species",
    "one species",
    "sorted",
    "absent species",
    "scaled one-hot",
    "random",
    "zero rows",
    "one row mixed",
)
