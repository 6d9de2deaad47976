"""SevenNet: its NequIP and MACE-like self-connections, over e3nn 0.6, in float32 (its data are)."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from potentials import (
    CUTOFF,
    ELEMENTS,
    FLOAT32,
    Potential,
    assert_like_stock,
    operations,
    structures,
)

import e3nn_accel

pytest.importorskip("sevenn", reason="sevenn isn't installed (make test-others)")

import sevenn
from ase.data import atomic_numbers
from sevenn import _keys as key
from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG
from sevenn.atom_graph_data import AtomGraphData
from sevenn.model_build import build_E3_equivariant_model
from sevenn.train.dataload import unlabeled_atoms_to_graph
from torch_geometric.loader.dataloader import Collater

BUILD: dict[str, dict[str, Any]] = {
    "even": {key.LMAX: 2, key.IS_PARITY: False},
    "odd and even": {key.LMAX: 1, key.IS_PARITY: True},
    "mixed multiplicities": {
        key.IRREPS_MANUAL: ["8x0e", "8x0e+4x1e+2x2e", "8x0e+4x1e+2x2e", "8x0e"],
        key.LMAX: 2,
        key.IS_PARITY: False,
    },
    "linear self-connection": {
        key.LMAX: 1,
        key.IS_PARITY: False,
        key.SELF_CONNECTION_TYPE: "linear",
    },
}


def build(name: str, **settings: Any) -> torch.nn.Module:
    """One of its models, as its training builds it."""
    torch.manual_seed(0)
    species = {atomic_numbers[element]: n for n, element in enumerate(ELEMENTS)}
    config = {
        key.CUTOFF: CUTOFF, key.CHEMICAL_SPECIES: ELEMENTS, key.TYPE_MAP: species, key.NUM_SPECIES: 3,
        key.NODE_FEATURE_MULTIPLICITY: 4, key.NUM_CONVOLUTION: 3, key.SHIFT: 0.5, key.SCALE: 1.3,
        key.CONV_DENOMINATOR: 5.0, "version": sevenn.__version__,
    }  # fmt: skip
    return build_E3_equivariant_model(
        DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG | config | BUILD[name] | settings
    )


def batch() -> AtomGraphData:
    """All structures; its models write into what they are given, so each call takes a fresh one."""
    graphs = [
        AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(a, CUTOFF)) for a in structures()
    ]
    return Collater(graphs)(graphs)


def predict(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies and forces of a batch."""
    model.set_is_batch_data(True)
    out = model(batch())
    return out[key.PRED_TOTAL_ENERGY], out[key.PRED_FORCE]


@pytest.mark.parametrize("name", BUILD)
def test_like_stock(name: str) -> None:
    """Energies, forces, gradients and a training, everything of e3nn's in plans."""
    explained = assert_like_stock(Potential(build(name), predict, FLOAT32))
    ran = operations(explained)
    assert {("TensorProduct", "tensor_product"), ("Linear", "linear")} <= ran
    assert ("FullyConnectedTensorProduct", "tensor_product") in ran or "linear" in name


def test_stress() -> None:
    """From its calculator, which differentiates by the strain."""
    from sevenn.calculator import SevenNetCalculator

    def results(model: Any) -> list[Any]:
        atoms = structures()[-1]
        atoms.calc = SevenNetCalculator(model, file_type="model_instance", device="cpu")
        return [atoms.get_potential_energy(), atoms.get_stress(), atoms.get_forces()]

    model = build("even")
    expected = results(model)
    with e3nn_accel.enabled(strict=True):
        found = results(model)
    for ours, stock in zip(found, expected, strict=True):
        size = numpy.abs(stock).max()
        assert size > 1e-5
        assert numpy.abs(ours - stock).max() <= FLOAT32 * size
