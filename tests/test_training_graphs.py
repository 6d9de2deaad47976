"""Training calls that are replayed, with a stand-in for CUDA graphs: everything but the device.

The stand-in forgets what a forward left for its gradients as soon as another is replayed, as graphs that share
memory do.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from model_graphs import CpuLane, batch_of, captures, fresh, ice, replaying, rows, water

from e3nn_accel.graphs.derivative import in_place_of_parameters
from e3nn_accel.graphs.model_state import ENOUGH, RARE

pytest.importorskip("mace")
from slow_cases import slow_but
from small_models import mace

pytestmark = [pytest.mark.mace, pytest.mark.usefixtures("eager_e3nn")]
WEIGHTS = {"energy": 1.0, "forces": 10.0, "stress": 3.0}
STRESS = pytest.mark.parametrize("stress", [False, True], ids=["forces", "stress"])


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    return batch_of([ice(1), water()])


@pytest.fixture
def model() -> Any:
    return mace()


def replays() -> int:
    return rows().get(("graph", "training"), 0)


def loss_of(out: dict[str, Any], only: tuple[str, ...] = tuple(WEIGHTS)) -> torch.Tensor:
    """Of what there is, no two numbers of which weigh the same."""
    total = torch.zeros((), dtype=torch.float64)
    for name in only:
        if out.get(name) is not None:
            value = out[name]
            aims = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
            total = total + WEIGHTS.get(name, 1.0) * (value - aims).square().sum()
    return total


def gradients(model: Any) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def step(model: Any, data: dict[str, Any], **flags: Any) -> dict[str, Any]:
    """Gradients are those of this step alone."""
    model.zero_grad(set_to_none=True)
    out = model(data, training=True, **flags)
    loss_of(out).backward()
    return out


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        assert found[name] is not None, name
        assert found[name].requires_grad == value.requires_grad, name
        scale = max(float(value.detach().abs().max()), 1e-3)
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11 * scale, msg=name)


def warmed_up(model: Any, batch: dict[str, Any], **flags: Any) -> None:
    """Until calls of this size are replayed."""
    for _ in range(ENOUGH):
        step(model, fresh(batch), **flags)
    assert captures() >= 1


@STRESS
def test_a_step_is_stocks(model: Any, batch: dict[str, Any], stress: bool) -> None:
    """Results, gradients of parameters and of positions; what is done to the batch, too."""
    stock = copy.deepcopy(model)
    expected_data = fresh(batch)
    positions = expected_data["positions"]
    expected = step(stock, expected_data, compute_stress=stress)
    with replaying():
        for _ in range(ENOUGH + 2):
            data = fresh(batch)
            own = data["positions"]
            found = step(model, data, compute_stress=stress)
        assert rows() == {
            ("eager", RARE): ENOUGH - 1,
            ("graph", "captured"): 1,
            ("graph", "training"): 2,
        }
    agree(found, expected)
    agree(gradients(model), gradients(stock))
    agree({"positions": own.grad}, {"positions": positions.grad})
    assert data.keys() == expected_data.keys()
    for name, value in expected_data.items():
        if torch.is_tensor(value):
            assert data[name].requires_grad == value.requires_grad, name
            torch.testing.assert_close(data[name], value, rtol=1e-14, atol=1e-14)


class Rounding(CpuLane):
    """Replays differ from eager calls by what sums in another order differ by on a GPU."""

    def record(self, run: Any, derivative: Any = None) -> Any:
        found = super().record(run, derivative)
        replay = found.replay

        def rounding() -> None:
            replay()
            for tensor in found.produced.tensors:
                if tensor.is_floating_point():
                    tensor.data.mul_(1 + 1e-6)

        found.replay = rounding
        return found


def test_a_step_in_float32(batch: dict[str, Any]) -> None:
    """Whose energies MACE sums in float64: what is compared after a capture isn't all of one precision."""
    model = mace().float()
    single = {
        k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in batch.items()
    }
    stock = copy.deepcopy(model)
    expected = step(stock, fresh(single))
    assert {v.dtype for v in expected.values() if torch.is_tensor(v)} == {
        torch.float32,
        torch.float64,
    }
    with replaying(Rounding):
        warmed_up(model, single)
        found = step(model, fresh(single))
        assert replays() == 1
    torch.testing.assert_close(found["forces"], expected["forces"], rtol=1e-4, atol=1e-6)
    for name, gradient in gradients(stock).items():
        if gradient is not None:
            error = (gradients(model)[name] - gradient).norm()
            assert error <= 1e-4 * gradient.norm() + 1e-7, name


def test_a_training_of_many_steps(model: Any) -> None:
    """Other structures and sizes each step, weights that an optimiser changes: the same losses as stock's."""
    batches = [batch_of([ice(n), water()] if n % 3 else [ice(n, repeat=2)]) for n in range(14)]
    losses = []
    for trained in (copy.deepcopy(model), model):
        optimiser = torch.optim.Adam(trained.parameters(), lr=1e-2, amsgrad=True)
        losses.append([])
        with replaying() if trained is model else _nothing():
            for data in batches:
                out = step(trained, fresh(data), compute_stress=True)
                losses[-1].append(float(loss_of(out).detach()))
                optimiser.step()
            assert trained is not model or replays() >= 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-3)


def _nothing() -> Any:
    return contextlib.nullcontext()


@pytest.mark.parametrize(
    "only",
    slow_but(["energy", "forces", "stress", "node_energy", "node_feats"], "energy", "node_feats"),
)
def test_losses_of_one_result(model: Any, batch: dict[str, Any], only: str) -> None:
    """A parameter on which it doesn't depend has no gradient, as stock's, and not one of zeros."""
    stock = copy.deepcopy(model)
    loss_of(stock(fresh(batch), training=True, compute_stress=True), (only,)).backward()
    with replaying():
        warmed_up(model, batch, compute_stress=True)  # of other results
        model.zero_grad(set_to_none=True)
        loss_of(model(fresh(batch), training=True, compute_stress=True), (only,)).backward()
        assert replays() == 1
    agree(gradients(model), gradients(stock))


def test_energies_alone(model: Any, batch: dict[str, Any]) -> None:
    stock = copy.deepcopy(model)
    expected = step(stock, fresh(batch), compute_force=False)
    with replaying():
        warmed_up(model, batch, compute_force=False)
        found = step(model, fresh(batch), compute_force=False)
        assert replays() == 1
    agree(found, expected)
    agree(gradients(model), gradients(stock))


def test_gradients_are_summed_over_batches(model: Any, batch: dict[str, Any]) -> None:
    """Forward, forward, and gradients of both: the first forward is replayed once more."""
    stock = copy.deepcopy(model)
    others = [batch, batch_of([ice(5), water()])]
    (sum(loss_of(stock(fresh(b), training=True)) for b in others)).backward()
    with replaying():
        warmed_up(model, batch)
        model.zero_grad(set_to_none=True)
        (sum(loss_of(model(fresh(b), training=True)) for b in others)).backward()
        assert replays() == 2
        agree(gradients(model), gradients(stock))
        for b in others:  # one after the other, into the same gradients
            loss_of(model(fresh(b), training=True)).backward()
    agree(gradients(model), {n: 2 * g for n, g in gradients(stock).items()})


def test_gradients_are_the_callers(model: Any, batch: dict[str, Any]) -> None:
    """The next replay doesn't write into them."""
    with replaying():
        warmed_up(model, batch)
        step(model, fresh(batch))
        kept = gradients(model)
        copies = {name: grad.clone() for name, grad in kept.items() if grad is not None}
        step(model, fresh(batch_of([ice(3), water()])))
        assert replays() == 2
    for name, grad in copies.items():
        assert torch.equal(kept[name], grad), name


def test_twice_from_one_graph(model: Any, batch: dict[str, Any]) -> None:
    """retain_graph=True as for stock; without it stock's error."""
    with replaying():
        warmed_up(model, batch)
        model.zero_grad(set_to_none=True)
        loss = loss_of(model(fresh(batch), training=True))
        loss.backward(retain_graph=True)
        once = {name: grad.clone() for name, grad in gradients(model).items() if grad is not None}
        loss.backward()
        for name, grad in once.items():
            torch.testing.assert_close(gradients(model)[name], 2 * grad, rtol=1e-12, atol=1e-14)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_validation_in_between(model: Any, batch: dict[str, Any]) -> None:
    """Calls of frozen parameters between a forward and its gradients, as well as between steps."""
    stock = copy.deepcopy(model)
    step(stock, fresh(batch))
    with replaying():
        warmed_up(model, batch)
        model.requires_grad_(False)
        for _ in range(ENOUGH + 1):
            model(fresh(batch))
        assert captures() == 2
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)
        loss = loss_of(model(fresh(batch), training=True))
        model.requires_grad_(False)
        model(fresh(batch_of([ice(9), water()])))
        model.requires_grad_(True)
        loss.backward()
        assert (captures(), replays()) == (2, 1)
    agree(gradients(model), gradients(stock))


def test_some_parameters_frozen(model: Any, batch: dict[str, Any]) -> None:
    """Each choice of them is captured by itself."""
    stock = copy.deepcopy(model)
    with replaying():
        warmed_up(model, batch)
        for trained in (model, stock):
            trained.products.requires_grad_(False)
        warmed_up(model, batch)
        step(model, fresh(batch))
        assert captures() == 2
    step(stock, fresh(batch))
    agree(gradients(model), gradients(stock))
    assert all(p.grad is None for p in model.products.parameters())


def test_weights_written_before_their_gradients(model: Any, batch: dict[str, Any]) -> None:
    """Stock's error, and the next step is right."""
    stock = copy.deepcopy(model)
    with replaying():
        warmed_up(model, batch)
        loss = loss_of(model(fresh(batch), training=True))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        step(model, fresh(batch))
        assert replays() == 2
    stock.load_state_dict(model.state_dict())
    step(stock, fresh(batch))
    agree(gradients(model), gradients(stock))


def test_derivatives_of_gradients(model: Any, batch: dict[str, Any]) -> None:
    """With create_graph=True they are found eagerly."""
    stock = copy.deepcopy(model)
    found = []
    for trained in (stock, model):
        with replaying() if trained is model else _nothing():
            if trained is model:
                warmed_up(model, batch)
            parameters = [p for p in trained.parameters() if p.numel()]
            loss = loss_of(trained(fresh(batch), training=True))
            first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            norm = sum(g.square().sum() for g in first if g is not None)
            found.append(torch.autograd.grad(norm, parameters, allow_unused=True))
            assert trained is not model or replays() == 1
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_by_positions_and_displacement(model: Any, batch: dict[str, Any]) -> None:
    """What else a caller may differentiate by."""
    found = []
    stock = copy.deepcopy(model)
    for trained in (stock, model):
        with replaying() if trained is model else _nothing():
            if trained is model:
                warmed_up(model, batch, compute_stress=True)
            data = fresh(batch)
            own = data["positions"]
            out = trained(data, training=True, compute_stress=True)
            by = [own, out["displacement"]]
            found.append(torch.autograd.grad(loss_of(out), by))
            assert trained is not model or replays() == 1
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_parameters_are_the_models_again(model: Any, batch: dict[str, Any]) -> None:
    """Others stand for them while a step is captured; not afterwards, nor when the capture fails."""
    before = dict(model.named_parameters())

    class Failing(CpuLane):
        def record(self, run: Any, derivative: Any = None) -> Any:
            assert derivative is not None
            now = dict(model.named_parameters())
            assert now.keys() == before.keys()
            assert not any(now[name] is before[name] for name in now)
            assert all(now[name].data_ptr() == before[name].data_ptr() for name in now)
            assert all(type(now[name]) is type(before[name]) for name in now)
            raise RuntimeError("no capture")

    for lane in (Failing, CpuLane):
        with replaying(lane):
            for _ in range(ENOUGH + 1):
                step(model, fresh(batch))
            how = ("eager", "capture failed: RuntimeError: no capture")
            assert rows()[how if lane is Failing else ("graph", "captured")] >= 1
        now = dict(model.named_parameters())
        assert all(now[name] is before[name] for name in before)


def test_doubles_of_parameters() -> None:
    """One for a parameter that two modules share; TorchScript's are themselves; frozen ones have none."""
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    model = torch.nn.Sequential(first, second, scripted)
    before = list(model.parameters())
    with in_place_of_parameters(model) as doubles:
        assert second.weight is first.weight
        assert doubles[before[0]] is first.weight
        assert first.weight is not before[0]
        assert second.bias not in doubles
        assert {id(p) for p in doubles} == {id(p) for p in before if p.requires_grad}
        assert all(doubles[p] is p for p in scripted.parameters())
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("baked", ["results", "gradients"])
def test_a_capture_that_kept_something_of_its_inputs(
    model: Any, batch: dict[str, Any], baked: str
) -> None:
    """Right for the inputs that it was made of, and for no others: found before it is used."""

    class Baked(CpuLane):
        def record(self, run: Any, derivative: Any = None) -> Any:
            found = super().record(run, derivative)
            if baked == "gradients":
                found.replay_gradients = lambda: found.gradients
            else:
                found.replay = lambda: None
                found.replay_gradients = lambda: found.gradients
            return found

    stock = copy.deepcopy(model)
    with replaying(Baked):
        for _ in range(ENOUGH + 2):
            step(model, fresh(batch))
        ((_, why),) = [key for key in rows() if key[0] == "eager" and key[1] != RARE]
        assert why.startswith(f"capture failed: NotCapturable: a replay's {baked} differ from an")
        assert captures() == 0
    step(stock, fresh(batch))
    agree(gradients(model), gradients(stock))


def test_a_parameter_that_is_kept_elsewhere(model: Any, batch: dict[str, Any]) -> None:
    """Its gradient would be missing: not replayed."""
    stock = copy.deepcopy(model)
    for trained in (stock, model):
        kept, forward = [trained.products[0].linear.weight], trained.products[0].forward
        times = lambda *a, forward=forward, kept=kept, **k: forward(*a, **k) * kept[0].sum()  # noqa: E731
        trained.products[0].forward = times
    step(stock, fresh(batch))
    with replaying():
        for _ in range(ENOUGH + 1):
            step(model, fresh(batch))
        why = (
            "capture failed: NotCapturable: forward uses a parameter that isn't one of its module's"
        )
        assert rows()["eager", why] == 2
    agree(gradients(model), gradients(stock))


def test_inputs_that_require_gradients_of_their_own(model: Any, batch: dict[str, Any]) -> None:
    """Not by a replay, which doesn't have them."""
    with replaying():
        warmed_up(model, batch)
        data = fresh(batch)
        data["node_attrs"].requires_grad_(True)
        loss_of(model(data, training=True)).backward()
        assert data["node_attrs"].grad is not None
        assert rows()["eager", "node_attrs requires a gradient"] == 1


def test_frozen_models(model: Any, batch: dict[str, Any]) -> None:
    """Of these training=True wants other derivatives."""
    model.requires_grad_(False)
    with replaying(graph="1"):
        model(fresh(batch), training=True)
        assert rows() == {("eager", "training=True: results are differentiated"): 1}


def test_other_threads(model: Any, batch: dict[str, Any]) -> None:
    """Eager: the same numbers."""
    stock = copy.deepcopy(model)
    step(stock, fresh(batch))
    with replaying():
        warmed_up(model, batch)
        thread = threading.Thread(target=step, args=(model, fresh(batch)))
        thread.start()
        thread.join()
        assert rows()["eager", "training in a thread that isn't the main one"] == 1
    agree(gradients(model), gradients(stock))


def test_several_processes(
    model: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager where they train together; a group of one is none."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with replaying():
        for processes in (1, 2):
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda n=processes: n)
            for _ in range(ENOUGH):
                step(model, fresh(batch))
        assert captures() == 1
        assert rows()["eager", "training in several processes"] == ENOUGH


def test_models_are_let_go(batch: dict[str, Any]) -> None:
    """Also where the gradients of the last step were never asked for."""

    class Holding(CpuLane):
        def record(self, run: Any, derivative: Any = None) -> Any:
            found = super().record(run, derivative)
            found.run = None  # as with a CUDA graph, which doesn't hold what it was captured from
            found.replay = lambda: None
            return found

    model = mace()
    dead = weakref.ref(model)
    with replaying(Holding, self_check=False):
        for _ in range(ENOUGH + 1):
            out = model(fresh(batch), training=True)
        assert replays() == 1
        assert dead() is not None
        del model, out
        gc.collect()
        assert dead() is None


def test_moved_before_their_gradients(model: Any, batch: dict[str, Any]) -> None:
    """Neither what was left nor a replay has them: an error rather than wrong numbers."""
    with replaying():
        warmed_up(model, batch)
        first = loss_of(model(fresh(batch), training=True))
        model(fresh(batch), training=True)
        for p in model.parameters():
            p.data = p.data.clone()
        with pytest.raises(RuntimeError, match="moved"):
            first.backward()
