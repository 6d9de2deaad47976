"""Targets that are a GPU's alone, as modules: what other code sees of them, wherever plans run.

The kernels run on the CPU here; that stock has the calls there otherwise, the last tests say.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comparison import accelerated, draw, usage
from e3nn import o3
from radial_embedding_parity import block, lengths
from reshape_parity import built as reshape
from small_models import energy_and_forces, mace, molecules, same

import e3nn_accel
from e3nn_accel import switch
from e3nn_accel.hookspecs import Call
from e3nn_accel.ops import derivatives
from e3nn_accel.plan import PlanContext

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
on_host = pytest.mark.usefixtures("kernels_on_host")


@dataclass(frozen=True)
class Subject:
    """A module, the differentiable input for a number of rows, and how it is called with it."""

    operation: str
    build: Callable[[], Any]
    draw: Callable[[int], torch.Tensor]
    further: tuple[None, ...] = ()

    def arguments(self, rows: int = 5) -> tuple[Any, ...]:
        return self.draw(rows), *self.further


SUBJECTS = {
    "harmonics": Subject(
        "spherical_harmonics",
        lambda: o3.SphericalHarmonics([1, 0, 2], True, "component"),
        lambda rows: draw((rows, 3), 1).requires_grad_(),
    ),
    "radial": Subject("radial_embedding", block, lengths, (None, None, None)),
    "reshape": Subject(
        "reshape_irreps",
        lambda: reshape("in another order"),
        lambda nodes: draw((nodes, 84), 1).requires_grad_(),
    ),
}


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param != "harmonics":
        pytest.importorskip("mace", reason="MACE isn't installed")
    return SUBJECTS[request.param]


def tensor(out: Any) -> torch.Tensor:
    """The result, without what MACE returns beside it."""
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


def value_and_gradient(call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    out = tensor(call(*arguments))
    return [out.detach(), *torch.autograd.grad(out.square().sum(), arguments[0])]


def saved(module: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return buffer.getvalue()


@on_host
def test_nothing_sticks_to_a_module(subject: Subject) -> None:
    """State, attributes, classes and pickles of one in use are stock's; what it returns has stock's types."""
    stock, module, arguments = subject.build(), subject.build(), subject.arguments()
    expected, cls = stock(*arguments), type(stock)
    before = {name: cls.__dict__.get(name) for name in ("__init__", "__setstate__", "__call__")}
    with accelerated():
        out = module(*arguments)
        assert usage(module) == {(subject.operation, "cuda"): 1}
        assert type(module) is cls
        assert type(out) is type(expected)
        if isinstance(out, tuple):
            assert [t is None for t in out] == [t is None for t in expected]
        assert vars(module).keys() == vars(stock).keys()
        assert module.state_dict().keys() == stock.state_dict().keys()
        assert b"e3nn_accel" not in pickle.dumps(module)
        assert b"e3nn_accel" not in saved(module)
    assert {name: cls.__dict__.get(name) for name in before} == before
    assert torch.equal(tensor(module(*arguments)), tensor(expected))


@on_host
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_accelerated(subject: Subject, way: Callable[[Any], Any]) -> None:
    module, arguments = subject.build(), subject.arguments()
    expected, early = value_and_gradient(module, arguments), way(module)
    with accelerated():
        for twin in (early, way(module)):
            same(value_and_gradient(twin, arguments), expected, 1e-11)
            assert usage(twin) == {(subject.operation, "cuda"): 1}


@on_host
def test_torchscript_sees_stock(subject: Subject) -> None:
    """Scripted while enabled: the same program, which runs without us."""
    from e3nn.util import jit

    module, arguments = subject.build(), subject.arguments()
    if subject.operation == "radial_embedding":
        ends, numbers = torch.zeros(2, 5, dtype=torch.long), torch.ones(1)
        arguments = (arguments[0], torch.ones(5, 1), ends, numbers)
    expected = tensor(module(*arguments))
    before = str(jit.script(copy.deepcopy(module)).code)
    with accelerated():
        module(*arguments)
        scripted = jit.script(copy.deepcopy(module))
        assert str(scripted.code) == before
        assert torch.equal(tensor(scripted(*arguments)), expected)


@on_host
def test_traced_by_torch_jit(subject: Subject) -> None:
    module, arguments = subject.build(), subject.arguments()

    def function(x: torch.Tensor) -> torch.Tensor:
        return tensor(module(x, *subject.further))

    with e3nn_accel.enabled():
        traced = torch.jit.trace(function, arguments[0].detach(), check_trace=False)
        assert "e3nn_accel" not in str(traced.graph)
    torch.testing.assert_close(traced(arguments[0]), function(arguments[0]))


@on_host
def test_own_behaviour_is_respected(subject: Subject) -> None:
    """A forward of its own, of the class or of the instance, and hooks."""
    cls = type(subject.build())

    class Negated(cls):  # type: ignore[misc,valid-type]
        def forward(self, *arguments: Any) -> torch.Tensor:
            return -tensor(super().forward(*arguments))

    arguments, plain = subject.arguments(), subject.build()
    expected = -tensor(plain(*arguments)).detach()
    child, own, hooked = subject.build(), subject.build(), subject.build()
    child.__class__ = Negated
    own.forward = lambda *given: -tensor(cls.forward(own, *given))
    hooked.register_forward_hook(lambda module, given, out: -tensor(out))
    with e3nn_accel.enabled():
        for module in (child, own, hooked):
            assert torch.equal(module(*arguments), expected)
            assert [backend for _, backend in usage(module)] == ["e3nn"]


@on_host
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_by_torch(subject: Subject, backend: str) -> None:
    """One graph, any number of rows, stock's values and gradients."""
    torch.compiler.reset()
    module = subject.build()
    graphs: list[int] = []

    def counting(graph: Any, example: Any) -> Any:
        targets = [str(node.target) for node in graph.graph.nodes]
        graphs.append(targets.count("e3nn_accel.run.default"))
        return torch._dynamo.lookup_backend(backend)(graph, example)

    stock = subject.build()
    with accelerated():
        compiled = torch.compile(module, backend=counting, fullgraph=True, dynamic=True)
        after_each: list[int] = []
        for rows in (17, 23):
            arguments = subject.arguments(rows)
            found = value_and_gradient(compiled, arguments)
            with e3nn_accel.interception.suspend():
                expected = value_and_gradient(stock, arguments)
            same(found, expected, 1e-11)
            after_each.append(len(graphs))
    assert set(graphs) == {1}
    assert after_each[0] == after_each[1], "compiled again for another number of rows"


@on_host
def test_derivatives_of_the_compiled_operation(subject: Subject) -> None:
    """First, second and third, by finite differences."""
    torch.compiler.reset()
    module, x = subject.build(), subject.draw(2)
    with accelerated():
        torch.compile(module, backend="eager")(x, *subject.further)
        assert switch.active.dispatcher is not None
        target, _ = switch.active.dispatcher.target_of(module)  # type: ignore[misc]
        call = target.bind(module, x, *subject.further)
        assert isinstance(call, Call)
        [outcome] = switch.active.dispatcher.runners[module].outcomes.values()
        context = PlanContext(torch.float64, torch.device("cpu"), switch.active.config)
        name = derivatives.name_of(outcome.plan, context)

        def run(x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = torch.ops.e3nn_accel.run.default([x, *call.operands[1:]], name)[0]
            return found

        def gradient(x: torch.Tensor) -> torch.Tensor:
            (found,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
            return found

        if subject.operation == "radial_embedding":  # away from the cutoff, where it isn't smooth
            x = torch.tensor([[1.0], [3.0]]).requires_grad_()
        assert torch.autograd.gradcheck(run, x)
        assert torch.autograd.gradgradcheck(run, x)
        assert torch.autograd.gradgradcheck(gradient, x)


@on_host
def test_a_whole_model() -> None:
    """Energies, forces, and gradients of a loss of forces by every parameter."""
    model, batch = mace(), molecules()

    def trained(of: Any) -> list[torch.Tensor]:
        out = of(dict(batch), training=True)
        loss = out["energy"].square().sum() + out["forces"].square().sum()
        parameters = [p for p in of.parameters() if p.requires_grad]
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    stock, gradients = energy_and_forces(model, batch), trained(model)
    only = ("SphericalHarmonics", "RadialEmbeddingBlock", "reshape_irreps")
    with e3nn_accel.enabled(only=only):
        found = energy_and_forces(model, batch)
        same(found, stock, 1e-10)
        for ours, wanted in zip(trained(model), gradients, strict=True):
            same(ours, wanted, 1e-9)
        rows = {row.cls: row.backend for row in e3nn_accel.report().rows if row.backend == "cuda"}
    assert rows == dict.fromkeys(only, "cuda")


@pytest.mark.parametrize("options", [{}, {"strict": True}, {"verify": True}], ids=str)
def test_stock_on_the_cpu_by_choice(subject: Subject, options: dict[str, bool]) -> None:
    """To the bit, and no fallback."""
    module, arguments = subject.build(), subject.arguments()
    expected = tensor(module(*arguments))
    with e3nn_accel.enabled(**options):
        assert torch.equal(tensor(module(*arguments)), expected)
        assert not e3nn_accel.report().rows
        [line] = e3nn_accel.explain(module).by_choice
    assert type(module).__name__ in line


def test_a_model_on_the_cpu_has_no_rows_of_them() -> None:
    model, batch = mace(), molecules()
    with e3nn_accel.enabled(strict=True):
        energy_and_forces(model, batch)
        classes = {row.cls for row in e3nn_accel.report().rows}
    assert not classes & {"SphericalHarmonics", "RadialEmbeddingBlock", "reshape_irreps"}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()
