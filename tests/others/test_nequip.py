"""NequIP over e3nn 0.6, in float64: eager, with stress, and in a file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from potentials import CUTOFF, ELEMENTS, Potential, assert_like_stock, operations, structures

pytest.importorskip("nequip", reason="nequip isn't installed (make test-others)")

import e3nn
from nequip.data import AtomicDataDict, from_ase
from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
from nequip.model import NequIPGNNModel
from nequip.utils.global_state import set_global_state

BUILD: dict[str, dict[str, Any]] = {
    "odd and even": {"l_max": 2, "parity": True, "num_features": 4},
    "mixed multiplicities": {"l_max": 2, "parity": False, "num_features": [6, 2, 3]},
}


@pytest.fixture(autouse=True)
def e3nn_as_it_was() -> Iterator[None]:
    """NequIP's global state changes how e3nn builds modules, which other packages can't copy then."""
    before = dict(e3nn.get_optimization_defaults())
    yield
    e3nn.set_optimization_defaults(**before)


def build(name: str) -> torch.nn.Module:
    """One of its models."""
    set_global_state()
    return NequIPGNNModel(
        seed=1, model_dtype="float64", r_max=CUTOFF, type_names=ELEMENTS, num_layers=3, radial_mlp_width=16,
        avg_num_neighbors=5.0, **BUILD[name],
    )  # fmt: skip


def batch() -> Any:
    """All structures."""
    transforms = [ChemicalSpeciesToAtomTypeMapper(ELEMENTS), NeighborListTransform(r_max=CUTOFF)]
    found = []
    for atoms in structures():
        data = from_ase(atoms)
        for transform in transforms:
            data = transform(data)
        found.append(data)
    return AtomicDataDict.batched_from_list(found)


def predict(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies, and forces with the stress below them."""
    out = model(batch())
    return out["total_energy"], torch.cat([out["forces"], out["stress"].flatten(0, 1)])


@pytest.mark.parametrize("name", BUILD)
def test_like_stock(name: str) -> None:
    """Energies, forces, stress, gradients and a training, everything of e3nn's in plans."""
    torch.set_default_dtype(torch.float64)
    explained = assert_like_stock(Potential(build(name), predict))
    assert {
        ("TensorProduct", "tensor_product"), ("Linear", "linear"),
        ("FullyConnectedTensorProduct", "tensor_product"), ("ElementwiseTensorProduct", "tensor_product"),
    } <= operations(explained)  # fmt: skip
