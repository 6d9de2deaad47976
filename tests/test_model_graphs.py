"""Calls of models that are replayed, with a stand-in for CUDA graphs: everything but the device."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from model_graphs import (
    CpuLane,
    StandIn,
    agree,
    batch_of,
    captures,
    fresh,
    ice,
    replaying,
    replays,
    rows,
    use_stand_ins,
    water,
)

import e3nn_accel
from e3nn_accel import switch
from e3nn_accel.graphs.model_state import ENOUGH, RARE

pytest.importorskip("mace")
from small_models import mace

pytestmark = pytest.mark.mace
STRESS = pytest.mark.parametrize("stress", [False, True], ids=["forces", "stress"])


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    return batch_of([ice(1), water()])


@pytest.fixture
def model() -> Any:
    return mace().requires_grad_(False).eval()


def reasons() -> set[str]:
    return {why for how, why in rows() if how == "eager" and why != RARE}


@STRESS
def test_the_same_as_eager(model: Any, batch: dict[str, Any], stress: bool) -> None:
    """The first calls eager, then captured, then replayed; what is done to the batch, too."""
    expected_data = fresh(batch)
    positions = expected_data["positions"]
    expected = model(expected_data, compute_stress=stress)
    with replaying():
        for _ in range(ENOUGH + 2):
            data = fresh(batch)
            own = data["positions"]
            found = model(data, compute_stress=stress)
        assert rows() == {("eager", RARE): ENOUGH - 1, ("graph", "captured"): 1, ("graph", ""): 2}
    agree(found, expected)
    assert own.requires_grad == positions.requires_grad
    assert (data["positions"] is own) == (expected_data["positions"] is positions)
    assert data.keys() == expected_data.keys()
    for name, value in expected_data.items():
        if torch.is_tensor(value):
            assert data[name].requires_grad == value.requires_grad, name
            torch.testing.assert_close(data[name], value, rtol=1e-14, atol=1e-14)


def test_fresh_inputs_every_time(model: Any) -> None:
    """Other positions, sizes, numbers of structures: nothing stays of the call before."""
    batches = [
        batch_of([ice(n), water()] if n % 3 else [ice(n, repeat=2), ice(n), water()])
        for n in range(9)
    ]
    expected = [model(fresh(b), compute_stress=True) for b in batches]
    with replaying(graph="1"):
        for b, theirs in zip(batches, expected, strict=True):
            found = model(fresh(b), compute_stress=True)
            torch.testing.assert_close(found["forces"], theirs["forces"], rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(found["stress"], theirs["stress"], rtol=1e-12, atol=1e-13)
        assert reasons() == set()
        assert replays() >= 5


def test_results_may_be_kept(model: Any, batch: dict[str, Any]) -> None:
    """They are copies, and so is what is put into the batch."""
    with replaying(graph="1"):
        data = fresh(batch)
        first = model(data, compute_stress=True)
        kept = {k: v.clone() for k, v in first.items() if v is not None}
        shifts = data["shifts"].clone()
        other = fresh(batch)
        other["positions"] += torch.rand_like(other["positions"])
        model(other, compute_stress=True)
    assert all(torch.equal(first[k], v) for k, v in kept.items())
    assert torch.equal(data["shifts"], shifts)


def test_the_same_batch_again(model: Any, batch: dict[str, Any]) -> None:
    """Its positions require a gradient since the first call, and aren't leaves after one with stress."""
    expected = model(fresh(batch), compute_stress=True)
    with replaying():
        data = fresh(batch)
        for _ in range(ENOUGH + 2):
            found = model(data)
        assert replays() == 2
        for _ in range(ENOUGH + 2):
            found = model(data, compute_stress=True)
        assert replays() == 4
        assert reasons() == set()
    agree(found, expected)


@pytest.mark.parametrize("name", ["energy", "node_energy", "interaction_energy", "node_feats"])
@STRESS
def test_gradients_of_results(model: Any, batch: dict[str, Any], stress: bool, name: str) -> None:
    """Stock MACE refuses them without training=True; here forward is run again."""
    stock = fresh(batch)
    leaf = stock["positions"]
    weight = torch.rand_like(model(stock, training=True, compute_stress=stress)[name].detach())
    value = model(fresh(batch) | {"positions": leaf}, training=True, compute_stress=stress)[name]
    (expected,) = torch.autograd.grad((value * weight).sum(), leaf)
    with replaying():
        for _ in range(ENOUGH + 1):
            data = fresh(batch)
            own = data["positions"]
            found = model(data, compute_stress=stress)
        assert replays() == 1
        (gradient,) = torch.autograd.grad((found[name] * weight).sum(), own)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_gradients_go_on_to_what_positions_came_from(model: Any, batch: dict[str, Any]) -> None:
    strain = torch.eye(3, dtype=torch.float64, requires_grad=True)
    with replaying():
        for _ in range(ENOUGH + 1):
            data = fresh(batch)
            data["positions"] = data["positions"] @ strain
            found = model(data)
        assert replays() == 1
        found["energy"].sum().backward()
    assert strain.grad is not None
    expected = -batch["positions"].T @ found["forces"]
    torch.testing.assert_close(strain.grad, expected, rtol=1e-10, atol=1e-12)


def test_not_a_dict(model: Any, batch: dict[str, Any]) -> None:
    """Stock MACE takes whatever has its keys."""

    class Mine(dict):
        pass

    with replaying(graph="1"):
        model(Mine(fresh(batch)))
        assert rows() == {("eager", "the batch is a Mine, not a dict"): 1}


def test_parameters_that_require_gradients(model: Any, batch: dict[str, Any]) -> None:
    """Eager in auto; with 1 captured, and results detached."""
    model.requires_grad_(True)
    with replaying():
        for _ in range(ENOUGH + 2):
            model(fresh(batch))
        assert reasons() == {"parameters require gradients"}
        model.requires_grad_(False)
        for _ in range(ENOUGH + 1):
            model(fresh(batch))
        assert (captures(), replays()) == (1, 1)
        model.requires_grad_(True)
        model(fresh(batch))
        model.requires_grad_(False)
        model(fresh(batch))
        assert (captures(), replays()) == (1, 2)  # training in between costs no capture
    model.requires_grad_(True)
    with replaying(graph=True):
        model(fresh(batch))
        found = model(fresh(batch), compute_stress=True)
        assert captures() == 2
    assert not any(v.requires_grad for v in found.values() if v is not None)


def test_never(model: Any, batch: dict[str, Any]) -> None:
    with replaying(graph=False):
        for _ in range(ENOUGH + 2):
            model(fresh(batch))
        assert rows() == {}


def test_other_devices_pass_unreported(model: Any, batch: dict[str, Any]) -> None:
    with e3nn_accel.enabled(graph="1"):
        model(fresh(batch))
        assert rows() == {}


def test_one_model_only(model: Any, batch: dict[str, Any]) -> None:
    """`accelerate(model, graph=...)`."""
    other = mace().requires_grad_(False)
    e3nn_accel.accelerate(model, graph="1")
    use_stand_ins()
    for _ in range(2):
        model(fresh(batch))
        other(fresh(batch))
    assert rows() == {("graph", "captured"): 1, ("graph", ""): 1}


FLAGS = {
    "training=True: results are differentiated": {"training": True},
    "compute_force=False: the energy may be differentiated": {"compute_force": False},
    "compute_hessian=True": {"compute_hessian": True},
    "compute_edge_forces=True": {"compute_edge_forces": True},
    "compute_atomic_stresses=True": {"compute_atomic_stresses": True, "compute_stress": True},
}


@pytest.mark.parametrize(("why", "flags"), FLAGS.items(), ids=FLAGS)
def test_flags(model: Any, batch: dict[str, Any], why: str, flags: dict[str, bool]) -> None:
    expected = model(fresh(batch), **flags)
    with replaying(graph="1"):
        found = model(fresh(batch), **flags)
        assert rows() == {("eager", why): 1}
    for name, value in expected.items():
        if value is not None:
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_flags_by_position(model: Any, batch: dict[str, Any]) -> None:
    with replaying(graph="1"):
        found = model(fresh(batch), False, True, False, True)
        again = model(data=fresh(batch), compute_stress=1)
        assert (captures(), replays()) == (1, 1)
        for args, kwargs in (((), {}), ((1,) * 11, {}), ((), {"nonsense": True})):
            with pytest.raises((TypeError, AttributeError, RuntimeError)):
                model(*((fresh(batch), *args) if args or kwargs else ()), **kwargs)
    assert torch.equal(found["stress"], again["stress"])


def _no_grad(model: Any, batch: Any) -> Any:
    with torch.no_grad():
        return model(fresh(batch))


def _anomaly(model: Any, batch: Any) -> Any:
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        return model(fresh(batch))


def _dispatch_mode(model: Any, batch: Any) -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            return function(*args, **(kwargs or {}))

    with Counting():
        return model(fresh(batch))


def _cell(model: Any, batch: Any) -> Any:
    data = fresh(batch)
    data["cell"].requires_grad_(True)
    return model(data)


def _displacement(model: Any, batch: Any) -> Any:
    data = fresh(batch) | {"displacement": torch.zeros(2, 3, 3, dtype=torch.float64)}
    data["displacement"].requires_grad_(True)
    return model(data, compute_stress=True)


def _subclass(model: Any, batch: Any) -> Any:
    class Marked(torch.Tensor):
        pass

    return model(fresh(batch) | {"batch": batch["batch"].as_subclass(Marked)})


def _lacks(model: Any, batch: Any) -> Any:
    data = fresh(batch)
    del data["ptr"]
    return model(data)


def _inference_tensor(model: Any, batch: Any) -> Any:
    with torch.inference_mode():
        cell = batch["cell"].clone()
    return model(fresh(batch) | {"cell": cell})


def _nothing(model: Any, batch: Any) -> Any:
    return model(fresh(batch) | {"unit_shifts": None})


STATES = {
    "gradients are off, without which MACE has no forces": (_no_grad, RuntimeError),
    "anomaly detection looks at every value": (_anomaly, None),
    "a torch dispatch mode is on": (_dispatch_mode, None),
    "cell requires a gradient": (_cell, None),
    "the caller gives a displacement of its own": (_displacement, None),
    "batch is a Marked, not a plain tensor": (_subclass, None),
    "unit_shifts is a NoneType, not a plain tensor": (_nothing, None),
    "the batch lacks inputs": (_lacks, KeyError),
    "cell was made in inference mode": (_inference_tensor, None),
}


@pytest.mark.parametrize("later", [False, True], ids=["first call", "after a replay"])
@pytest.mark.parametrize(("why", "what"), STATES.items(), ids=STATES)
def test_states(model: Any, batch: dict[str, Any], why: str, what: Any, later: bool) -> None:
    """Eager, with stock MACE's own error where it has one; a batch like it that was replayed changes nothing."""
    run, error = what
    expected = None if error else run(model, batch)
    with replaying(graph="1"):
        if later:
            model(fresh(batch))
            model(fresh(batch))
        if error:
            with pytest.raises(error):
                run(model, batch)
        else:
            found = run(model, batch)
            ours, theirs = (x["forces"].as_subclass(torch.Tensor) for x in (found, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        replayed = {("graph", "captured"): 1, ("graph", ""): 1} if later else {}
        assert rows() == {**replayed, ("eager", why): 1}


def test_configurations_that_leave_models_alone(model: Any, batch: dict[str, Any]) -> None:
    cases = [({"skip": "ScaleShiftMACE"}, "left out"), ({"verify": True}, "verify compares")]
    cases += [({"profile": True}, "profiling"), ({"only": "TensorProduct"}, "not among")]
    for options, why in cases:
        with replaying(graph="1", **options):
            model(fresh(batch))
            assert len(rows()) == 1
            assert why in next(iter(rows()))[1]


def test_hooks(model: Any, batch: dict[str, Any]) -> None:
    """On the model or on a module of it; removed, the captured graph serves again."""
    with replaying(graph="1"):
        model(fresh(batch))
        for module in (model, model.readouts[0], model.interactions[1].linear):
            heard: list[int] = []
            hook = module.register_forward_hook(lambda *_: heard.append(1))  # noqa: B023
            model(fresh(batch))
            assert heard == [1]
            hook.remove()
        model(fresh(batch))
        assert (captures(), replays()) == (1, 1)
        assert all("hooks" in why for why in reasons())


def _load(model: Any, twin: Any) -> None:
    model.load_state_dict(twin.state_dict())


def _average(model: Any, twin: Any) -> None:
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        own.data.copy_(other.data)


def _assign(model: Any, twin: Any) -> None:
    model.load_state_dict(twin.state_dict(), assign=True)


def _data(model: Any, twin: Any) -> None:
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        own.data = other.data.clone()


def _modules(model: Any, twin: Any) -> None:
    for name, child in twin.named_children():
        setattr(model, name, child)


def _fine_tune(model: Any, twin: Any) -> None:
    """Steps of an optimiser until the weights are the twin's."""
    model.requires_grad_(True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            own.grad = own.detach() - other
        optimiser.step()
    model.requires_grad_(False)


def _moving_average(model: Any, twin: Any) -> None:
    """MACE's own, of weights that were the twin's at its last update."""
    from torch_ema import ExponentialMovingAverage

    average = ExponentialMovingAverage(twin.parameters(), decay=0.99)
    average.copy_to(model.parameters())


IN_PLACE = (_load, _average, _fine_tune, _moving_average)


@pytest.mark.parametrize(
    ("change", "anew"), [*((c, 0) for c in IN_PLACE), (_assign, 1), (_data, 1), (_modules, 1)]
)
def test_weights_that_change(model: Any, batch: dict[str, Any], change: Any, anew: int) -> None:
    """In place they show by themselves; elsewhere they are captured anew."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.mul_(1.1)
    expected = twin(fresh(batch))
    before = model(fresh(batch))
    assert not torch.allclose(before["energy"], expected["energy"], rtol=1e-6)
    with replaying(graph="1"):
        model(fresh(batch))
        change(model, twin)
        torch.testing.assert_close(model(fresh(batch))["forces"], expected["forces"])
        assert captures() == 1 + anew


def _number(model: Any) -> None:
    model.interactions[0].avg_num_neighbors = 7.0


def _buffer(model: Any) -> None:
    model.scale_shift.scale = 3 * model.scale_shift.scale


def _forward(model: Any) -> None:
    block = model.scale_shift
    block.forward = lambda x, head: 2 * type(block).forward(block, x, head)


@pytest.mark.parametrize("change", [_number, _buffer, _forward])
def test_models_that_change(model: Any, batch: dict[str, Any], change: Any) -> None:
    """Whatever forward depends on besides weights in place."""
    twin = copy.deepcopy(model)
    change(twin)
    expected = twin(fresh(batch))
    with replaying(graph="1"):
        before = model(fresh(batch))
        assert not torch.allclose(before["forces"], expected["forces"], rtol=1e-3)
        change(model)
        torch.testing.assert_close(model(fresh(batch))["forces"], expected["forces"])
        assert captures() == 2


class Stale(CpuLane):
    """As a graph's, results of a replay are of the model that was captured, whatever became of it since."""

    def record(self, run: Any, derivative: Any = None) -> Any:
        found: Any = super().record(run, derivative)
        found.replay = lambda: None
        return found


def _mode(model: Any, twin: Any) -> None:
    model.train()
    _data(model, twin)


def _requires_gradients(model: Any, twin: Any) -> None:
    _load(model, twin)
    model.requires_grad_(True)


def _hooked(model: Any, twin: Any) -> None:
    _load(model, twin)
    model.readouts[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [_assign, _data, _modules, _number, _buffer, _forward, _mode, _requires_gradients, _hooked],
)
def test_nobody_hears_of_results_of_another_model(
    model: Any, batch: dict[str, Any], change: Any
) -> None:
    """The last call's graph is replayed before the model is looked at; if it has changed, that was for nothing."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.mul_(1.1)
    with replaying(Stale):
        for _ in range(ENOUGH + 1):
            before = model(fresh(batch))
        assert (captures(), replays()) == (1, 1)
        change(model, twin) if change not in (_number, _buffer, _forward) else change(model)
        found = [model(fresh(batch))["forces"].detach() for _ in range(ENOUGH + 1)]
    expected = model(fresh(batch))["forces"].detach()
    assert not torch.allclose(before["forces"], expected, rtol=1e-3)
    for forces in found:
        torch.testing.assert_close(forces, expected)


def test_numbers_and_modes(model: Any, batch: dict[str, Any]) -> None:
    """Each has a capture of its own, kept while the others are used."""
    with replaying(graph="1"):
        model(fresh(batch))
        model.train()
        model(fresh(batch))
        assert captures() == 2
        model.eval()
        torch.use_deterministic_algorithms(True)
        try:
            model(fresh(batch))
        finally:
            torch.use_deterministic_algorithms(False)
        assert captures() == 3
        model(fresh(batch))
        assert (captures(), replays()) == (3, 1)


def test_other_dtypes(model: Any, batch: dict[str, Any]) -> None:
    """A model that is converted is captured anew."""
    with replaying(graph="1"):
        model(fresh(batch))
        model.float()
        single = {
            k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in fresh(batch).items()
        }
        found = model(single)
        assert captures() == 2
    assert found["forces"].dtype == torch.float32


def test_options_that_change(model: Any, batch: dict[str, Any]) -> None:
    """Captured graphs hold the plans of their time."""
    e3nn_accel.enable(graph="1")
    use_stand_ins()
    model(fresh(batch))
    e3nn_accel.enable(graph="1", skip="Linear")
    model(fresh(batch))
    assert captures() == 1  # counted since options changed
    e3nn_accel.disable()
    assert type(model).__call__ is torch.nn.Module.__call__


def test_a_capture_that_fails(model: Any, batch: dict[str, Any]) -> None:
    """Eager from then on, with the reason, until the model changes."""
    attempts: list[int] = []

    class Failing(CpuLane):
        def record(self, run: Any, derivative: Any = None) -> Any:
            attempts.append(1)
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    expected = model(fresh(batch))
    with replaying(Failing, graph="1"):
        for _ in range(3):
            agree(model(fresh(batch)), expected)
        assert rows() == {("eager", "capture failed: RuntimeError: operation not permitted"): 3}
        assert len(attempts) == 1
        model.interactions[0].avg_num_neighbors = 5.0
        model(fresh(batch))
        assert len(attempts) == 2


def test_arguments_that_nothing_takes(model: Any, batch: dict[str, Any]) -> None:
    """Stock MACE's error, and no other call suffers."""
    bad = fresh(batch)
    bad["edge_index"][0, 0] = 999
    with replaying(graph="1"):
        with pytest.raises((IndexError, RuntimeError)):
            model(fresh(bad))
        model(fresh(batch))
        assert captures() == 1


def test_memory(model: Any, batch: dict[str, Any]) -> None:
    """What takes too much isn't kept, and larger ones aren't tried; smaller ones are."""

    class Large(CpuLane):
        limit = 1 << 20

        def record(self, run: Any, derivative: Any = None) -> Any:
            found = StandIn(run, derivative)
            found.bytes = (1 << 21) if len(found.produced.tensors[0]) > 2 else 1
            return found

    with replaying(Large, graph="1"):
        for _ in range(2):
            model(fresh(batch))
        assert captures() == 0
        assert len(reasons()) == 1
        assert "too much to keep" in reasons().pop()
        model(batch_of([water()]))
        assert captures() == 1
        detail = next(row.detail for row in e3nn_accel.report().rows if row.backend == "graph")
        assert detail == "captured"
        model(batch_of([water()]))
        detail = next(r.detail for r in e3nn_accel.report().rows if "kept, " in r.detail)
        assert detail == "replayed; 1 sizes kept, 0 MiB (8 atoms, 64 edges, 2 structures)"

    class Full(CpuLane):
        def record(self, run: Any, derivative: Any = None) -> Any:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with replaying(Full, graph="1"):
        model(fresh(batch))
        assert reasons() == {"capture failed: OutOfMemoryError: CUDA out of memory"}


def test_a_handful_is_kept(model: Any) -> None:
    """The least recently used one goes; sizes that come and go are captured less and less often."""
    batches = [batch_of([ice(n, repeat=n)]) for n in range(1, 7)]
    with replaying(graph="1"):
        for batch in batches[:5]:
            model(fresh(batch))
        assert captures() == 5
        for batch in batches[1:5]:
            model(fresh(batch))
        assert replays() == 4
        for _ in range(4):
            for batch in batches:
                model(fresh(batch))
        assert captures() <= 9
        assert "4 sizes kept" in str(e3nn_accel.report())


def test_two_models_and_threads(model: Any, batch: dict[str, Any]) -> None:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    models = [model, other]
    expected = [m(fresh(batch))["forces"] for m in models]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(5):
            found = models[n % 2](fresh(batch))["forces"]
            if not torch.allclose(found, expected[n % 2], rtol=1e-10):
                wrong.append(n)

    with replaying(graph="1"):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (captures(), replays()) == (2, 18)
    assert wrong == []


def test_models_are_let_go(batch: dict[str, Any]) -> None:
    """Nothing that is kept holds the model; a copy of it has nothing of ours."""
    model = mace().requires_grad_(False)
    dead = weakref.ref(model)
    recorded: list[Any] = []

    class Holding(CpuLane):
        def record(self, run: Any, derivative: Any = None) -> Any:
            found = super().record(run, derivative)
            recorded.append(weakref.ref(found))
            found.run = None  # as with a CUDA graph, which doesn't hold what it was captured from
            found.replay = lambda: None
            return found

    with replaying(Holding, graph="1"):
        model(fresh(batch))
        assert "graph" not in str(vars(copy.deepcopy(model)).keys())
        del model
        gc.collect()
        assert dead() is None
        assert recorded[0]() is None


def test_a_model_of_another_kind(batch: dict[str, Any]) -> None:
    """A subclass with a forward of its own runs that."""
    from mace.modules.models import ScaleShiftMACE

    class Mine(ScaleShiftMACE):
        def forward(self, data: Any, *args: Any, **kwargs: Any) -> Any:
            return {"mine": super().forward(data, *args, **kwargs)["energy"]}

    model = mace().requires_grad_(False)
    model.__class__ = Mine
    with replaying(graph="1"):
        assert list(model(fresh(batch))) == ["mine"]
        assert reasons() == {"it has a forward of its own"}


def test_the_class_is_restored() -> None:
    from mace.modules.models import MACE, ScaleShiftMACE

    before = [dict(vars(cls)) for cls in (MACE, ScaleShiftMACE)]
    e3nn_accel.enable()
    assert all("__call__" in vars(cls) for cls in (MACE, ScaleShiftMACE))
    assert switch.active.dispatcher is not None
    e3nn_accel.disable()
    assert [dict(vars(cls)) for cls in (MACE, ScaleShiftMACE)] == before


def test_scripted_and_suspended(model: Any, batch: dict[str, Any]) -> None:
    """TorchScript compiles what it always did; within `suspend` nothing is replayed."""
    from e3nn.util import jit

    from e3nn_accel.interception import suspend

    with replaying(graph="1"):
        scripted = jit.compile(copy.deepcopy(model))
        assert isinstance(scripted, torch.jit.ScriptModule)
        with suspend():
            model(fresh(batch))
        assert rows() == {}
