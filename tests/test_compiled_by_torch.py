"""torch.compile: a plan is one opaque operation in the graph, with stock's values and derivatives."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from comparison import draw, usage
from e3nn import o3
from graphs import random_edges
from mace_parts import Contraction, one_hot
from small_models import mace, molecules, same
from strategies import Case

import e3nn_accel
from e3nn_accel import compat, interception, switch
from e3nn_accel.hookspecs import Call
from e3nn_accel.ops import derivatives, opaque
from e3nn_accel.plan import Plan, PlanContext

pytestmark = [
    pytest.mark.skipif(
        not compat.COMPILER_TRACES_CALLS,
        reason="torch 2.4 compiles a module's forward, past its call: stock e3nn",
    ),
    pytest.mark.usefixtures("eager_e3nn", "float64"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]

NODES, EDGES = 6, 14
Graphs = list[torch.fx.GraphModule]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def recording(graphs: Graphs) -> Callable[..., Any]:
    """A backend that keeps the graphs it is given and runs them as they are."""

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


def ours(graphs: Graphs) -> list[str]:
    """The plans in the graphs, by name."""
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    return [str(n.args[1]) for n in nodes if str(n.target) == "e3nn_accel.run.default"]


@dataclass(frozen=True)
class Subject:
    """A module, inputs for a number of rows, and what stock e3nn makes of them."""

    build: Callable[[], Any]
    inputs: Callable[[Any, int], tuple[torch.Tensor, ...]]
    operation: str

    def stock(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with interception.suspend():
            if self.operation != "convolution":
                return module(*inputs)
            x, y, weight, edges = inputs
            messages = module(x[edges[0]], y, weight)
            return x.new_zeros(len(x), messages.shape[1]).index_add(0, edges[1], messages)


def leaves(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(draw(shape, 10 + n).requires_grad_() for n, shape in enumerate(shapes))


UVU = Case(
    "TensorProduct",
    (
        "2x0e+2x1o",
        "1x0e+1x1o",
        "2x0e+2x1o+2x0e",
        ((0, 0, 0, "uvu", True, 1.0), (0, 1, 1, "uvu", True, 1.0), (1, 1, 2, "uvu", True, 1.0)),
    ),
    weights="per row",
)
GENERAL = Case("FullyConnectedTensorProduct", ("2x0e+1x1o", "1x0e+1x1o", "2x0e+1x1o"))
SPECIES = Case("FullyConnectedTensorProduct", ("2x0e+1x1o", "3x0e", "2x0e+2x1o"))
CONTRACTION = Contraction("0e+1o", "0e+1o", 2, channels=2, species=3)

SUBJECTS = {
    "linear": Subject(
        lambda: Case("Linear", ("2x0e+2x1o", "3x0e+1x1o")).build(),
        lambda m, n: leaves((n, m.irreps_in.dim)),
        "linear",
    ),
    "biased linear": Subject(
        lambda: Case("Linear", ("2x0e+2x1o", "3x0e+1x1o"), (("biases", True),)).build(),
        lambda m, n: leaves((n, m.irreps_in.dim)),
        "linear",
    ),
    "product": Subject(
        GENERAL.build,
        lambda m, n: leaves((n, m.irreps_in1.dim), (n, m.irreps_in2.dim)),
        "tensor_product",
    ),
    "square": Subject(
        Case("TensorSquare", ("2x0e+1x1o",)).build,
        lambda m, n: leaves((n, m.irreps_in1.dim), (m.weight_numel,))[:1],
        "tensor_product",
    ),
    "species": Subject(
        SPECIES.build,
        lambda m, n: (*leaves((n, m.irreps_in1.dim)), one_hot([k * 2 % 3 for k in range(n)], 3)),
        "tensor_product",
    ),
    "convolution": Subject(
        UVU.build,
        lambda m, n: (
            *leaves((n, m.irreps_in1.dim), (2 * n, m.irreps_in2.dim), (2 * n, m.weight_numel)),
            random_edges(n, 2 * n),
        ),
        "convolution",
    ),
    "contraction": Subject(
        CONTRACTION.build,
        lambda m, n: (
            CONTRACTION.features(n).requires_grad_(),
            one_hot([k * 2 % 3 for k in range(n)], 3),
        ),
        "contraction",
    ),
}


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "contraction":
        pytest.importorskip("mace")
    return SUBJECTS[request.param]


def gradients(out: torch.Tensor, module: Any, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    wanted = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    direction = draw(tuple(out.shape), 99)
    return [out.detach(), *torch.autograd.grad(out, wanted, direction, allow_unused=True)]


def as_zero(found: list[Any], like: list[Any]) -> list[Any]:
    """A gradient that one side doesn't have is zero."""
    pairs = zip(found, like, strict=True)
    return [torch.zeros_like(b) if a is None and b is not None else a for a, b in pairs]


@pytest.mark.parametrize("backend", ["recorded", "aot_eager"])
def test_value_and_gradients(subject: Subject, backend: str) -> None:
    """One graph with one operation of ours; numbers and gradients by inputs and parameters are stock's."""
    module = subject.build()
    inputs = subject.inputs(module, NODES)
    expected = gradients(subject.stock(module, inputs), module, inputs)
    graphs: Graphs = []
    e3nn_accel.enable(strict=True)
    chosen = recording(graphs) if backend == "recorded" else backend
    compiled = torch.compile(module, backend=chosen, fullgraph=True)
    found = gradients(compiled(*inputs), module, inputs)
    same(as_zero(found, expected), as_zero(expected, found), 1e-12)
    assert usage(module) == {(subject.operation, "torch"): 1}
    if graphs:
        assert len(graphs) == len(ours(graphs)) == 1
        calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
        assert len(calls) == 2, "the operation, and its only result"


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_inductor(name: str) -> None:
    """The same through inductor, with operations of torch before and after."""
    subject = SUBJECTS[name]
    module = subject.build()
    x, *others = subject.inputs(module, NODES)
    function = lambda x, *rest: subject_of(x.sin(), *rest).cos()  # noqa: E731
    subject_of = lambda *inputs: subject.stock(module, inputs)  # noqa: E731
    expected = gradients(function(x, *others), module, (x, *others))
    e3nn_accel.enable(strict=True)
    subject_of = module
    found = gradients(torch.compile(function, fullgraph=True)(x, *others), module, (x, *others))
    same(found, expected, 1e-12)


def test_dynamic_sizes(subject: Subject) -> None:
    """One graph serves every number of rows."""
    module, graphs = subject.build(), []
    e3nn_accel.enable(strict=True)
    compiled = torch.compile(module, backend=recording(graphs), fullgraph=True, dynamic=True)
    for rows in (17, 23, 31):  # unlike any other size: torch.compile takes equal sizes for one
        inputs = subject.inputs(module, rows)
        same(compiled(*inputs), subject.stock(module, inputs), 1e-12)
    assert len(graphs) == 1


def test_marked_dynamic() -> None:
    """Nothing of ours specialises a dimension that the user declares dynamic; also in the backward."""
    module = SUBJECTS["linear"].build()
    e3nn_accel.enable(strict=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for rows in (4, 7):
        inputs = SUBJECTS["linear"].inputs(module, rows)
        torch._dynamo.mark_dynamic(inputs[0], 0)
        expected = gradients(SUBJECTS["linear"].stock(module, inputs), module, inputs)
        same(gradients(compiled(*inputs), module, inputs), expected, 1e-12)


def operation_of(subject: Subject) -> tuple[str, tuple[torch.Tensor, ...]]:
    """The name of the plan of a subject, and operands for it."""
    module = subject.build()
    inputs = subject.inputs(module, 3)
    e3nn_accel.enable(strict=True)
    torch.compile(module, backend="eager")(*inputs)
    assert switch.active.dispatcher is not None
    target, _ = switch.active.dispatcher.target_of(module)  # type: ignore[misc]
    call = target.bind(module, *inputs)
    assert isinstance(call, Call)
    [outcome] = switch.active.dispatcher.runners[module].outcomes.values()
    context = PlanContext(torch.float64, torch.device("cpu"), switch.active.config)
    operands = tuple(
        t.detach().clone().requires_grad_(t.requires_grad and t.numel() > 0) for t in call.operands
    )
    return derivatives.name_of(outcome.plan, context), operands


def test_derivatives_of_the_operation(subject: Subject) -> None:
    """Called by itself: first, second and third derivatives by finite differences."""
    name, operands = operation_of(subject)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.ops.e3nn_accel.run.default(list(tensors), name)[0]

    assert torch.autograd.gradcheck(run, operands)
    assert torch.autograd.gradgradcheck(run, operands)


def test_third_derivatives() -> None:
    """Derivatives of every order are the same operation."""
    name, operands = operation_of(SUBJECTS["product"])

    def first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = torch.ops.e3nn_accel.run.default(list(tensors), name)[0]
        return torch.autograd.grad(out.square().sum(), tensors, create_graph=True)

    small = tuple(t.detach()[:1].requires_grad_() if t.dim() > 1 else t for t in operands)
    assert torch.autograd.gradgradcheck(first, small)


@pytest.mark.parametrize("name", ["linear", "species", "convolution"])
def test_opcheck(name: str) -> None:
    """torch's own check of schema, fake kernel and autograd registration, static and dynamic."""
    plan, operands = operation_of(SUBJECTS[name])
    torch.library.opcheck(torch.ops.e3nn_accel.run.default, (list(operands), plan))
    wanted = [t.requires_grad for t in operands]
    above = torch.ops.e3nn_accel.run.default(list(operands), plan)[0].detach()
    gradient = derivatives.gradient_of(plan, wanted)
    torch.library.opcheck(
        torch.ops.e3nn_accel.run.default, ([above.requires_grad_(), *operands], gradient)
    )


def test_gradients_of_a_plans_own() -> None:
    """A plan that offers `gradients` isn't run forward for them, and second derivatives go through them."""
    name, operands = operation_of(SUBJECTS["convolution"])
    plan: Plan = derivatives.function_of(name).plan  # type: ignore[union-attr]
    asked = []

    def own(g: Any, operands: Any, wanted: Any) -> tuple[torch.Tensor, ...]:
        asked.append(wanted)
        with torch.enable_grad():
            free = [t if t.requires_grad else t.detach().requires_grad_() for t in operands[:3]]
            out = plan.run(*free, operands[3])
            found = torch.autograd.grad(out, free, g, create_graph=True)
        return tuple(t for t, w in zip(found, wanted, strict=False) if w)

    context = PlanContext(torch.float64, torch.device("cpu"), switch.active.config)
    special = derivatives.name_of(replace(plan, backend="own", gradients=own), context)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.ops.e3nn_accel.run.default(list(tensors), special)[0]

    assert torch.autograd.gradcheck(run, operands)
    assert torch.autograd.gradgradcheck(run, operands)
    assert (True, True, True, False) in asked


def test_only_wanted_gradients() -> None:
    """Where one input's gradient is asked for, the operation in the backward computes that one alone."""
    module = SUBJECTS["product"].build()
    x, y = SUBJECTS["product"].inputs(module, 3)
    e3nn_accel.enable(strict=True)
    graphs: Graphs = []
    from torch._dynamo.backends.common import aot_autograd

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    out = torch.compile(module, backend=backend, fullgraph=True)(x, y.detach())
    out.sum().backward()
    assert [name[:15] for name in ours(graphs) if name.startswith("gradient")] == [
        "gradient 101 of"
    ]


def test_double_backward_is_torchs() -> None:
    """Through a compiled function torch refuses second derivatives, ours or not."""
    module = SUBJECTS["linear"].build()
    (x,) = SUBJECTS["linear"].inputs(module, 3)
    e3nn_accel.enable(strict=True)
    compiled = torch.compile(lambda x: module(x).square(), backend="aot_eager")
    (g,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_training_step() -> None:
    """A compiled step of an optimiser changes parameters as stock does."""
    net = torch.nn.Sequential(SUBJECTS["linear"].build(), torch.nn.Tanh(), torch.nn.Linear(6, 1))
    stock = copy.deepcopy(net)
    (x,) = SUBJECTS["linear"].inputs(net[0], 5)

    def train(model: Any, call: Any) -> list[torch.Tensor]:
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimiser.zero_grad()
            call(x).square().sum().backward()
            optimiser.step()
        return [p.detach() for p in model.parameters()]

    expected = train(stock, stock)
    with e3nn_accel.enabled(strict=True):
        found = train(net, torch.compile(net, backend="aot_eager", fullgraph=True))
        assert set(usage(net[0])) == {("linear", "torch")}
    same(found, expected, 1e-12)


def test_parameters_that_are_replaced() -> None:
    """New values, new data and new Parameter objects are all seen."""
    module = SUBJECTS["linear"].build()
    inputs = SUBJECTS["linear"].inputs(module, 4)
    e3nn_accel.enable(strict=True)
    compiled = torch.compile(module, backend="aot_eager")
    compiled(*inputs)
    with torch.no_grad():
        module.weight.mul_(2)
    same(compiled(*inputs), SUBJECTS["linear"].stock(module, inputs), 1e-12)
    module.weight.data = module.weight.data + 1
    same(compiled(*inputs), SUBJECTS["linear"].stock(module, inputs), 1e-12)
    module.weight = torch.nn.Parameter(module.weight.detach() * 3)
    same(compiled(*inputs), SUBJECTS["linear"].stock(module, inputs), 1e-12)


def test_modules_are_told_apart() -> None:
    """Compiled code that meets another module of the class meets the other's plan."""
    graphs: Graphs = []
    e3nn_accel.enable(strict=True)
    call = torch.compile(lambda m, x: m(x), backend=recording(graphs))
    a, b = o3.Linear("4x0e", "4x0e"), o3.Linear("4x0e", "2x0e")
    x = draw((3, 4), 1)
    for module in (a, b, a):
        same(call(module, x), SUBJECTS["linear"].stock(module, (x,)), 1e-12)
    assert len(graphs) == len(set(ours(graphs))) == 2


def test_disabling() -> None:
    """Compiled code is stock's from the next call on."""
    module = SUBJECTS["linear"].build()
    inputs = SUBJECTS["linear"].inputs(module, 4)
    graphs: Graphs = []
    function = torch.compile(lambda x: 2 * module(x), backend=recording(graphs))
    with e3nn_accel.enabled(backend="torch"):
        as_module = torch.compile(module, backend=recording(graphs))
        function(*inputs)
        as_module(*inputs)
        function(*inputs)
        assert len(ours(graphs)) == 2
    graphs.clear()
    same(function(*inputs), 2 * module(*inputs), 1e-12)
    same(as_module(*inputs), module(*inputs), 1e-12)
    assert len(graphs) == 2
    assert not ours(graphs)


def test_other_options() -> None:
    """A module that new options leave out is stock in compiled code, too; `accelerate` reaches it again."""
    module = SUBJECTS["linear"].build()
    inputs = SUBJECTS["linear"].inputs(module, 4)
    graphs: Graphs = []
    function = torch.compile(lambda x: 2 * module(x), backend=recording(graphs))
    e3nn_accel.enable(backend="torch")
    function(*inputs)
    assert len(ours(graphs)) == 1
    e3nn_accel.enable(skip=("Linear",), backend="torch")
    function(*inputs)
    assert len(graphs) == 2
    assert len(ours(graphs)) == 1
    e3nn_accel.accelerate(module, backend="torch")
    function(*inputs)
    assert len(ours(graphs)) == 2


def test_a_plan_given_up() -> None:
    """Compiled code doesn't go on with a plan that was found wrong."""
    module = SUBJECTS["species"].build()
    inputs = SUBJECTS["species"].inputs(module, 4)
    graphs: Graphs = []
    e3nn_accel.enable()
    compiled = torch.compile(lambda *operands: 2 * module(*operands), backend=recording(graphs))
    compiled(*inputs)
    dispatcher = switch.active.dispatcher
    assert dispatcher is not None
    [outcome] = dispatcher.plans.outcomes.values()
    dispatcher.plans.give_up(outcome, "for this test", warn=False)
    compiled(*inputs)
    assert len(graphs) == 2
    assert len(ours(graphs)) == 1


@pytest.mark.parametrize(
    ("case", "options", "count"),
    [
        ("linear", {}, 0),
        ("convolution", {}, 0),
        ("product", {}, 0),
        ("species", {}, 1),
        ("linear", {"backend": "torch"}, 1),
        ("convolution", {"strict": True}, 1),
    ],
)
def test_what_the_compiler_does_better(case: str, options: dict[str, Any], count: int) -> None:
    """What has no kernel is left to it, with the reason, unless asked for or less than what stock does."""
    subject = SUBJECTS[case]
    module = subject.build()
    inputs = subject.inputs(module, 4)
    expected = subject.stock(module, inputs)
    graphs: Graphs = []
    e3nn_accel.enable(**options)
    same(torch.compile(module, backend=recording(graphs), fullgraph=True)(*inputs), expected, 1e-12)
    assert len(ours(graphs)) == count
    assert ("the compiler fuses" in str(e3nn_accel.report())) == (count == 0)


class Doubled(o3.Linear):
    """A forward of its own."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(features)


STOCK: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "own forward": (lambda: Doubled("2x0e", "2x0e"), {}, "forward of its own"),
    "left out": (lambda: o3.Linear("2x0e", "2x0e"), {"skip": ("Linear",)}, "E3NN_ACCEL_SKIP"),
    "verified": (lambda: o3.Linear("2x0e", "2x0e"), {"verify": True}, "verify compares"),
    "half precision": (lambda: o3.Linear("2x0e", "2x0e").bfloat16(), {}, "needs float32"),
}


@pytest.mark.parametrize("case", STOCK)
def test_stock_with_a_reason(case: str) -> None:
    """What can't be planned is stock e3nn in the graph, and the report says why."""
    build, options, reason = STOCK[case]
    module = build()
    x = draw((3, 2), 1).to(next(module.parameters()).dtype)
    expected = module(x)
    graphs: Graphs = []
    e3nn_accel.enable(**options)
    same(torch.compile(module, backend=recording(graphs), fullgraph=True)(x), expected)
    assert not ours(graphs)
    assert reason in str(e3nn_accel.report())


def test_hooks() -> None:
    """A module with hooks is stock's, which runs them."""
    module, heard = SUBJECTS["linear"].build(), []
    module.register_forward_hook(lambda *_: heard.append(1))
    e3nn_accel.enable()
    torch.compile(module, backend="eager")(*SUBJECTS["linear"].inputs(module, 4))
    assert heard == [1]
    assert usage(module) == {("linear", "e3nn"): 1}


def test_strict_mode_raises() -> None:
    """Where the plan is refused and nothing may fall back."""
    module = o3.Linear("2x0e", "2x0e").bfloat16()
    e3nn_accel.enable(strict=True)
    with pytest.raises(Exception, match="can't be accelerated"):
        torch.compile(module, backend="eager")(torch.ones(3, 2, dtype=torch.bfloat16))


def test_arguments_that_stock_refuses() -> None:
    """Compiled or not, a wrong shape is an error."""
    module = SUBJECTS["linear"].build()
    e3nn_accel.enable()
    with pytest.raises(Exception):
        torch.compile(module, backend="eager")(torch.ones(3, 1))


def test_unfused_products_in_compiled_code() -> None:
    """Four arguments where the convolution has no plan: gather, product and sum, traced."""
    case = Case("FullyConnectedTensorProduct", ("2x0e", "1x0e", "2x0e"), weights="per row")
    module = case.build()
    x, y, w = leaves((NODES, 2), (EDGES, 1), (EDGES, module.weight_numel))
    edges = random_edges(NODES, EDGES)
    expected = replace(SUBJECTS["convolution"]).stock(module, (x, y, w, edges))
    graphs: Graphs = []
    e3nn_accel.enable()
    same(torch.compile(module, backend=recording(graphs))(x, y, w, edges), expected, 1e-12)
    assert len(graphs) == 1
    assert not ours(graphs)
    assert {backend for _, backend in usage(module)} == {"e3nn"}


def test_pickles_and_copies() -> None:
    """Compiling leaves nothing of ours in a module."""
    module = SUBJECTS["biased linear"].build()
    fields = set(vars(module))
    e3nn_accel.enable(strict=True)
    inputs = SUBJECTS["biased linear"].inputs(module, 4)
    torch.compile(lambda x: module(x), backend="eager")(*inputs)
    assert usage(module) == {("linear", "torch"): 1}
    assert set(vars(module)) == fields
    file = io.BytesIO()
    torch.save(copy.deepcopy(module), file)
    for saved in (file.getvalue(), pickle.dumps(module)):
        assert b"e3nn_accel" not in saved


def test_scripted_parts_are_never_met() -> None:
    """e3nn's TorchScript, which torch.compile can't trace, isn't in the way of a plan."""
    import e3nn

    before = dict(e3nn.get_optimization_defaults())
    e3nn.set_optimization_defaults(jit_script_fx=True)
    try:
        module = SUBJECTS["linear"].build()
    finally:
        e3nn.set_optimization_defaults(**before)
    inputs = SUBJECTS["linear"].inputs(module, 4)
    e3nn_accel.enable(strict=True)
    found = torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs)
    same(found, SUBJECTS["linear"].stock(module, inputs), 1e-12)


def test_names_of_plans_that_are_not_here() -> None:
    """An error that says so."""
    opaque.register()
    with pytest.raises(RuntimeError, match="no plan 'nothing'"):
        torch.ops.e3nn_accel.run.default([torch.ones(1)], "nothing")


def prepared() -> Any:
    """A MACE as mace prepares it for torch.compile, with its autograd.grad in the graph."""
    pytest.importorskip("mace")
    from mace.tools.compile import prepare

    return prepare(mace, allow_autograd=True)()


def training(model: Any, call: Any) -> list[torch.Tensor]:
    """Energy, forces and the gradients of a loss of both by the parameters."""
    batch = dict(molecules(2))
    batch["positions"] = batch["positions"].clone().requires_grad_()
    out = call(batch, training=True)
    model.zero_grad()
    (out["forces"].square().sum() + out["energy"].sum()).backward()
    found = [p.grad for p in model.parameters()]
    zeros = [torch.zeros_like(p) for p in model.parameters()]
    grads = [z if g is None else g for z, g in zip(zeros, found, strict=True)]
    return [out["energy"].detach(), out["forces"].detach(), *grads]


@pytest.mark.mace
@pytest.mark.parametrize(
    "backend",
    ["recorded", pytest.param("aot_eager", marks=pytest.mark.slow),
     pytest.param("inductor", marks=pytest.mark.slow)],
)  # fmt: skip
def test_mace(backend: str) -> None:
    """One graph, with forces computed in it; fused convolutions and everything else of ours is there."""
    model = prepared()
    expected = training(model, model)
    graphs: Graphs = []
    chosen = recording(graphs) if backend == "recorded" else backend
    e3nn_accel.enable(strict=True)
    compiled = torch.compile(model, backend=chosen, fullgraph=True)
    same(training(model, compiled), expected, 1e-9)
    same(training(model, compiled), expected, 1e-9)
    if graphs:
        assert len(graphs) == 1, "traced once for both calls"
        names = ours(graphs)
        assert sum(name.startswith("convolution") for name in names) == 2
        assert sum(name.startswith("linear") for name in names) == 10
        assert sum(name.startswith("uvw") for name in names) == 2
    assert not e3nn_accel.explain(model).fallbacks
