"""torch.fx, torch.export and functorch meet stock e3nn; torch.compile breaks no graph that stock doesn't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_ran_on_torch, draw
from small_models import (
    BUILD,
    build,
    energy_and_forces,
    inputs_of,
    mace,
    molecules,
    same,
    without_torchscript,
)

import e3nn_accel
from e3nn_accel import compat

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def eager(name: str) -> torch.nn.Module:
    """Without TorchScript inside, which torch.compile can't look into."""
    with without_torchscript():
        return build(name)


def outcome(run: Callable[[], Any]) -> Any:
    """What it returns, or the type of what it raises."""
    try:
        return run()
    except Exception as error:
        return type(error)


def assert_as_stock(run: Callable[[], Any], tolerance: float = 1e-5) -> Any:
    """The same result, or the same error, disabled and enabled; returns stock's."""
    torch.compiler.reset()
    stock = outcome(run)
    torch.compiler.reset()
    with e3nn_accel.enabled():
        ours = outcome(run)
    torch.compiler.reset()
    if isinstance(stock, type) or isinstance(ours, type):
        assert ours is stock
    else:
        same(ours, stock, tolerance)
    return stock


@pytest.mark.parametrize("name", BUILD)
def test_symbolic_tracing(name: str) -> None:
    """torch.fx records the same graph, and the module traced is accelerated as before."""
    module = eager(name)
    inputs = inputs_of(module)
    expected = module(*inputs)
    given = (*inputs, module.weight, module.bias) if name == "Linear" else inputs

    def trace() -> Any:
        traced = torch.fx.symbolic_trace(module)
        same(traced(*given), expected)
        return traced.code

    stock = outcome(trace)
    assert isinstance(stock, str) or name != "Linear"
    e3nn_accel.enable()
    assert outcome(trace) == stock
    same(module(*inputs), expected)


def test_symbolic_tracing_of_a_parent() -> None:
    """Intercepted modules are leaves or not, as the tracer decides, like stock's."""
    net = torch.nn.Sequential(eager("Linear"), torch.nn.Tanh())

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, qualified_name: str) -> bool:
            return isinstance(m, type(net[0]))

    def trace() -> list[str]:
        tracers = (torch.fx.Tracer, Leaves)
        return [str(node) for tracer in tracers for node in tracer().trace(net).nodes]

    stock = trace()
    assert len(stock) > 4
    e3nn_accel.enable()
    assert trace() == stock


def prepared() -> Any:
    """A MACE as mace prepares it for torch.compile."""
    pytest.importorskip("mace")
    from mace.tools.compile import prepare

    try:
        return prepare(mace, allow_autograd=False)().double()
    except torch._dynamo.exc.IncorrectUsage as error:  # torch 2.4
        pytest.skip(f"MACE can't prepare models with this torch: {error}")


def names_of(model: torch.nn.Module) -> list[tuple[str, str]]:
    """Names and class names of its modules."""
    return [(name, type(module).__name__) for name, module in model.named_modules()]


def test_mace_prepare() -> None:
    """mace.tools.compile.prepare makes the same model, with the same numbers on and off."""
    batch = molecules(1)
    stock = prepared()
    expected = energy_and_forces(stock, batch)
    with e3nn_accel.enabled():
        ours = prepared()
        assert names_of(ours) == names_of(stock)
        assert ours.state_dict().keys() == stock.state_dict().keys()
        same(energy_and_forces(ours, batch), expected, 1e-9)
        backends = {row.operation: row.backend for row in e3nn_accel.explain(ours).rows}
        assert backends["linear"] == backends["convolution"] == "torch"
    same(energy_and_forces(ours, batch), expected, 1e-9)


COMPILED = ["Linear", "TensorProduct", "FullyConnectedTensorProduct", "FullTensorProduct"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiling_without_graph_breaks(name: str) -> None:
    """Where stock compiles as one graph, so does the enabled module; else both refuse."""
    module = eager(name)
    inputs = tuple(x.detach() for x in inputs_of(module))
    stock = assert_as_stock(lambda: torch.compile(module, backend="eager", fullgraph=True)(*inputs))
    if not isinstance(stock, type):
        same(stock, module(*inputs))


def test_compiling_scripted_modules() -> None:
    """What stock does with TorchScript inside is torch's affair; a plan is traced without looking into it."""
    module = build("Linear")
    inputs = tuple(x.detach() for x in inputs_of(module))
    compiled = lambda full: torch.compile(module, backend="eager", fullgraph=full)(*inputs)  # noqa: E731
    assert_as_stock(lambda: compiled(False))
    with e3nn_accel.enabled():
        same(compiled(True), module(*inputs))
    torch.compiler.reset()


def test_graph_breaks_are_stocks() -> None:
    """A compiled parent has as many graphs and breaks as with stock e3nn."""
    net = torch.nn.Sequential(eager("Linear"), torch.nn.Tanh(), torch.nn.Linear(17, 3))
    x = inputs_of(net[0])[0].detach()

    def graphs() -> tuple[int, int]:
        torch.compiler.reset()
        explanation = torch._dynamo.explain(net)(x)
        return explanation.graph_count, explanation.graph_break_count

    stock = graphs()
    assert stock == (1, 0)
    e3nn_accel.enable(backend="torch")
    assert graphs() == stock
    net(x)
    traced = int(compat.COMPILER_TRACES_CALLS)
    assert_ran_on_torch(net[0], "linear", traced + 1)  # and called once


def test_a_compiled_block() -> None:
    """An interaction block of MACE: its numbers are stock's, whether or not the compiler sees our calls."""
    block: Any = mace().interactions[1]
    batch = molecules(1)
    nodes, edges = batch["node_attrs"].shape[0], batch["edge_index"].shape[1]
    inputs = (
        batch["node_attrs"], draw((nodes, 16), 0), draw((edges, 9), 1), draw((edges, 4), 2), batch["edge_index"]
    )  # fmt: skip

    def run() -> torch.Tensor:
        torch.compiler.reset()
        return torch.compile(lambda *given: block(*given)[0], backend="eager")(*inputs)

    expected = block(*inputs)[0]
    same(run(), expected, 1e-10)
    with e3nn_accel.enabled():
        same(run(), expected, 1e-10)
        same(block(*inputs)[0], expected, 1e-10)


def test_compiled_before_enabling() -> None:
    """A function compiled before keeps its graph; one compiled while enabled works after."""
    module = eager("Linear")
    x = inputs_of(module)[0].detach()
    expected = module(x)
    torch.compiler.reset()
    early = torch.compile(module, backend="eager")
    same(early(x), expected)
    with e3nn_accel.enabled():
        same(early(x), expected)
        torch.compiler.reset()
        late = torch.compile(module, backend="eager")
        same(late(x), expected)
    same(late(x), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["Linear", "FullyConnectedTensorProduct"])
def test_exporting(name: str) -> None:
    """torch.export of an enabled module gives stock's program, or stock's refusal."""
    module = eager(name)
    inputs = tuple(x.detach() for x in inputs_of(module))

    def run() -> tuple[torch.Tensor, list[str]]:
        program = torch.export.export(module, inputs)
        # before torch 2.5 an input's name tells through which attribute a parameter was found
        named = [n.op if n.op == "placeholder" else str(n.target) for n in program.graph.nodes]
        return program.module()(*inputs), [*named, *sorted(program.state_dict)]

    stock = outcome(run)
    e3nn_accel.enable()
    ours = outcome(run)
    if isinstance(stock, type):
        assert ours is stock
    else:
        same(ours[0], stock[0])
        assert ours[1] == stock[1]


TRANSFORMS: dict[str, Callable[[Callable[..., torch.Tensor], torch.Tensor], Any]] = {
    "vmap": lambda f, x: torch.func.vmap(f)(x.unsqueeze(1)),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).square().sum())(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda y: f(y).square().sum()))(x),
}


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["Linear", "FullyConnectedTensorProduct"])
def test_functorch(name: str, transform: str, scripted: bool) -> None:
    """Transforms of a function that calls the module: stock's result, or stock's error."""
    module = build(name) if scripted else eager(name)
    x, *rest = (t.detach() for t in inputs_of(module))

    def f(first: torch.Tensor) -> torch.Tensor:
        return module(first, *(r[: len(first)] if first.dim() > 1 else r[0] for r in rest))

    stock = assert_as_stock(lambda: TRANSFORMS[transform](f, x))
    if transform in ("grad", "vjp"):
        assert not isinstance(stock, type)
    e3nn_accel.enable()
    f(x)
    assert not e3nn_accel.explain(module).fallbacks


def test_batched_gradients() -> None:
    """`is_grads_batched` batches the backward alone: the plan's backward, or stock's error."""
    module = eager("FullyConnectedTensorProduct")

    def run() -> torch.Tensor:
        inputs = inputs_of(module)
        out = module(*inputs)
        directions = torch.eye(out.numel()).view(-1, *out.shape)
        return torch.autograd.grad(out, inputs[0], directions, is_grads_batched=True)[0]

    stock = run()
    with e3nn_accel.enabled():
        ours = outcome(run)
    assert ours is RuntimeError or torch.allclose(ours, stock, atol=1e-5)


def test_hessians_of_a_mace() -> None:
    """Second derivatives of the energy, as MACE computes them, equal stock's."""
    model, batch = mace(), molecules(1)
    run = lambda: model(dict(batch), compute_hessian=True)["hessian"].detach()  # noqa: E731
    stock = run()
    assert float(stock.abs().max()) > 1e-3
    e3nn_accel.enable()
    same(run(), stock, 1e-8)
    assert not e3nn_accel.explain(model).fallbacks
