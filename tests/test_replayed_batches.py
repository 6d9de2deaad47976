"""Replays of batches: heads and numbers of structures change within a captured size; models and flags take turns.

With the stand-in for CUDA graphs of `model_graphs`. Everything is compared with eager calls of stock MACE.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from e3nn.o3 import Irreps
from model_graphs import (
    agree,
    batch_of,
    captures,
    fresh,
    headed,
    ice,
    replaying,
    replays,
    rows,
    water,
)

from e3nn_accel import switch
from e3nn_accel.graphs.store import MOST

pytest.importorskip("mace")
from small_models import mace, two_headed

pytestmark = pytest.mark.mace
STRESS = pytest.mark.parametrize("stress", [False, True], ids=["forces", "stress"])
HEADS = ("a", "b")
EVERY = ["".join(heads) for heads in itertools.product(HEADS, repeat=2)]
FLAGS: dict[str, dict[str, bool]] = {
    "forces": {},
    "stress": {"compute_stress": True},
    "virials": {"compute_virials": True},
    "displacement": {"compute_displacement": True},
}


@pytest.fixture
def model() -> Any:
    return two_headed().requires_grad_(False).eval()


def batch_with(heads: str, seed: int = 0) -> dict[str, Any]:
    """A crystal and a molecule, each with a head."""
    return batch_of(headed([ice(seed), water()], heads), heads=HEADS)


def head_inputs(model: Any) -> torch.Tensor:
    """The heads that the last captured graph reads, dummies included."""
    dispatcher = switch.active.dispatcher
    assert dispatcher is not None
    found: torch.Tensor = (
        dispatcher.model_calls._models[model]._store.kept[-1].inputs.tensors["head"]
    )
    return found


@STRESS
def test_heads_change_from_call_to_call(model: Any, stress: bool) -> None:
    """Every order of heads after every other, captured once; dummies keep a head that there is."""
    expected = {heads: model(batch_with(heads), compute_stress=stress) for heads in EVERY}
    for name in ("energy", "forces", *(["stress"] if stress else [])):
        values = [expected[heads][name] for heads in EVERY]
        for one, other in itertools.combinations(values, 2):
            assert not torch.allclose(one, other, rtol=1e-3), name  # or nothing would be tested
    with replaying(graph="1"):
        for pair in itertools.permutations(EVERY, 2):
            for heads in pair:
                found = model(batch_with(heads), compute_stress=stress)
                assert head_inputs(model).tolist() == [*map(HEADS.index, heads), 0]
                for name in ("energy", "node_energy", "forces", "stress", "interaction_energy"):
                    theirs = expected[heads][name]
                    if theirs is not None:
                        torch.testing.assert_close(
                            found[name], theirs.detach(), rtol=1e-12, atol=1e-12
                        )
        assert rows() == {("graph", "captured"): 1, ("graph", ""): 2 * 12 - 1}


def test_a_head_is_that_of_its_structure(model: Any) -> None:
    """In a batch, padded, as alone; and in a batch the other way round."""
    alone = [model(batch_of(headed([atoms], head), heads=HEADS), compute_stress=True)
             for atoms, head in ((ice(0), "b"), (water(), "a"))]  # fmt: skip
    with replaying(graph="1"):
        model(batch_with("ab"), compute_stress=True)
        one = model(batch_with("ba"), compute_stress=True)
        structures = headed([water(), ice(0)], "ab")
        other = model(batch_of(structures, heads=HEADS), compute_stress=True)
        assert (captures(), replays()) == (1, 2)
    for found, order in ((one, alone), (other, alone[::-1])):
        for name in ("energy", "forces", "stress", "node_energy"):
            theirs = torch.cat([out[name].detach() for out in order])
            torch.testing.assert_close(found[name], theirs, rtol=1e-12, atol=1e-12)


def test_gradients_of_heads(model: Any) -> None:
    """A training step's: weights of a head that no structure has get zeros, as from stock."""
    model.requires_grad_(True)
    stock = copy.deepcopy(model)

    def step(module: Any, heads: str) -> dict[str, Any]:
        module.zero_grad(set_to_none=True)
        out = module(batch_with(heads), training=True, compute_stress=True)
        loss = out["energy"].square().sum() + out["forces"].square().sum() + out["stress"].sum()
        loss.backward()
        return {name: p.grad for name, p in module.named_parameters()}

    def differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return any(g is not None and not torch.allclose(g, other[n]) for n, g in one.items())

    expected = {heads: step(stock, heads) for heads in EVERY}
    assert all(differ(expected[a], expected[b]) for a, b in itertools.combinations(EVERY, 2))
    with replaying():
        for heads in [*EVERY, *EVERY[::-1]]:
            found = step(model, heads)
            for name, theirs in expected[heads].items():
                assert (found[name] is None) == (theirs is None), name
                if theirs is not None:
                    scale = max(float(theirs.abs().max()), 1e-3)
                    torch.testing.assert_close(found[name], theirs, rtol=1e-10, atol=1e-11 * scale)
        assert rows()["graph", "training"] == len(EVERY) + 1


@STRESS
def test_numbers_of_structures_change(model: Any, stress: bool) -> None:
    """Three crystals, one as large, two, ... within one captured size, whose dummy structures come and go."""
    shapes = [(1, 1, 1), (3,), (2, 1), (1, 2), (1, 1, 1), (3,)]
    batches = []
    for n, repeats in enumerate(shapes):
        structures = [ice(seed=5 * n + m, repeat=repeat) for m, repeat in enumerate(repeats)]
        letters = "".join(HEADS[(n + m) % 2] for m in range(len(repeats)))
        batches.append(batch_of(headed(structures, letters), heads=HEADS))
    expected = [model(fresh(batch), compute_stress=stress) for batch in batches]
    with replaying():
        for _ in range(2):
            model(fresh(batches[0]), compute_stress=stress)
        for batch, theirs in zip(batches, expected, strict=True):
            found = model(fresh(batch), compute_stress=stress)
            assert len(found["energy"]) == len(batch["ptr"]) - 1
            agree(found, theirs)
        assert (captures(), replays()) == (1, len(batches) - 1)


def test_flags_take_turns(model: Any) -> None:
    """Each has a capture of its own; none leaves anything in another."""
    assert len(FLAGS) <= MOST
    expected = {}
    for name, flags in FLAGS.items():
        data = batch_with("ab")
        expected[name] = model(data, **flags), data
    order = [*FLAGS, *reversed(FLAGS), *FLAGS]
    with replaying():
        for name in [*(name for name in FLAGS for _ in range(2)), *order]:
            data = batch_with("ab")
            found = model(data, **FLAGS[name])
            theirs, their_data = expected[name]
            agree(found, theirs)
            assert data.keys() == their_data.keys()
            for key in ("positions", "shifts"):
                assert data[key].requires_grad == their_data[key].requires_grad
                torch.testing.assert_close(data[key], their_data[key], rtol=1e-14, atol=1e-14)
        assert (captures(), replays()) == (len(FLAGS), len(order) - len(FLAGS))


def test_models_beside_each_other() -> None:
    """Four, of one head and two, two of which differ in weights alone, captured and replayed in turns."""
    models = [two_headed(), mace(), two_headed(hidden_irreps=Irreps("4x0e")), two_headed()]
    for parameter in models[-1].parameters():
        parameter.data.mul_(1.1)
    models = [model.requires_grad_(False) for model in models]
    calls = list(zip(models, ("ab", "aa", "bb", "ba"), FLAGS.values(), strict=True))
    expected = [model(batch_with(heads), **flags) for model, heads, flags in calls]
    with replaying():
        for _ in range(5):
            for (model, heads, flags), theirs in zip(calls, expected, strict=True):
                agree(model(batch_with(heads), **flags), theirs)
        assert (captures(), replays()) == (4, 8)
        del model, models[1], calls[1]
        for (model, heads, flags), theirs in zip(calls, [expected[0], *expected[2:]], strict=True):
            agree(model(batch_with(heads), **flags), theirs)
