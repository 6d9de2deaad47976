"""Radial MLPs beside the rest of a captured call: the same bits as one after the other, replay after replay."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from model_graphs import fresh, rows

import e3nn_accel
from e3nn_accel import branches, structures
from e3nn_accel.cli.shapes import build, silicon, structure

pytest.importorskip("mace", reason="MACE isn't installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
REPLAYS = 60
SAME_BITS = ("node_energy", "forces", "stress", "virials")
"""Total energies are added up by torch's atomics."""


def results(model: Any, batches: list[dict[str, Any]], stress: bool) -> list[dict[str, Any]]:
    """Of replays of one capture."""
    with e3nn_accel.enabled(graph="1", backend="cuda"):
        found = [model(fresh(batch), compute_stress=stress) for batch in batches]
        counts = rows()
    assert counts.get(("graph", "captured")) == 1
    assert counts.get(("graph", "")) == len(batches) - 1
    return found


def moved(batch: dict[str, Any], seed: int) -> dict[str, Any]:
    """Atoms elsewhere, in tensors of their own."""
    generator = torch.Generator("cuda").manual_seed(seed)
    found = fresh(batch)
    like = found["positions"]
    found["positions"] = like + 0.02 * torch.empty_like(like).normal_(generator=generator)
    return found


@pytest.mark.parametrize("stress", [False, True], ids=["forces", "stress"])
@pytest.mark.parametrize("shape", ["mp0-medium", "off-large", "tiny"])
def test_the_same_bits(shape: str, stress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is read while its memory has been taken again would differ, sooner or later."""
    beside: list[torch.Tensor] = []
    run = branches.Branches.run

    def noted(branch: branches.Branches, of: Any, x: torch.Tensor, others: Any) -> torch.Tensor:
        beside.append(x)
        return run(branch, of, x, others)

    monkeypatch.setattr(branches.Branches, "run", noted)
    model = build(shape).cuda().requires_grad_(False).eval()
    atoms = silicon(64) if shape == "mp0-medium" else structure(shape, 81)
    batch = structures.cast(
        structures.batch_of(model, atoms, torch.float32), torch.float32, torch.device("cuda")
    )
    batches = [moved(batch, seed) for seed in range(REPLAYS)]
    found = results(model, batches, stress)
    assert len(beside) == 3  # one capture, the embedding and two layers
    monkeypatch.setattr(branches, "MOST_ROWS", 0)
    expected = results(model, batches, stress)
    assert len(beside) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for name in SAME_BITS:
            assert theirs[name] is None or torch.equal(ours[name], theirs[name]), name


def test_a_large_graph_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels fill the device, and what is kept would be much."""
    monkeypatch.setattr(branches.Branches, "run", lambda *given: pytest.fail("beside the rest"))
    model = build("tiny").cuda().requires_grad_(False).eval()
    monkeypatch.setattr(branches, "MOST_ROWS", 100)
    batch = structures.cast(
        structures.batch_of(model, silicon(64), torch.float32), torch.float32, torch.device("cuda")
    )
    results(model, [moved(batch, seed) for seed in range(3)], stress=False)
