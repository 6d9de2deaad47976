"""graph-pes: its NequIP and its MACE, built of e3nn 0.4's modules, and a subclass of o3.Linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import Behaviour
from potentials import (
    CUTOFF,
    ELEMENTS,
    FLOAT32,
    FLOAT64,
    Potential,
    assert_like_stock,
    operations,
    structures,
)

import e3nn_accel

pytest.importorskip("graph_pes", reason="graph-pes isn't installed (make test-others)")

import e3nn.util.jit
import graph_pes.models
from graph_pes import AtomicGraph
from graph_pes.atomic_graph import to_batch

FEATURES = {"channels": 4, "l_max": 2, "use_odd_parity": False}
BUILD: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "NequIP, odd and even": (
        "NequIP",
        {"elements": ELEMENTS, "features": FEATURES | {"use_odd_parity": True}, "self_interaction": "linear"},
        torch.float64,
    ),
    "NequIP, embedded species": (
        "ZEmbeddingNequIP", {"features": FEATURES, "layers": 2}, torch.float64
    ),
    "NequIP, one-hot, odd and even": (
        "NequIP", {"elements": ELEMENTS, "features": FEATURES | {"use_odd_parity": True}, "layers": 2}, torch.float32
    ),
    "MACE, embedded species": ("ZEmbeddingMACE", {"channels": 4, "l_max": 2, "correlation": 2}, torch.float64),
    "MACE, one-hot species": (
        "MACE", {"elements": ELEMENTS, "channels": 4, "l_max": 2, "correlation": 2}, torch.float32
    ),
}  # fmt: skip
"""One-hot species are float32 in graph-pes, whatever the model is."""


def potential(name: str, dtype: torch.dtype | None = None) -> Potential:
    """One of them with random weights, and a batch of all structures."""
    cls, settings, usual = BUILD[name]
    dtype = dtype or usual
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    model = getattr(graph_pes.models, cls)(cutoff=CUTOFF, **settings).to(dtype)
    batch = to_batch([AtomicGraph.from_ase(atoms, cutoff=CUTOFF) for atoms in structures()])

    def predict(m: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = m.predict(batch, ["energy", "forces"])
        return found["energy"], found["forces"]

    return Potential(model.train(), predict, FLOAT64 if dtype == torch.float64 else FLOAT32)


@pytest.mark.parametrize("name", BUILD)
def test_like_stock(name: str) -> None:
    """Energies, forces, gradients and a training, everything of e3nn's in plans."""
    explained = assert_like_stock(potential(name))
    ran = operations(explained)
    assert {
        ("TensorProduct", "tensor_product"),
        ("Linear", "linear"),
        ("LinearReadOut", "linear"),
    } <= ran
    assert ("FullyConnectedTensorProduct", "tensor_product") in ran or "odd" in name


def test_an_error_of_theirs() -> None:
    """float32 one-hots meet a float64 model: torch's own error reaches the user, whoever runs."""
    net = potential("MACE, one-hot species", torch.float64)
    stock = Behaviour.of(lambda: net.predict(net.model)[0])
    assert "should have same dtype" in str(stock.error)
    with e3nn_accel.enabled():
        ours = Behaviour.of(lambda: net.predict(net.model)[0])
    assert type(ours.error) is type(stock.error)
    assert str(ours.error) == str(stock.error)


def test_its_calculator_and_torchscript() -> None:
    """The ASE calculator, and TorchScript made while enabled, as it is for LAMMPS."""
    net = potential("NequIP, embedded species")
    atoms = structures()[1]
    graph = AtomicGraph.from_ase(atoms, cutoff=CUTOFF)

    def energy() -> float:
        atoms.calc = net.model.ase_calculator(skin=0.0)
        return float(atoms.get_potential_energy())

    expected = energy()
    with e3nn_accel.enabled():
        assert energy() == pytest.approx(expected, rel=FLOAT64)
        scripted = e3nn.util.jit.script(net.model)
    assert float(scripted(graph)["local_energies"].sum()) == pytest.approx(expected, rel=FLOAT64)
    assert "e3nn_accel" not in scripted.code
