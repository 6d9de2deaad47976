"""TorchScript sees stock e3nn: the same code, the same files, while enabled and after."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh_python
import pytest
import torch
from comparison import usage
from e3nn.util import jit
from small_models import BUILD, build, energy_and_forces, inputs_of, mace, molecules, same

import e3nn_accel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def code_of(scripted: Any) -> list[str]:
    """The code of a scripted module and of every part of it."""
    parts = scripted.named_modules() if isinstance(scripted, torch.nn.Module) else []
    return [f"{name}: {getattr(part, 'code', None)}" for name, part in parts]


def graph_of(traced: Any) -> str:
    """Its graph, without the numbers that TorchScript gives to classes of the same name."""
    return re.sub(r"___torch_mangle_\d+\.", "", str(traced.graph))


def loaded(scripted: Any) -> Any:
    """The same through a file."""
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    assert b"e3nn_accel" not in file.getvalue()
    file.seek(0)
    return torch.jit.load(file)


SCRIPTABLE = [name for name in BUILD if name != "TensorSquare"]


@pytest.mark.parametrize("name", SCRIPTABLE)
@pytest.mark.parametrize("compiler", [torch.jit.script, jit.script], ids=["torch", "e3nn"])
def test_scripting_a_module(name: str, compiler: Callable[..., Any]) -> None:
    """The same code and numbers, scripted before enabling, while enabled, and after."""
    module = build(name)
    inputs = inputs_of(module)
    expected = module(*inputs)
    before = compiler(build(name))
    with e3nn_accel.enabled():
        fresh, used = compiler(build(name)), build(name)
        used(*inputs)
        whole = [fresh, compiler(used), loaded(fresh)]
        for scripted in whole:
            same(scripted(*inputs), expected)
    whole.append(compiler(used))
    assert code_of(before) == code_of(whole[0]) == code_of(whole[1]) == code_of(whole[3])
    for scripted in whole:
        same(scripted(*inputs), expected)


def test_scripting_what_stock_cannot() -> None:
    """TensorSquare calls super(), which TorchScript refuses: the same error while enabled."""

    def error() -> str:
        with pytest.raises(RuntimeError) as raised:
            torch.jit.script(build("TensorSquare"))
        return str(raised.value)

    stock = error()
    assert "super" in stock
    e3nn_accel.enable()
    assert error() == stock


def test_the_code_compared_is_there() -> None:
    """The comparison above sees forward's code, so that it could differ."""
    first, second = (
        code_of(torch.jit.script(build(name))) for name in ("Linear", "FullTensorProduct")
    )
    assert any("def forward" in line for line in first)
    assert first != second


@pytest.mark.parametrize("name", BUILD)
def test_tracing_a_module(name: str) -> None:
    """torch.jit.trace records stock e3nn: same graph, same numbers at another batch size."""
    module = build(name)
    inputs = tuple(x.detach() for x in inputs_of(module))
    other = tuple(x.detach() for x in inputs_of(module, rows=7, seed=4))
    before = torch.jit.trace(module, inputs, check_trace=False)
    e3nn_accel.enable()
    while_on = torch.jit.trace(module, inputs, check_trace=False)
    assert graph_of(while_on) == graph_of(before)
    assert code_of(while_on) == code_of(before)
    same(while_on(*other), module(*other))
    assert usage(module)[("linear" if name == "Linear" else "tensor_product", "torch")] == 1


def test_a_model_of_modules() -> None:
    """A module of one's own that calls intercepted ones, scripted while enabled."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = build("Linear")
            self.second = build("Linear")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x).sum() + self.second(x).sum()

    net = Net()
    x = inputs_of(net.first)[0]
    stock = net(x)
    e3nn_accel.enable()
    net(x)
    scripted = torch.jit.script(net)
    same(scripted(x), stock)
    e3nn_accel.disable()
    same(scripted(x), stock)
    same(torch.jit.script(net)(x), stock)


def for_lammps(model: Any) -> Any:
    """As mace_create_lammps_model does it."""
    from mace.calculators import LAMMPS_MACE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jit.compile(LAMMPS_MACE(model))


def lammps_outputs(scripted: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Energies and forces of the wrapper."""
    local = torch.ones(len(batch["positions"]), dtype=torch.float64)
    tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    out = scripted(tensors, local, False)
    return [out["node_energy"].detach(), out["forces"].detach()]


@pytest.mark.slow
def test_a_mace_for_lammps(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Exported while enabled: the code, numbers and file of stock; the file loads without us."""
    model, batch = mace(), molecules(1)
    stock_energy, stock_forces = energy_and_forces(model, batch)
    before = for_lammps(mace())
    expected = lammps_outputs(before, batch)
    same(expected[1], stock_forces, 1e-9)
    with e3nn_accel.enabled():
        energy_and_forces(model, batch)
        exported = for_lammps(model)
        assert code_of(exported) == code_of(before)
        same(lammps_outputs(exported, batch), expected, 1e-12)
        torch.jit.save(exported, tmp_path / "model-lammps.pt")
        torch.save((batch, expected), tmp_path / "expected.pt")
        same(energy_and_forces(model, batch), [stock_energy, stock_forces], 1e-9)
    block = next(m for n, m in exported.named_modules() if n.endswith("interactions.0"))
    assert block._c.hasattr("avg_num_neighbors")
    assert not block._c.hasattr("conv_fusion")
    same(lammps_outputs(for_lammps(model), batch), expected, 1e-12)
    plain = fresh_python.make(
        tmp_path_factory.mktemp("plain"), start_files=False, see_project=False
    )
    plain.run("-c", LOAD_FOR_LAMMPS, tmp_path)


LOAD_FOR_LAMMPS = """
import importlib.util, sys, torch
assert importlib.util.find_spec("e3nn_accel") is None
model = torch.jit.load(sys.argv[1] + "/model-lammps.pt")
batch, (energy, forces) = torch.load(sys.argv[1] + "/expected.pt", weights_only=False)
local = torch.ones(len(batch["positions"]), dtype=torch.float64)
out = model({k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}, local, False)
torch.testing.assert_close(out["node_energy"], energy, rtol=1e-10, atol=1e-10)
torch.testing.assert_close(out["forces"], forces, rtol=1e-10, atol=1e-10)
"""


def test_a_mace_compiled_by_e3nn() -> None:
    """e3nn.util.jit.compile of a whole model, as mace's training saves it."""
    batch = {k: v for k, v in molecules(1).items() if isinstance(v, torch.Tensor)}
    model = mace()
    expected = model(dict(batch))
    with e3nn_accel.enabled():
        model(dict(batch))
        compiled = jit.compile(model)
        found = compiled(dict(batch))
    for key in ("energy", "forces"):
        same(found[key], expected[key], 1e-9)
        same(compiled(dict(batch))[key], expected[key], 1e-9)


def test_fusion_is_there_only_while_active() -> None:
    """`hasattr(block, "conv_fusion")` is True while enabled for the model, and never else."""
    model, other = mace(), mace()
    blocks = [*model.interactions, *other.interactions]
    has = lambda: [hasattr(block, "conv_fusion") for block in blocks]  # noqa: E731
    assert has() == [False] * 4
    e3nn_accel.enable()
    assert has() == [True] * 4
    assert all("conv_fusion" not in vars(block) for block in blocks)
    with e3nn_accel.interception.suspend():
        assert has() == [False] * 4
    e3nn_accel.disable()
    assert has() == [False] * 4
    e3nn_accel.accelerate(model)
    assert has() == [True, True, False, False]
    e3nn_accel.enable(skip=("TensorProduct",))
    assert has() == [True, True, False, False]


def test_a_blocks_own_value_wins() -> None:
    """A model converted for another accelerator holds it itself: read, set, deleted as ever."""
    block: Any = mace().interactions[0]
    e3nn_accel.enable()
    block.conv_fusion = "theirs"
    assert block.conv_fusion == vars(block)["conv_fusion"] == "theirs"
    e3nn_accel.disable()
    assert block.conv_fusion == "theirs"
    e3nn_accel.enable()
    del block.conv_fusion
    assert block.conv_fusion is True
    with pytest.raises(AttributeError, match="conv_fusion"):
        del block.conv_fusion
    e3nn_accel.disable()
    with pytest.raises(AttributeError, match="conv_fusion"):
        block.conv_fusion


def test_products_that_cannot_be_fused_are_not() -> None:
    """A block whose product isn't a plain uvu TensorProduct gets no fusion."""
    from torch.nn import Identity

    block: Any = mace().interactions[0]
    e3nn_accel.enable()
    conv_tp = block.conv_tp
    for product in (build("FullyConnectedTensorProduct"), Identity()):
        block.conv_tp = product
        assert not hasattr(block, "conv_fusion")
    block.conv_tp = conv_tp
    assert hasattr(block, "conv_fusion")
    conv_tp.register_forward_hook(lambda *a: None)
    assert not hasattr(block, "conv_fusion")


INTERACTIONS = [
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
    "RealAgnosticAttResidualInteractionBlock",
    "RealAgnosticResidualNonLinearInteractionBlock",
]


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_fused_or_not_the_numbers_are_stocks(interaction: str) -> None:
    """Every kind of block: energies and forces with fusion, without, and of stock agree."""
    model, batch = mace(interaction), molecules()
    stock = energy_and_forces(model, batch)
    e3nn_accel.enable(strict=True)
    same(energy_and_forces(model, batch), stock, 1e-9)
    rows = {row.path: row for row in e3nn_accel.explain(model).rows}
    assert rows["interactions.1.conv_tp"].operation == "convolution"
    e3nn_accel.enable(skip=("TensorProduct",))
    assert not hasattr(model.interactions[1], "conv_fusion")
    same(energy_and_forces(model, batch), stock, 1e-9)
    rows = {row.path: row for row in e3nn_accel.explain(model).rows}
    assert rows["interactions.1.conv_tp"].backend == "e3nn"


def test_a_convolution_on_any_product() -> None:
    """Four arguments on any product, fused or taken apart, equal gather, product and sum."""
    module: Any = build("TensorProduct")
    x, y, weight = inputs_of(module)
    edges = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 1, 0, 2]])
    messages = module(x[edges[0]], y, weight)
    expected = messages.new_zeros(5, messages.shape[1]).index_add(0, edges[1], messages)
    e3nn_accel.enable()
    same(module(x, y, weight, edges), expected)
    assert usage(module) == {("convolution", "torch"): 1}
    module.register_forward_hook(lambda *a: None)
    same(module(x, y, weight, edges), expected)
    same(module(x, y, weight=weight, edge_index=edges), expected)
    same(module(x=x, y=y, weight=weight, edge_index=edges), expected)
    e3nn_accel.disable()
    with pytest.raises(TypeError):
        module(x, y, weight, edges)
