"""Gathers of calls that aren't replayed: training steps, derivatives of any kind, and what must see torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_graphs import batch_of, fresh, ice, replaying, water

import e3nn_accel
from e3nn_accel import switch
from e3nn_accel.gathers import while_graphs_are_prepared
from e3nn_accel.graphs import GATHERS, eager

pytest.importorskip("mace")
from mace.modules import extensions, models
from small_models import mace

pytestmark = pytest.mark.mace
STRESS = pytest.mark.parametrize("stress", [False, True], ids=["forces", "stress"])


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """These batches have a few hundred edges at most."""
    monkeypatch.setattr(eager, "ENOUGH_EDGES", 0)


@pytest.fixture(scope="module")
def model() -> Any:
    return mace().eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    """Two structures with cells, one without."""
    return batch_of([ice(1), water(), ice(2, repeat=2)])


def gathers() -> dict[tuple[str, str], int]:
    """Calls by whose gradients their gathers had, and why."""
    assert switch.active.dispatcher is not None
    return {
        (backend, reason): usage.calls
        for runner in switch.active.dispatcher.runners.values()
        for (operation, backend, reason), usage in runner.usage.items()
        if operation == GATHERS
    }


def nodes_of(out: torch.Tensor) -> set[str]:
    """Names of the functions of autograd's graph."""
    found, left, names = set(), [out.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in found:
            continue
        found.add(node)
        names.add(type(node).__name__)
        left += [following for following, _ in node.next_functions]
    return names


def step(model: Any, data: dict[str, Any], stress: bool) -> list[torch.Tensor]:
    """Results of a training step, the gradients of its loss by every parameter and by the positions."""
    positions = data["positions"]
    model.zero_grad(set_to_none=True)
    out = model(data, training=True, compute_stress=stress)
    results = [out["energy"], out["forces"], *([out["stress"]] if stress else [])]
    loss = sum((n + 1) * result.sin().mean() for n, result in enumerate(results))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*results, *gradients, positions.grad]


def agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, stock in zip(found, expected, strict=True):
        scale = max(float(stock.detach().abs().max()), 1e-3)
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12 * scale)


@STRESS
def test_a_training_step(model: Any, batch: dict[str, Any], stress: bool) -> None:
    """Values, and every gradient of the loss; the same bits each time."""
    expected = step(model, fresh(batch), stress)
    with replaying():
        found = step(model, fresh(batch), stress)
        again = step(model, fresh(batch), stress)
        assert gathers() == {("grouped", ""): 2}
        assert "gathers" in str(e3nn_accel.report())
    assert "_TakenBackward" in nodes_of(found[0])
    assert "_TakenBackward" not in nodes_of(expected[0])
    agree(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@STRESS
@pytest.mark.parametrize("which", ["one", "unsorted", "from the end"])
def test_edges_as_they_come(model: Any, stress: bool, which: str) -> None:
    data = batch_of([ice(1)] if which == "one" else [ice(1), water()])
    if which == "unsorted":
        edges = data["edge_index"].shape[1]
        order = torch.randperm(edges, generator=torch.Generator().manual_seed(0))
        data["edge_index"] = data["edge_index"][:, order].T.contiguous().T
        data["shifts"], data["unit_shifts"] = data["shifts"][order], data["unit_shifts"][order]
    if which == "from the end":
        data["edge_index"][0, ::2] -= len(data["positions"])
    expected = step(model, fresh(data), stress)
    with replaying():
        agree(step(model, fresh(data), stress), expected)
        assert gathers() == {("grouped", ""): 1}


def test_several_heads() -> None:
    import numpy as np

    model = mace(
        heads=["first", "second"], atomic_energies=np.array([[-1.0, -2.0], [-3.0, -4.0]]),
        atomic_inter_scale=[1.0, 2.0], atomic_inter_shift=[0.1, 0.2],
    )  # fmt: skip
    structures = [ice(1), water()]
    for atoms, head in zip(structures, model.heads, strict=True):
        atoms.info["head"] = head
    data = batch_of(structures, heads=tuple(model.heads))
    expected = step(model, fresh(data), True)
    with replaying():
        agree(step(model, fresh(data), True), expected)
        assert gathers() == {("grouped", ""): 1}


def test_inference_without_graphs(model: Any, batch: dict[str, Any]) -> None:
    expected = model(fresh(batch), compute_stress=True)
    with replaying(graph="0"):
        found = model(fresh(batch), compute_stress=True)
        assert gathers() == {("grouped", ""): 1}
        with torch.no_grad():
            model(fresh(batch), compute_force=False)
        assert gathers() == {("grouped", ""): 1}
    agree([found["forces"], found["stress"]], [expected["forces"], expected["stress"]])


def test_gradients_of_what_was_replayed(model: Any, batch: dict[str, Any]) -> None:
    """Forward is run again for them."""
    own = mace().requires_grad_(False)
    data = fresh(batch)
    (by_positions,) = torch.autograd.grad(
        own(data, training=True)["energy"].sum(), data["positions"]
    )
    with replaying():
        for _ in range(4):
            data = fresh(batch)
            out = own(data)
        before = gathers()
        (found,) = torch.autograd.grad(out["energy"].sum(), data["positions"])
        assert sum(gathers().values()) == sum(before.values()) + 1
    agree([found], [by_positions])


def test_hessians_see_torchs_own(model: Any) -> None:
    data = batch_of([water()])
    expected = model(fresh(data), compute_hessian=True)["hessian"]
    with replaying():
        found = model(fresh(data), compute_hessian=True)["hessian"]
        assert list(gathers()) == [("torch", "compute_hessian=True: gradients are found by vmap")]
    agree([found], [expected])


def test_many_gradients_at_once(model: Any) -> None:
    """Of whoever batches them over a graph that was made before: stock, where its gradients can be batched."""
    data = batch_of([water()])

    def gradients() -> torch.Tensor:
        batch = fresh(data)
        vectors = models.prepare_graph(batch, compute_stress=True).vectors
        basis = torch.randn((3, *vectors.shape), generator=torch.Generator().manual_seed(0))
        (found,) = torch.autograd.grad(
            vectors, batch["positions"], basis.double(), is_grads_batched=True
        )
        assert ("_TakenBackward" in nodes_of(vectors)) == ours
        return found

    ours = False
    expected = gradients()
    with replaying(), while_graphs_are_prepared():
        ours = True
        agree([gradients()], [expected])


def test_transforms_see_torchs_own(model: Any) -> None:
    """torch.func.grad of the energy."""
    data = batch_of([water()])

    def energy(scale: torch.Tensor) -> torch.Tensor:
        batch = fresh(data)
        batch["shifts"] = batch["shifts"] * scale
        batch["positions"] = batch["positions"] * scale
        return model(batch, compute_force=False)["energy"].sum()

    scale = torch.ones((), dtype=torch.float64)

    def found() -> Any:
        try:
            return torch.func.grad(energy)(scale)
        except RuntimeError as error:
            return str(error)

    expected = found()
    with replaying():
        ours = found()
        assert list(gathers()) == [("torch", "a functorch transform (vmap, grad, ..) is running")]
    assert type(ours) is type(expected)
    if isinstance(ours, torch.Tensor):
        agree([ours], [expected])
    else:
        assert ours == expected


def test_the_function_that_prepares_graphs() -> None:
    """Is MACE's own after disabling, and for TorchScript."""
    before = models.prepare_graph, extensions.prepare_graph
    with e3nn_accel.enabled():
        assert models.prepare_graph is not before[0]
        assert extensions.prepare_graph is not before[1]
        assert models.prepare_graph.__prepare_scriptable__() is before[0]
    assert (models.prepare_graph, extensions.prepare_graph) == before


def test_torchscript_of_a_model(model: Any, batch: dict[str, Any]) -> None:
    """The same code while enabled."""
    from e3nn.util import jit

    scripted = jit.compile(mace())
    with replaying():
        while_enabled = jit.compile(mace())
        found = while_enabled(fresh(batch), compute_stress=True)
        assert not gathers()
    assert scripted.code == while_enabled.code
    agree([found["forces"]], [scripted(fresh(batch), compute_stress=True)["forces"]])


def test_left_alone(model: Any, batch: dict[str, Any]) -> None:
    """A model that the configuration leaves, one of another's, and dispatch modes."""
    from torch.utils.flop_counter import FlopCounterMode

    with replaying(skip="ScaleShiftMACE"):
        out = model(fresh(batch), training=True)
        assert [backend for backend, _ in gathers()] == ["torch"]
        assert "_TakenBackward" not in nodes_of(out["energy"])
    with replaying(), FlopCounterMode(display=False):
        model(fresh(batch), training=True)
        assert list(gathers()) == [("torch", "a torch dispatch mode is on")]


def test_few_edges(model: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own gradients are as fast; the report doesn't speak of it."""
    monkeypatch.setattr(eager, "ENOUGH_EDGES", batch["edge_index"].shape[1] + 1)
    with replaying():
        out = model(fresh(batch), training=True)
        assert not gathers()
        assert "_TakenBackward" not in nodes_of(out["energy"])
        monkeypatch.setattr(eager, "ENOUGH_EDGES", batch["edge_index"].shape[1])
        assert "_TakenBackward" in nodes_of(model(fresh(batch), training=True)["energy"])


def test_one_model_alone(model: Any, batch: dict[str, Any]) -> None:
    from model_graphs import use_stand_ins

    one = e3nn_accel.accelerate(mace())
    try:
        use_stand_ins()
        assert "_TakenBackward" in nodes_of(one(fresh(batch), training=True)["energy"])
        assert "_TakenBackward" not in nodes_of(model(fresh(batch), training=True)["energy"])
    finally:
        e3nn_accel.disable()
