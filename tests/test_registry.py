"""Plugins: built-ins and third parties side by side; a broken one is reported and harms nobody."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import build, inputs_of, same

import e3nn_accel
from e3nn_accel import builtins, hookimpl, hookspecs, registry, switch
from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config
from e3nn_accel.descriptor import (
    Descriptor,
    LinearDescriptor,
    LinearPath,
)
from e3nn_accel.hookspecs import Call, Event, HealthCheck, KernelSource, Target
from e3nn_accel.irreps import MulIr
from e3nn_accel.plan import Availability, Backend, Plan, PlanContext, Refusal
from e3nn_accel.registry import Registry, load

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a plugin: a module, and a distribution that names it in the entry-point group."""
    made: list[str] = []

    def install(body: str, entry: str | None = None) -> str:
        name = f"third_party_{len(made)}"
        made.append(name)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(body))
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[e3nn_accel]\n{name} = {entry or name}\n")
        return name

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    for name in made:
        sys.modules.pop(name, None)


def current() -> Registry:
    """The registry in use."""
    assert switch.active.dispatcher is not None
    return switch.active.dispatcher.registry


SOUND = """
    from e3nn_accel import hookimpl

    heard = []

    @hookimpl
    def e3nn_accel_event(event):
        heard.append((event.kind, event.detail))
"""


def test_built_ins_are_listed() -> None:
    """They register through the manager that third parties use, and nothing goes wrong."""
    found = load(Config())
    assert set(builtins.PLUGINS) <= set(found.plugins())
    assert found.problems == {}
    paths = {target.path for target in found.targets()}
    assert {"e3nn.o3:Linear", "e3nn.o3:TensorProduct"} <= paths
    assert "torch" in [b.name for b, a in found.backends() if a.ok]
    assert found.health_checks()


@pytest.mark.parametrize("entry", ["{}", "{}:plugin"])
def test_a_third_party_is_loaded(install: Install, entry: str) -> None:
    """By its entry point, be it a module or an object; it hears what goes on."""
    body = (
        textwrap.dedent(SOUND)
        + "\nclass Plugin:\n    e3nn_accel_event = staticmethod(e3nn_accel_event)\n"
        + "\nplugin = Plugin()\n"
    )
    name = install(body, entry.format("third_party_0"))
    e3nn_accel.enable()
    assert name in current().plugins()
    assert current().problems == {}
    module = build("Linear")
    module(*inputs_of(module))
    assert [kind for kind, _ in sys.modules[name].heard] == ["planned"]


@pytest.mark.parametrize("by_variable", [True, False])
def test_blocking(install: Install, by_variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`E3NN_ACCEL_PLUGINS=-name` and `blocked_plugins` keep it from being imported at all."""
    name, other = install(SOUND), install(SOUND)
    if by_variable:
        monkeypatch.setenv("E3NN_ACCEL_PLUGINS", f"-{name}")
    e3nn_accel.enable(**({} if by_variable else {"blocked_plugins": (name,)}))
    assert name not in current().plugins()
    assert other in current().plugins()
    assert name not in sys.modules
    assert current().problems == {}


def test_blocking_a_built_in() -> None:
    """The built-ins can be blocked in the same way."""
    found = load(Config(blocked_plugins=("torch", "linear")))
    assert not {"torch", "linear"} & set(found.plugins())
    assert "torch" not in {b.name for b, _ in found.backends()}
    assert "e3nn.o3:Linear" not in {target.path for target in found.targets()}


EVERY_HOOK = """
    from e3nn_accel import hookimpl

    @hookimpl
    def e3nn_accel_targets():
        raise ValueError("targets")

    @hookimpl
    def e3nn_accel_describe(module, operation):
        raise ValueError("describe")

    @hookimpl
    def e3nn_accel_backends():
        raise ValueError("backends")

    @hookimpl
    def e3nn_accel_kernel_source(program):
        raise ValueError("kernel_source")

    @hookimpl
    def e3nn_accel_event(event):
        raise ValueError("event")

    @hookimpl
    def e3nn_accel_health_checks():
        raise ValueError("health")
"""
GENERATOR = """
    from e3nn_accel import hookimpl

    @hookimpl
    def e3nn_accel_backends():
        yield from ()
        raise ValueError("after the first")
"""
BROKEN = {
    "on import": ("raise RuntimeError('broken module')", "RuntimeError: broken module"),
    "imports what is absent": ("import not_installed_at_all", "ModuleNotFoundError"),
    "misspelt hook": (
        "from e3nn_accel import hookimpl\n@hookimpl\ndef e3nn_accel_backend(): return []",
        "e3nn_accel_backend",
    ),
    "wrong argument": (
        "from e3nn_accel import hookimpl\n@hookimpl\ndef e3nn_accel_event(evnet): pass",
        "evnet",
    ),
    "every hook raises": (EVERY_HOOK, "ValueError: "),
    "while yielding": (GENERATOR, "ValueError: after the first"),
    "nonsense answers": (
        """
        from e3nn_accel import hookimpl

        class Backend:
            name, priority = "nonsense", 99
            def available(self):
                return True
            def plan(self, descriptor, context):
                return None

        class Absurd(Backend):
            def available(self):
                from e3nn_accel.plan import Availability
                return Availability(True)

        @hookimpl
        def e3nn_accel_describe(module, operation):
            return {"not": "hashable"}

        @hookimpl
        def e3nn_accel_health_checks():
            return [3]

        @hookimpl
        def e3nn_accel_targets():
            return ["e3nn.o3:Linear", None]

        @hookimpl
        def e3nn_accel_backends():
            return [object(), Backend(), Absurd()]
        """,
        "unusable answer",
    ),
    "a hook wrapper": (
        """
        from e3nn_accel import hookimpl

        @hookimpl(wrapper=True)
        def e3nn_accel_describe(module, operation):
            return (yield)
        """,
        "hook wrappers are not called",
    ),
    "a malformed path": (
        """
        from e3nn_accel import hookimpl
        from e3nn_accel.hookspecs import Target

        @hookimpl
        def e3nn_accel_targets():
            return [Target("e3nn.o3.Linear", lambda *a: "no", "linear")]
        """,
        "unusable answer Target(path='e3nn.o3.Linear'",
    ),
    "a class that is gone": (
        """
        from e3nn_accel import hookimpl
        from e3nn_accel.hookspecs import Target

        @hookimpl
        def e3nn_accel_targets():
            return [Target("e3nn.o3:Gone", lambda *a: "no", "linear")]
        """,
        "no such class",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_never_fatal(install: Install, fault: str) -> None:
    """The others work, calls are accelerated, and `problems` has its name and what went wrong."""
    body, problem = BROKEN[fault]
    name, sound = install(body), install(SOUND)
    e3nn_accel.enable()
    module = build("Linear")
    inputs = inputs_of(module)
    with e3nn_accel.interception.suspend():
        expected = module(*inputs)
    same(module(*inputs), expected)
    product = build("FullyConnectedTensorProduct")
    product(*inputs_of(product))
    assert all(row.backend == "torch" for row in e3nn_accel.report().rows), e3nn_accel.report()
    assert sound in current().plugins()
    current().health_checks()
    problems = " ".join(f"{key}: {text}" for key, text in current().problems.items())
    assert problem in problems
    assert name in problems or fault == "a class that is gone"
    assert current().problems


def test_a_plugin_that_cannot_be_registered_is_out(install: Install) -> None:
    """One with a misspelt hook is not half in: none of its other hooks runs."""
    body = textwrap.dedent(SOUND) + "\n@hookimpl\ndef e3nn_accel_evnet(event): pass\n"
    name = install(body)
    e3nn_accel.enable()
    module = build("Linear")
    module(*inputs_of(module))
    assert name not in current().plugins()
    assert sys.modules[name].heard == []


def test_plugins_come_before_built_ins(install: Install) -> None:
    """A third party may describe an intercepted module, or replace its target."""
    install("""
        from e3nn_accel import hookimpl
        from e3nn_accel.hookspecs import Target

        @hookimpl
        def e3nn_accel_targets():
            yield Target("e3nn.o3:Linear", lambda module, *a: "mine says no", "linear")
    """)
    e3nn_accel.enable()
    module = build("Linear")
    module(*inputs_of(module))
    [row] = e3nn_accel.report().rows
    assert (row.backend, row.detail) == ("e3nn", "mine says no")


@dataclass
class StubBackend:
    """A backend that answers as it is told, and remembers being asked."""

    name: str
    priority: int
    answer: str = "refuse"
    asked: list[str] = field(default_factory=list)

    def available(self) -> Availability:
        """Once; "absent" says no, "broken" raises."""
        self.asked.append("available")
        if self.answer == "broken":
            raise OSError("no driver")
        return Availability(self.answer != "absent", "not on this machine")

    def plan(self, descriptor: Descriptor, context: PlanContext) -> Plan | Refusal:
        """A plan that gives zeros, a refusal, or an error."""
        self.asked.append("plan")
        if self.answer == "raise":
            raise KeyError("planning")
        if self.answer == "plan":
            return Plan(self.name, descriptor, "zeros", lambda x, *rest: torch.zeros(1))
        return Refusal(self.name, "not today")


def registry_with(*backends: Backend) -> Registry:
    """The torch backend, and a plugin that offers these."""

    class Offers:
        @hookimpl
        def e3nn_accel_backends(self) -> Iterable[Backend]:
            return backends

    found = load(Config(blocked_plugins=("cuda",)))
    found.manager.register(Offers(), name="offers")
    return found


def linear(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Descriptor, PlanContext]:
    """Something to plan."""
    described = load(Config()).describe(build("Linear"), "linear")
    assert isinstance(described, LinearDescriptor)
    return described, PlanContext(dtype, torch.device("cpu"), Config(**options))


def test_priorities_and_refusals() -> None:
    """Backends are asked by falling priority until one plans; every refusal is kept, in order."""
    backends = [
        StubBackend("last", -5, "plan"),
        StubBackend("second", 20),
        StubBackend("first", 30, "raise"),
        StubBackend("absent", 25, "absent"),
        StubBackend("broken", 15, "broken"),
    ]
    found = registry_with(*backends)
    assert [b.name for b, _ in found.backends()] == [
        "first",
        "absent",
        "second",
        "broken",
        "torch",
        "last",
    ]
    plan, refusals = found.plan(*linear())
    assert plan is not None
    assert plan.backend == "torch"
    assert list(map(str, refusals)) == [
        "first: KeyError: 'planning'",
        "absent: not on this machine",
        "second: not today",
        "broken: OSError: no driver",
    ]
    assert backends[0].asked == ["available"]
    found.plan(*linear())
    assert backends[1].asked == ["available", "plan", "plan"]


def test_a_higher_priority_wins() -> None:
    """Over the built-in one, without it being asked."""
    found = registry_with(StubBackend("mine", 1, "plan"))
    plan, refusals = found.plan(*linear())
    assert plan is not None
    assert (plan.backend, refusals) == ("mine", [])


def test_a_named_backend_is_the_only_one_asked() -> None:
    """Whatever the priorities; if it refuses, there is no plan, and its reason alone is kept."""
    mine = StubBackend("mine", 1)
    plan, refusals = registry_with(mine).plan(*linear(backend="mine"))
    assert (plan, refusals) == (None, [Refusal("mine", "not today")])
    plan, _ = registry_with(mine).plan(*linear(backend="torch"))
    assert plan is not None
    assert plan.backend == "torch"
    plan, [refusal] = registry_with(mine).plan(*linear(backend="cuda"))
    assert plan is None
    assert refusal.reason == "there is no such backend (there are: mine, torch)"


def test_events_in_order(install: Install) -> None:
    """What is planned, given up and refused is told as it happens, once for equal modules."""
    name = install("""
        import torch
        from e3nn_accel import hookimpl
        from e3nn_accel.plan import Availability, Plan

        heard = []

        @hookimpl
        def e3nn_accel_event(event):
            heard.append((event.kind, event.subject.split()[0], event.detail.split(":")[0]))

        class Wrong:
            name, priority = "wrong", 9
            def available(self):
                return Availability(True)
            def plan(self, descriptor, context):
                if not str(descriptor).startswith("linear"):
                    raise ValueError
                return Plan("wrong", descriptor, "doubles", lambda x, w, b: torch.zeros(len(x), 17))

        @hookimpl
        def e3nn_accel_backends():
            return [Wrong()]
    """)
    e3nn_accel.enable(blocked_plugins=("cuda",))
    product = build("FullTensorProduct")
    product(*inputs_of(product))
    twin = build("FullTensorProduct")
    twin(*inputs_of(twin))
    module = build("Linear")
    with pytest.warns(e3nn_accel.FallbackWarning, match="self-check: value differs"):
        module(*inputs_of(module))
    half = build("FullyConnectedTensorProduct").to(torch.bfloat16)
    half(*(x.to(torch.bfloat16) for x in inputs_of(half)))
    assert sys.modules[name].heard == [
        ("planned", "uvuv", "torch"),
        ("planned", "linear", "wrong"),
        ("self-check failed", "linear", "value differs by 1.00e+00 of its norm (tolerance 1e-04)"),
        ("planned", "linear", "torch"),
        ("refused", "uvw", "wrong"),
    ]


class ScaledSum(torch.nn.Module):
    """Some other package's layer of scalars: ``2 x @ weight``, an o3.Linear in disguise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(12.0))
        self.bias = torch.empty(0)
        self.weight_numel = 12
        self.internal_weights = True
        self.irreps_in = SimpleNamespace(dim=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x @ self.weight.view(3, 4)


class ScaledSumPlugin:
    """What its authors would write for it."""

    @hookimpl
    def e3nn_accel_targets(self) -> Iterable[Target]:
        """One class, one operation."""

        def bind(module: ScaledSum, x: torch.Tensor) -> Call | str:
            return Call("linear", (x, module.weight, module.bias)) if x.dim() == 2 else "one row"

        yield Target(f"{__name__}:ScaledSum", bind, "linear", "pytest", ">=8")

    @hookimpl
    def e3nn_accel_describe(self, module: torch.nn.Module, operation: str) -> Descriptor | None:
        """As a Linear with one path."""
        if not isinstance(module, ScaledSum):
            return None
        one_in, one_out = (MulIr(3, 0, 1),), (MulIr(4, 0, 1),)
        path = LinearPath(0, 0, (3, 4), 2.0)
        return LinearDescriptor(one_in, one_out, (path,), None, None, True, True)


def test_a_third_partys_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new target with its own description runs through the torch backend, self-check included."""
    monkeypatch.setitem(builtins.PLUGINS, "scaled_sum", ScaledSumPlugin())
    module, x = ScaledSum(), torch.randn(5, 3)
    expected = module(x)
    e3nn_accel.enable(strict=True)
    same(module(x), expected)
    [row] = e3nn_accel.report().rows
    assert (row.cls, row.operation, row.backend) == ("ScaledSum", "linear", "torch")
    e3nn_accel.enable()
    same(module(x[0]), expected[0])
    [row] = e3nn_accel.explain(module).rows
    assert (row.backend, row.detail) == ("e3nn", "one row")
    e3nn_accel.disable()
    assert "__call__" not in vars(ScaledSum)


def test_a_backend_may_plan_other_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a backend plans, a call ends in a result: its own, or stock's with a reason."""
    backend = StubBackend("half", 9, "plan")

    class Offers:
        @hookimpl
        def e3nn_accel_backends(self) -> Iterable[Backend]:
            yield backend

    monkeypatch.setitem(builtins.PLUGINS, "offers", Offers())
    module = build("Linear").to(torch.bfloat16)
    x = torch.randn(3, 13, dtype=torch.bfloat16)
    expected = module(x)
    e3nn_accel.enable()
    with pytest.warns(e3nn_accel.FallbackWarning, match="self-check: "):
        found = module(x)
    assert torch.equal(found, expected)
    assert "plan" in backend.asked


EXAMPLES = {name: spec for name, spec in hookspecs.all_specs().items()}


def example_of(spec: Callable[..., object]) -> str:
    """The example in a docstring, as code."""
    lines = [
        line for line in inspect.getdoc(spec).splitlines() if line.strip()[:3] in (">>>", "...")
    ]  # type: ignore[union-attr]
    return "\n".join(line.strip()[4:] for line in lines)


def answer_of(name: str) -> Any:
    """What the example's plugin answers, registered in the usual way."""
    names: dict[str, Any] = {}
    exec(example_of(EXAMPLES[name]), names)
    found = load(Config())
    plugin = names["Plugin"]()
    found.manager.register(plugin, name="example")
    found.manager.check_pending()
    if name == "e3nn_accel_describe":

        class MyLinear(torch.nn.Module):
            pass

        assert isinstance(found.describe(torch.nn.ReLU(), "linear"), Refusal)
        return found.describe(MyLinear(), "linear")
    if name == "e3nn_accel_kernel_source":
        assert found.kernel_source(KernelProgram("other", "other.cu", ("other",))) is None
        return found.kernel_source(KernelProgram("sums", "sum_rows.cu", ("sum_rows",)))
    if name == "e3nn_accel_event":
        found.event(Event("planned", "x", "y"))
        found.event(Event("refused", "x", "reason"))
        return plugin.refusals
    ask = {
        "e3nn_accel_targets": found.targets,
        "e3nn_accel_backends": found.backends,
        "e3nn_accel_health_checks": found.health_checks,
    }[name]
    return ask()


EXPECTED: dict[str, Callable[[Any], bool]] = {
    "e3nn_accel_targets": lambda a: any(t.path == "my_package.layers:MyLinear" for t in a),
    "e3nn_accel_describe": lambda a: isinstance(a, LinearDescriptor) and a.weight_numel == 64,
    "e3nn_accel_backends": lambda a: [b.name for b, ok in a if ok.ok][-1] == "nothing",
    "e3nn_accel_kernel_source": lambda a: isinstance(a, KernelSource) and "sum_rows" in a.code,
    "e3nn_accel_event": lambda a: a == ["reason"],
    "e3nn_accel_health_checks": lambda a: any(
        isinstance(c, HealthCheck) and c.run() == ("ok", "plenty") for c in a
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_run(name: str) -> None:
    """Each hook's docstring has an example that registers and does what it says."""
    assert EXPECTED[name](answer_of(name))


def test_the_example_of_describe_can_be_planned() -> None:
    """A descriptor written by hand is planned like one of ours."""
    descriptor = answer_of("e3nn_accel_describe")
    plan, _ = load(Config()).plan(descriptor, linear()[1])
    assert plan is not None
    x, weight = torch.randn(2, 8), torch.randn(64)
    out = plan.run(x, weight, torch.empty(0))
    same(out, x @ weight.view(8, 8) * 8**-0.5)


def test_the_group_is_the_documented_one() -> None:
    """The name that third parties write into their pyproject."""
    assert registry.GROUP == hookspecs.PROJECT == "e3nn_accel"
