"""Training steps on a GPU against stock MACE, eager and replayed: second derivatives of everything."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from model_graphs import batch_of, ice, rows, water

import e3nn_accel
from e3nn_accel import structures, switch
from e3nn_accel.cli.shapes import build, silicon
from e3nn_accel.graphs import GATHERS, eager
from e3nn_accel.graphs.model_state import ENOUGH, RARE

pytest.importorskip("mace", reason="MACE isn't installed")
from small_models import mace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STRESS = pytest.mark.parametrize("stress", [False, True], ids=["forces", "stress"])


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "ENOUGH_EDGES", 0)


def small() -> tuple[Any, dict[str, Any]]:
    """Two structures with cells and one without, in float64."""
    batch = batch_of([ice(1), water(), ice(2, repeat=2)])
    return mace().cuda(), structures.cast(batch, torch.float64, torch.device("cuda"))


def medium(dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Any]]:
    """One structure, the shape of MACE-MP-0 medium."""
    model = build("mp0-medium").to("cuda", dtype)
    batch = structures.batch_of(model, silicon(64), dtype)
    return model, structures.cast(batch, dtype, torch.device("cuda"))


def step(model: Any, batch: dict[str, Any], stress: bool) -> dict[str, torch.Tensor]:
    """Results, and the gradients of a loss of them by every parameter and by the positions."""
    data = {name: tensor.detach() for name, tensor in batch.items()}
    positions = data["positions"]
    model.zero_grad(set_to_none=True)
    out = model(data, training=True, compute_stress=stress)
    found = {name: out[name] for name in ("energy", "forces", *(["stress"] if stress else []))}
    torch.stack([value.sin().mean() for value in found.values()]).sum().backward()
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"positions": positions.grad}


def calls_with_grouped_gathers() -> int:
    dispatcher = switch.active.dispatcher
    assert dispatcher is not None
    usage = [u for r in dispatcher.runners.values() for u in r.usage.items()]
    return sum(
        u.calls for (operation, how, _), u in usage if (operation, how) == (GATHERS, "grouped")
    )


@STRESS
@pytest.mark.parametrize("case", [small, medium])
def test_a_training_step_is_stocks(case: Any, stress: bool) -> None:
    """In float64: values and every gradient."""
    model, batch = case()
    expected = step(copy.deepcopy(model), batch, stress)
    with e3nn_accel.enabled():
        found = step(model, batch, stress)
        assert calls_with_grouped_gathers() == 1
    assert found.keys() == expected.keys()
    for name, stock in expected.items():
        error = (found[name] - stock).norm()
        assert float(error) <= 1e-10 * float(stock.norm()) + 1e-14, name


@STRESS
def test_the_same_bits_again(stress: bool) -> None:
    """Forces and stress in float32; MACE's own sum of energies has no order on a GPU."""
    model, batch = medium(torch.float32)
    with e3nn_accel.enabled():
        first, again = (step(model, batch, stress) for _ in range(2))
        assert calls_with_grouped_gathers() == 2
    for name in ("forces", *(["stress"] if stress else [])):
        assert torch.equal(first[name], again[name]), name


@STRESS
@pytest.mark.parametrize("case", [small, medium])
def test_replayed_steps_are_stocks(case: Any, stress: bool) -> None:
    """With weights and positions that change between them; values and every gradient, in float64."""
    model, batch = case()
    stock = copy.deepcopy(model)
    optimisers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (stock, model)]
    switch.accelerate(model)
    for n in range(ENOUGH + 3):
        away = 0.01 * torch.randn_like(batch["positions"])
        moved = {**batch, "positions": batch["positions"] + away}
        expected = step(stock, moved, stress)
        found = step(model, moved, stress)
        assert found.keys() == expected.keys()
        for name, theirs in expected.items():
            error = (found[name] - theirs).norm()
            assert float(error) <= 1e-10 * float(theirs.norm()) + 1e-14, (n, name)
        for optimiser in optimisers:
            optimiser.step()
    assert rows() == {
        ("eager", RARE): ENOUGH - 1,
        ("graph", "captured"): 1,
        ("graph", "training"): 3,
    }


def test_gradients_of_two_replays_at_once() -> None:
    """Whose memory is the same: the first forward is replayed again. Both in float32, as graphs share it."""
    model, batch = medium(torch.float32)
    other = {**batch, "positions": batch["positions"] + 0.02 * torch.randn_like(batch["positions"])}

    def both(one_by_one: bool) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        losses = []
        for data in (batch, other):
            out = model({k: v.detach() for k, v in data.items()}, training=True)
            losses.append(out["energy"].sum() + out["forces"].sin().sum())
            if one_by_one:
                losses.pop().backward()
        if losses:
            torch.stack(losses).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with e3nn_accel.enabled():
        for _ in range(ENOUGH):
            both(one_by_one=True)
        before = rows()["graph", "training"]
        expected, found = both(one_by_one=True), both(one_by_one=False)
        assert rows()["graph", "training"] == before + 4
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert float(error) <= 1e-5 * float(gradient.norm()), name


@STRESS
def test_inference_that_is_not_replayed(stress: bool) -> None:
    model, batch = medium(torch.float32)
    exact, theirs = medium()
    expected = exact(theirs, compute_stress=stress)
    with e3nn_accel.enabled(graph="0"):
        found = model(batch, compute_stress=stress)
        assert calls_with_grouped_gathers() == 1
    for name in ("forces", *(["stress"] if stress else [])):
        error = (found[name].double() - expected[name]).norm()
        assert float(error) <= 1e-4 * float(expected[name].norm()), name
