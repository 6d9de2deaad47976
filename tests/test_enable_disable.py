"""On and off: whatever the order, stock e3nn comes back object for object."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import fresh_python
import pytest
import torch
from e3nn import o3
from e3nn.o3 import Linear as LinearImportedEarly
from small_models import (
    BUILD,
    build,
    inputs_of,
    mace,
    same,
    value_and_gradients,
    without_torchscript,
)

import e3nn_accel
from e3nn_accel import switch
from e3nn_accel.errors import AccelError, E3nnAccelWarning, FallbackWarning

Snapshot = dict[type, dict[str, object]]


def touched() -> list[type]:
    """Every class that may be changed, with its bases."""
    classes = {base for name in BUILD for base in getattr(o3, name).__mro__}
    classes |= set(o3.SphericalHarmonics.__mro__)
    with contextlib.suppress(ImportError):
        from mace.modules import blocks, symmetric_contraction

        classes |= {*blocks.InteractionBlock.__mro__, *blocks.RealAgnosticInteractionBlock.__mro__}
        classes |= set(blocks.RadialEmbeddingBlock.__mro__)
        classes |= set(symmetric_contraction.SymmetricContraction.__mro__)
        classes |= set(symmetric_contraction.Contraction.__mro__)
        from mace.calculators.mace import MACECalculator
        from mace.modules import models

        classes |= {*models.MACE.__mro__, models.ScaleShiftMACE, MACECalculator}
    return sorted(classes - {object}, key=lambda cls: cls.__qualname__)


def snapshot() -> Snapshot:
    """The attributes of those classes, the very objects."""
    return {cls: dict(vars(cls)) for cls in touched()}


def assert_same_objects(now: Snapshot, before: Snapshot) -> None:
    for cls, attributes in before.items():
        assert now[cls].keys() == attributes.keys(), cls
        changed = [name for name, value in attributes.items() if now[cls][name] is not value]
        assert changed == [], cls


def backend_of(module: torch.nn.Module, *inputs: torch.Tensor) -> str:
    """Which backend takes a call of the module now."""
    runner = switch.active.dispatcher.runners.get(module) if switch.active.dispatcher else None
    before = {key: usage.calls for key, usage in runner.usage.items()} if runner else {}
    module(*(inputs or inputs_of(module)))
    if switch.active.dispatcher is None:
        return "e3nn"
    runner = switch.active.dispatcher.runners[module]
    if runner.config is None:
        return "e3nn"
    [key] = [k for k, usage in runner.usage.items() if usage.calls != before.get(k, 0)]
    return key[1]


def on_and_off() -> None:
    e3nn_accel.enable()
    e3nn_accel.disable()


def on_twice() -> None:
    e3nn_accel.enable()
    e3nn_accel.enable(profile=True)
    e3nn_accel.disable()


def nested_blocks() -> None:
    with e3nn_accel.enabled():
        with e3nn_accel.enabled(strict=True):
            pass


def an_exception() -> None:
    with contextlib.suppress(ZeroDivisionError), e3nn_accel.enabled():
        1 / 0


def one_model_then_everything() -> None:
    model = e3nn_accel.accelerate(build("Linear"))
    with e3nn_accel.enabled():
        backend_of(model)
    e3nn_accel.enable()
    e3nn_accel.accelerate(build("FullyConnectedTensorProduct"))
    e3nn_accel.disable()


def off_inside_a_block() -> None:
    with e3nn_accel.enabled():
        e3nn_accel.disable()
        e3nn_accel.disable()


def off_with_a_model_alive() -> None:
    kept.append(e3nn_accel.accelerate(build("Linear")))
    e3nn_accel.disable()


def with_calls_and_an_explanation() -> None:
    with e3nn_accel.enabled():
        for name in BUILD:
            backend_of(build(name))
        e3nn_accel.explain(build("Linear"))
    e3nn_accel.explain(build("Linear"))


kept: list[torch.nn.Module] = []
SEQUENCES: list[Callable[[], None]] = [
    on_and_off,
    on_twice,
    nested_blocks,
    an_exception,
    one_model_then_everything,
    off_inside_a_block,
    off_with_a_model_alive,
    with_calls_and_an_explanation,
]


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda f: f.__name__)
def test_every_attribute_is_restored(sequence: Callable[[], None]) -> None:
    """After any sequence that ends switched off, each class has the attributes it had."""
    before = snapshot()
    sequence()
    assert_same_objects(snapshot(), before)
    assert not e3nn_accel.is_enabled()


def test_enabling_changes_the_call_and_the_notices_alone() -> None:
    """Only these attributes differ while enabled; above all no forward does."""
    before = snapshot()
    e3nn_accel.enable()
    now = snapshot()
    changed = {
        (cls.__name__, name)
        for cls in before
        for name in now[cls].keys() | before[cls].keys()
        if now[cls].get(name) is not before[cls].get(name)
    }
    assert {(name, "__call__") for name in BUILD} <= changed
    methods = ("calculate", "check_state", "_atoms_to_batch")
    of_calculators = {("MACECalculator", name) for name in methods}
    assert changed.isdisjoint(of_calculators) or of_calculators <= changed
    assert {name for _, name in changed - of_calculators} <= {
        "__init__",
        "__setstate__",
        "__call__",
        "conv_fusion",
        "__jit_unused_properties__",
    }
    fused = {cls for cls, name in changed if name in ("conv_fusion", "__jit_unused_properties__")}
    assert fused <= {"InteractionBlock"}


def test_interaction_blocks_are_restored() -> None:
    """The property that fuses convolutions goes away with the rest."""
    blocks = pytest.importorskip("mace.modules.blocks")
    e3nn_accel.enable()
    assert isinstance(vars(blocks.InteractionBlock)["conv_fusion"], property)
    e3nn_accel.disable()
    assert not hasattr(blocks.InteractionBlock, "conv_fusion")
    assert not hasattr(blocks.InteractionBlock, "__jit_unused_properties__")


@pytest.mark.parametrize("name", BUILD)
def test_built_before_and_after(name: str) -> None:
    """Modules from before and from after enabling are accelerated alike, and stock afterwards."""
    early = build(name)
    inputs = inputs_of(early)
    stock = value_and_gradients(early, *inputs)
    e3nn_accel.enable()
    late = build(name)
    for module in (early, late):
        assert backend_of(module, *inputs) == "torch"
        same(value_and_gradients(module, *inputs), stock)
    e3nn_accel.disable()
    for module in (early, late):
        assert all(map(torch.equal, value_and_gradients(module, *inputs), stock))


def test_names_imported_early_are_the_same_class() -> None:
    """`from e3nn.o3 import Linear` before enabling gives the class that is accelerated."""
    e3nn_accel.enable()
    assert LinearImportedEarly is o3.Linear
    module = LinearImportedEarly("4x0e", "4x0e")
    assert type(module) is LinearImportedEarly
    assert backend_of(module) == "torch"


def test_a_block_gives_back_the_options_before_it() -> None:
    """Nested blocks each have their own options, and give back those outside, after errors too."""
    module = build("Linear")
    e3nn_accel.enable(skip=("Linear",))
    assert backend_of(module) == "e3nn"
    with e3nn_accel.enabled():
        assert backend_of(module) == "torch"
        with contextlib.suppress(ZeroDivisionError), e3nn_accel.enabled(only=("TensorProduct",)):
            assert backend_of(module) == "e3nn"
            1 / 0
        assert backend_of(module) == "torch"
    assert e3nn_accel.is_enabled()
    assert backend_of(module) == "e3nn"


def test_new_options_reach_modules_already_called() -> None:
    """A second enable replaces the options of the first, in each direction."""
    module = build("Linear")
    e3nn_accel.enable()
    assert backend_of(module) == "torch"
    e3nn_accel.enable(skip=("Linear",))
    assert backend_of(module) == "e3nn"
    e3nn_accel.enable()
    assert backend_of(module) == "torch"
    e3nn_accel.enable(strict=True, only=("Linear",))
    assert backend_of(module) == "torch"


def test_blocking_a_plugin_takes_effect_at_once() -> None:
    """Also the options that say which plugins there are."""
    module = build("Linear")
    e3nn_accel.enable()
    assert backend_of(module) == "torch"
    e3nn_accel.enable(blocked_plugins=("torch",))
    assert backend_of(module) == "e3nn"
    e3nn_accel.enable()
    assert backend_of(module) == "torch"


def test_one_model_only() -> None:
    """`accelerate` returns the model itself and touches no other, not even an equal one."""
    ours, other = build("Linear"), build("Linear")
    assert e3nn_accel.accelerate(ours) is ours
    assert not e3nn_accel.is_enabled()
    assert (backend_of(ours), backend_of(other)) == ("torch", "e3nn")


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_of_one_model_are_stock(clone: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """A copy of an accelerated model is stock, until e3nn_accel is enabled for all."""
    model = e3nn_accel.accelerate(torch.nn.Sequential(build("Linear")))
    twin = clone(model)
    assert (backend_of(model[0]), backend_of(twin[0])) == ("torch", "e3nn")
    with e3nn_accel.enabled():
        assert backend_of(twin[0]) == "torch"
    assert (backend_of(model[0]), backend_of(twin[0])) == ("torch", "e3nn")


def test_disable_ends_a_single_model() -> None:
    """`disable` is for models given to `accelerate` too; enabling again does not revive them."""
    model = e3nn_accel.accelerate(build("Linear"))
    e3nn_accel.disable()
    assert backend_of(model) == "e3nn"
    e3nn_accel.accelerate(build("TensorProduct"))
    assert backend_of(model) == "e3nn"


def test_a_models_own_options_come_first() -> None:
    """What `accelerate` was told about a model holds against the global options, both ways."""
    skipped, taken = build("Linear"), build("Linear")
    e3nn_accel.enable(skip=("Linear",))
    e3nn_accel.accelerate(taken)
    assert backend_of(taken) == "torch"
    e3nn_accel.accelerate(skipped, skip=("Linear",))
    e3nn_accel.enable()
    assert (backend_of(taken), backend_of(skipped)) == ("torch", "e3nn")
    e3nn_accel.accelerate(skipped)
    assert backend_of(skipped) == "torch"


def test_a_model_that_is_gone_leaves_nothing() -> None:
    """Nothing of ours keeps a model alive."""
    import gc
    import weakref

    e3nn_accel.enable()
    model = e3nn_accel.accelerate(build("FullyConnectedTensorProduct"))
    backend_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(switch.active.models) == 0


def test_nothing_supported_warns() -> None:
    """A model without a supported class is returned as it is, with a warning or an error."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.warns(FallbackWarning, match="Sequential has no module of a supported class"):
        assert e3nn_accel.accelerate(model) is model
    with pytest.raises(AccelError, match="nothing to accelerate") as error:
        e3nn_accel.accelerate(model, strict=True)
    assert error.value.reasons == ("Sequential has no module of a supported class",)


class Net(torch.nn.Module):
    """Two linears by name, one within another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = build("Linear")
        self.inner = torch.nn.ModuleDict({"second": build("Linear")})


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({"skip": ("Linear",)}, "e3nn", "e3nn"),
        ({"skip": ("Lin*",)}, "e3nn", "e3nn"),
        ({"skip": ("e3nn.o3.*",)}, "e3nn", "e3nn"),
        ({"skip": ("first",)}, "e3nn", "torch"),
        ({"skip": ("inner.*",)}, "torch", "e3nn"),
        ({"skip": ("linear", "TensorProduct", "fir")}, "torch", "torch"),
        ({"only": ("TensorProduct",)}, "e3nn", "e3nn"),
        ({"only": ("inner.second",)}, "e3nn", "torch"),
        ({"only": ("Linear",), "skip": ("first",)}, "e3nn", "torch"),
    ],
)
def test_skip_and_only(options: dict[str, tuple[str, ...]], first: str, second: str) -> None:
    """Globs name classes, qualified classes, or paths within the model given to `accelerate`."""
    net = e3nn_accel.accelerate(Net(), **options)
    assert (backend_of(net.first), backend_of(net.inner["second"])) == (first, second)


@pytest.mark.parametrize("glob", ["Linear", "e3nn.o3*.Linear", "*"])
def test_skip_globally(glob: str) -> None:
    """Globs of classes hold for every module of the process."""
    e3nn_accel.enable(skip=(glob,))
    assert backend_of(build("Linear")) == "e3nn"


def test_strict_raises_with_every_reason() -> None:
    """Where stock e3nn would take a call, strict mode raises instead and says why."""
    module = build("Linear").to(torch.bfloat16)
    x = torch.randn(3, 13, dtype=torch.bfloat16)
    e3nn_accel.enable()
    module(x)
    e3nn_accel.enable(strict=True)
    with pytest.raises(AccelError, match="bfloat16") as error:
        module(x)
    assert any("torch: needs float32 or float64" in reason for reason in error.value.reasons)


def test_strict_leaves_stocks_own_errors() -> None:
    """Arguments that stock e3nn refuses raise what stock raises, strict or not."""
    module = build("Linear")

    def error_of(*args: object) -> tuple[type[BaseException], str]:
        with pytest.raises(Exception) as error:
            module(*args)
        return error.type, str(error.value)

    wrong: list[tuple[object, ...]] = [(), (torch.randn(3, 5),), ("x",), (torch.randn(3, 13),) * 4]
    stock = [error_of(*args) for args in wrong]
    for options in ({}, {"strict": True}):
        e3nn_accel.enable(**options)
        assert [error_of(*args) for args in wrong] == stock


def test_a_named_backend_must_plan() -> None:
    """A backend asked for by name that can't plan raises with every reason; auto falls back."""
    module = build("Linear")
    e3nn_accel.enable(backend="cuda13")
    with pytest.raises(AccelError) as error:
        module(*inputs_of(module))
    [reason] = error.value.reasons
    assert "cuda13: there is no such backend (there are: " in reason
    assert "torch" in reason
    half = build("Linear").to(torch.bfloat16)
    e3nn_accel.enable(backend="torch")
    with pytest.raises(AccelError, match="bfloat16"):
        half(torch.randn(3, 13, dtype=torch.bfloat16))
    e3nn_accel.enable()
    half(torch.randn(3, 13, dtype=torch.bfloat16))


@pytest.fixture
def broken_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrapping one of the classes fails half way."""
    from e3nn_accel.interception import Interception

    change = Interception.set

    def broken(self: Interception, cls: type, name: str, value: object) -> None:
        if cls is o3.FullTensorProduct and name == "__call__":
            raise RuntimeError("this class can't be wrapped")
        change(self, cls, name, value)

    monkeypatch.setattr(Interception, "set", broken)


@pytest.fixture
def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins can't be loaded at all."""
    from e3nn_accel import registry

    def broken(config: object) -> None:
        raise RuntimeError("no plugins today")

    monkeypatch.setattr(registry, "load", broken)


@pytest.mark.usefixtures("no_registry")
@pytest.mark.parametrize("one_model", [False, True])
def test_an_error_while_enabling_leaves_stock(one_model: bool) -> None:
    """It warns, says that e3nn_accel stays off, and nothing is changed."""
    before = snapshot()
    model = build("Linear")
    switch_on = (lambda: e3nn_accel.accelerate(model)) if one_model else e3nn_accel.enable
    with pytest.warns(E3nnAccelWarning, match="stays off: RuntimeError: no plugins today"):
        assert switch_on() is (model if one_model else None)
    assert not e3nn_accel.is_enabled()
    assert_same_objects(snapshot(), before)
    assert backend_of(model) == "e3nn"


@pytest.mark.usefixtures("broken_target")
@pytest.mark.parametrize("one_model", [False, True])
def test_a_class_that_cannot_be_wrapped_stays_stock(one_model: bool) -> None:
    """It warns and leaves that class as it was; the others are accelerated."""
    before = snapshot()
    broken, sound = build("FullTensorProduct"), build("Linear")
    model = torch.nn.Sequential(broken, sound)
    switch_on = (lambda: e3nn_accel.accelerate(model)) if one_model else e3nn_accel.enable
    with pytest.warns(E3nnAccelWarning, match="leaves e3nn.o3:FullTensorProduct as it is"):
        switch_on()
    assert dict(vars(o3.FullTensorProduct)) == before[o3.FullTensorProduct]
    assert switch.active.dispatcher is not None
    problems = switch.active.dispatcher.registry.problems
    assert "this class can't be wrapped" in problems["e3nn.o3:FullTensorProduct"]
    assert backend_of(sound) == "torch"
    same(broken(*inputs_of(broken)), o3.FullTensorProduct.forward(broken, *inputs_of(broken)))
    e3nn_accel.disable()
    assert_same_objects(snapshot(), before)


@pytest.mark.parametrize("fault", ["broken_target", "no_registry"])
def test_an_error_while_enabling_strictly_raises(
    fault: str, request: pytest.FixtureRequest
) -> None:
    """Strict mode raises it, and nothing at all is changed."""
    request.getfixturevalue(fault)
    before = snapshot()
    with pytest.raises(RuntimeError, match=r"this class can't be wrapped|no plugins today"):
        e3nn_accel.enable(strict=True)
    assert not e3nn_accel.is_enabled()
    assert_same_objects(snapshot(), before)


def test_an_error_leaves_a_later_attempt_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enabling works once the cause is gone."""
    from e3nn_accel import registry

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(registry, "load", lambda config: 1 / 0)
        e3nn_accel.enable()
    e3nn_accel.enable()
    assert backend_of(build("Linear")) == "torch"


def test_an_unknown_option_changes_nothing() -> None:
    """The error comes before anything is switched."""
    before = snapshot()
    for call in (e3nn_accel.enable, lambda **o: e3nn_accel.accelerate(build("Linear"), **o)):
        with pytest.raises(TypeError, match="no option 'strikt'; did you mean 'strict'"):
            call(strikt=True)
    assert not e3nn_accel.is_enabled()
    assert_same_objects(snapshot(), before)


def test_threads_that_call_while_others_switch() -> None:
    """Calls give stock's numbers whatever other threads switch meanwhile; then all is restored."""
    before = snapshot()
    module = build("FullyConnectedTensorProduct")
    inputs = tuple(x.detach() for x in inputs_of(module))
    expected = module(*inputs).detach()
    done = threading.Event()
    errors: list[BaseException] = []

    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            errors.append(error)

    def call() -> None:
        with noted():
            while not done.is_set():
                same(module(*inputs).detach(), expected)
                e3nn_accel.report()

    # built beforehand: torch.fx, which e3nn builds with, is not safe among threads itself
    others = [build("Linear") for _ in range(3)]

    def toggle(number: int) -> None:
        with noted():
            for _ in range(6):
                e3nn_accel.enable(profile=bool(number % 2))
                e3nn_accel.accelerate(others[number])
                if number % 3 == 0:
                    e3nn_accel.disable()

    callers = [threading.Thread(target=call) for _ in range(2)]
    switchers = [threading.Thread(target=toggle, args=(n,)) for n in range(3)]
    for thread in [*callers, *switchers]:
        thread.start()
    for thread in switchers:
        thread.join(60)
    done.set()
    for thread in callers:
        thread.join(60)
    assert errors == []
    e3nn_accel.disable()
    assert_same_objects(snapshot(), before)


def test_planning_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first call starts no torch.fx trace, which patches `__call__` of every module meanwhile."""
    with without_torchscript():
        module = build("FullyConnectedTensorProduct")

    def trace(*args: object, **kwargs: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(torch.fx.Tracer, "trace", trace)
    e3nn_accel.enable(strict=True)
    assert backend_of(module) == "torch"


def test_a_module_that_cannot_be_copied_is_accelerated() -> None:
    """Whatever users hang on a module: planning needs no deep copy of it."""
    module = build("Linear")
    module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(module)
    e3nn_accel.enable(strict=True)
    assert backend_of(module) == "torch"


def test_suspended_in_this_thread_alone() -> None:
    """Within `suspend` this thread's calls are stock, another thread's are not."""
    from e3nn_accel.interception import suspend

    module = build("Linear")
    x = inputs_of(module)
    e3nn_accel.enable()
    module(*x)
    usage = switch.active.dispatcher.runners[module].usage
    calls = lambda: {backend: used.calls for (_, backend, _), used in usage.items()}  # noqa: E731
    with suspend():
        module(*x)
        assert calls() == {"torch": 1}
        thread = threading.Thread(target=module, args=x)
        thread.start()
        thread.join()
        assert calls() == {"torch": 2}


def test_a_whole_mace_before_and_after() -> None:
    """A model from before enabling gives stock's very numbers again after disabling."""
    from small_models import energy_and_forces, molecules

    model = mace()
    batch = molecules()
    stock = energy_and_forces(model, batch)
    with e3nn_accel.enabled():
        same(energy_and_forces(model, batch), stock, 1e-9)
        assert not e3nn_accel.explain(model).fallbacks
    assert all(map(torch.equal, energy_and_forces(model, batch), stock))


WHILE_IMPORTED = """
import sys, threading
import e3nn_accel
from e3nn_accel._start._e3nn_accel_boot import when_imported

finished = []

def enabled_by_another_thread():
    thread = threading.Thread(target=e3nn_accel.enable, daemon=True)
    thread.start()
    thread.join(20)
    finished.append(not thread.is_alive())

when_imported({"e3nn.o3": enabled_by_another_thread})
from e3nn import o3
assert finished == [True], finished
assert "__call__" in vars(o3.Linear)
"""


def test_enabled_by_a_thread_while_another_imports_e3nn(tmp_path: Path) -> None:
    """Neither waits for the other for ever: enabling asks for no import lock."""
    python = fresh_python.make(tmp_path / "python", start_files=False)
    python.run("-c", WHILE_IMPORTED)
