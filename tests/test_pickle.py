"""Files and copies are e3nn's own: nothing of ours goes in, nothing is missing without us."""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh_python
import pytest
import torch
from comparison import assert_ran_on_torch
from small_models import BUILD, build, energy_and_forces, inputs_of, mace, molecules, same

import e3nn_accel

OPERATION = {"Linear": "linear"}


def saved(module: torch.nn.Module) -> bytes:
    """What torch.save writes of a whole module."""
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


def loaded(data: bytes) -> Any:
    """What torch.load makes of it."""
    return torch.load(io.BytesIO(data), weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "torch": lambda m: loaded(saved(m)),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
}


def used(module: torch.nn.Module) -> torch.nn.Module:
    """The module after a call with gradients, so that whatever is cached is there."""
    module(*inputs_of(module)).sum().backward()
    module.zero_grad()
    return module


@pytest.mark.parametrize("name", BUILD)
def test_no_trace_in_the_bytes(name: str) -> None:
    """Pickles of a module in use never name us, not even inside its compiled parts."""
    e3nn_accel.enable()
    module = used(build(name))
    assert_ran_on_torch(module, OPERATION.get(name, "tensor_product"))
    for data in (saved(module), pickle.dumps(module)):
        assert b"e3nn_accel" not in data


@pytest.mark.parametrize("name", BUILD)
def test_the_state_is_stocks(name: str) -> None:
    """The state that is pickled has the same entries; those that stock writes alike are equal."""
    stock, again = build(name), build(name)
    with e3nn_accel.enabled():
        ours = used(build(name))
        state: dict[str, Any] = ours.__getstate__()
    expected = used(stock).__getstate__()
    assert state.keys() == expected.keys()
    assert vars(ours).keys() == vars(stock).keys()
    twin = used(again).__getstate__()
    steady = [
        key for key in expected if len(pickle.dumps(expected[key])) == len(pickle.dumps(twin[key]))
    ]
    assert "_parameters" in steady
    for key in steady:
        assert len(pickle.dumps(state[key])) == len(pickle.dumps(expected[key])), key


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("way", WAYS)
def test_copies_are_accelerated(name: str, way: str) -> None:
    """A module from a pickle or a deep copy gives the same numbers through a plan."""
    module = build(name)
    inputs = inputs_of(module)
    expected = module(*inputs)
    made_before = WAYS[way](module)
    with e3nn_accel.enabled():
        made_after = WAYS[way](module)
        for twin in (made_before, made_after):
            same(twin(*inputs), expected)
            assert type(twin) is type(module)
            assert_ran_on_torch(twin, OPERATION.get(name, "tensor_product"))
    assert torch.equal(made_after(*inputs), expected)


@pytest.mark.parametrize("name", BUILD)
def test_a_copy_made_while_enabled_is_stock_afterwards(name: str) -> None:
    """Copies of copies too: nothing sticks to an instance."""
    with e3nn_accel.enabled():
        twin = copy.deepcopy(pickle.loads(pickle.dumps(used(build(name)))))
        used(twin)
    stock = build(name)
    assert vars(twin).keys() == vars(stock).keys()
    assert torch.equal(twin(*inputs_of(stock)), stock(*inputs_of(stock)))


def faces(module: torch.nn.Module) -> dict[str, object]:
    """What other code may see of a module, its class and its methods."""
    cls = type(module)
    return {
        "state": [(k, v.shape, v.dtype) for k, v in module.state_dict().items()],
        "parameters": [(k, p.shape, p.requires_grad) for k, p in module.named_parameters()],
        "buffers": [k for k, _ in module.named_buffers()],
        "modules": [(k, type(m).__name__) for k, m in module.named_modules()],
        "type": cls,
        "bases": cls.__mro__,
        "repr": repr(module),
        "constructor": inspect.signature(cls),
        "init": inspect.signature(cls.__init__),
        "forward": inspect.signature(module.forward),
        "bound": module.forward.__func__,
        "names": sorted(vars(module)),
        "doc": (cls.__doc__, cls.__init__.__doc__),
        "init name": (cls.__init__.__name__, cls.__init__.__qualname__, cls.__init__.__module__),
    }


@pytest.mark.parametrize("name", BUILD)
def test_a_module_shows_the_same_face(name: str) -> None:
    """Names, types, signatures and representations are stock's while enabled."""
    stock = faces(build(name))
    e3nn_accel.enable()
    assert faces(used(build(name))) == stock


def test_a_mace_shows_the_same_face() -> None:
    """The same for a MACE; torch.fx makes a class for each of its instances, these go by name."""

    def of(model: torch.nn.Module) -> list[dict[str, object]]:
        found = [faces(module) for module in model.modules() if hasattr(type(module), "forward")]
        return [f for f in found if "<locals>" not in f["type"].__qualname__]  # type: ignore[attr-defined]

    stock, names = of(mace()), [(k, type(m).__name__) for k, m in mace().named_modules()]
    e3nn_accel.enable()
    model = mace()
    energy_and_forces(model, molecules())
    assert of(model) == stock
    assert [(k, type(m).__name__) for k, m in model.named_modules()] == names


@pytest.mark.parametrize("way", WAYS)
def test_a_mace_through_a_file(way: str) -> None:
    """A MACE in use, copied, runs through plans wholly and gives the same energies and forces."""
    model, batch = mace(), molecules()
    stock = energy_and_forces(model, batch)
    e3nn_accel.enable()
    energy_and_forces(model, batch)
    twin = WAYS[way](model)
    assert not e3nn_accel.explain(twin).fallbacks
    same(energy_and_forces(twin, batch), stock, 1e-9)
    if way != "deepcopy":
        assert b"e3nn_accel" not in saved(model)
        assert b"conv_fusion" not in pickle.dumps(model)


@pytest.fixture(scope="module")
def without_us(tmp_path_factory: pytest.TempPathFactory) -> fresh_python.FreshPython:
    """A Python that has e3nn but can't import e3nn_accel."""
    python = fresh_python.make(
        tmp_path_factory.mktemp("plain"), start_files=False, see_project=False
    )
    (python.folder / "check.py").write_text(
        "import importlib.util\nassert importlib.util.find_spec('e3nn_accel') is None\n"
    )
    python.run("check.py")
    return python


LOAD = """
import importlib.util, sys, torch
from e3nn import o3
assert importlib.util.find_spec("e3nn_accel") is None
modules, inputs, outputs = torch.load(sys.argv[1], weights_only=False)
for name, module in modules.items():
    torch.testing.assert_close(module(*inputs[name]), outputs[name], rtol=1e-5, atol=1e-5)
    assert type(module) is getattr(o3, name)
torch.save((modules, inputs, {n: m(*inputs[n]) for n, m in modules.items()}), sys.argv[2])
"""


@pytest.mark.slow
def test_a_file_goes_to_a_process_without_us_and_back(
    without_us: fresh_python.FreshPython, tmp_path: Path
) -> None:
    """A file saved while enabled loads where e3nn_accel doesn't exist, and the other way round."""
    e3nn_accel.enable()
    modules = {name: used(build(name)) for name in BUILD}
    inputs = {name: tuple(x.detach() for x in inputs_of(m)) for name, m in modules.items()}
    outputs = {name: module(*inputs[name]).detach() for name, module in modules.items()}
    torch.save((modules, inputs, outputs), tmp_path / "ours.pt")
    without_us.run("-c", LOAD, tmp_path / "ours.pt", tmp_path / "theirs.pt")
    back, inputs, expected = torch.load(tmp_path / "theirs.pt", weights_only=False)
    for name, module in back.items():
        same(module(*inputs[name]), expected[name])
        assert_ran_on_torch(module, OPERATION.get(name, "tensor_product"))


LOAD_MACE = """
import importlib.util, sys, torch
import e3nn.o3  # reads a file of its own, which torch 2.4 can't do within torch.load
assert importlib.util.find_spec("e3nn_accel") is None
model, batch, stock = torch.load(sys.argv[1], weights_only=False)
out = model(dict(batch), training=False)
found = [out["energy"].detach(), out["forces"].detach()]
torch.testing.assert_close(found, stock, rtol=1e-9, atol=1e-9)
"""


def test_a_mace_file_loads_without_us(without_us: fresh_python.FreshPython, tmp_path: Path) -> None:
    """A whole model saved while in use loads in a process without us, with the same forces."""
    model, batch = mace(), molecules()
    stock = energy_and_forces(model, batch)
    e3nn_accel.enable()
    energy_and_forces(model, batch)
    torch.save((model, batch, stock), tmp_path / "model.pt")
    without_us.run("-c", LOAD_MACE, tmp_path / "model.pt")


def test_a_state_dict_goes_both_ways() -> None:
    """State dicts of enabled and stock modules load into each other strictly."""
    for name in BUILD:
        stock, other = build(name, seed=0), build(name, seed=3)
        inputs = inputs_of(stock)
        expected = stock(*inputs)
        with e3nn_accel.enabled():
            used(other).load_state_dict(stock.state_dict(), strict=True)
            same(other(*inputs), expected)
            state = other.state_dict()
        stock.load_state_dict(state, strict=True)
        assert torch.equal(stock(*inputs), expected)


def answer(queue: Any, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """What a spawned child does with a module that it is sent."""
    with torch.no_grad():
        out = module(*inputs)
    queue.put((type(module).__name__, e3nn_accel.report().heading, out.numpy()))


@pytest.mark.parametrize("variable", ["0", "1"])
def test_spawned_children(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module goes to a spawned process by pickle; there it is as enabled as that process is."""
    import torch.multiprocessing

    (tmp_path / "sitecustomize.py").write_text(
        "from e3nn_accel._start._e3nn_accel_boot import main; main()"  # as the start files do
    )
    monkeypatch.setenv("E3NN_ACCEL", variable)
    path = [str(tmp_path), str(fresh_python.SOURCE), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    e3nn_accel.enable()
    module = used(build("Linear"))
    inputs = tuple(x.detach() for x in inputs_of(module))
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=answer, args=(queue, module, inputs))
    child.start()
    name, heading, out = queue.get()
    child.join(60)
    assert child.exitcode == 0
    same(torch.from_numpy(out), module(*inputs).detach())
    assert name == "Linear"
    expected = (
        ": on; 1 modules seen, 1 called, 1 of 1 calls accelerated" if variable == "1" else ": off"
    )
    assert heading.endswith(expected)
