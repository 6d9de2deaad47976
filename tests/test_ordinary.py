"""Calls like one before are known at a glance, and no others are taken for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import installed_plugins
import pytest
import torch
from comparison import Behaviour, accelerated, draw, poisoned_memory, randomise, usage
from e3nn import o3

import e3nn_accel
from e3nn_accel import hookimpl, ordinary
from e3nn_accel.backends.torch import TorchBackend
from e3nn_accel.descriptor import Descriptor
from e3nn_accel.interception import suspend
from e3nn_accel.plan import Availability, Ordinary, Plan, PlanContext, Refusal

pytestmark = pytest.mark.usefixtures("eager_e3nn")

IRREPS, SPECIES = "4x0e+3x1o", 3


class Noting(TorchBackend):
    """The torch backend's plans, which note what came to them as an ordinary call."""

    name, priority = "noting", 10

    def __init__(self) -> None:
        self.noted: list[tuple[torch.Tensor, ...]] = []
        self.fails = False

    def available(self) -> Availability:
        return Availability(True)

    def plan(self, descriptor: Descriptor, context: PlanContext) -> Plan | Refusal:
        plan = super().plan(descriptor, context)
        assert isinstance(plan, Plan)

        def run(*operands: torch.Tensor) -> torch.Tensor:
            self.noted.append(operands)
            if self.fails:
                raise ValueError("not now")
            return plan.run(*operands)

        rows = {"LinearDescriptor": (2,), "ContractionDescriptor": (3, 2)}
        dims = rows.get(type(descriptor).__name__, (2, 2))
        return dataclasses.replace(
            plan, backend=self.name, ordinary=Ordinary(dims, run), fewest_rows=0
        )


class Case(NamedTuple):
    """A module, and its arguments of so many rows."""

    module: torch.nn.Module
    arguments: Callable[..., tuple[torch.Tensor, ...]]


def linear() -> Case:
    module = randomise(o3.Linear(IRREPS, IRREPS), 0)
    return Case(module, lambda rows=5, seed=1: (draw((rows, 13), seed, torch.float32),))


def skip_connection() -> Case:
    module = randomise(o3.FullyConnectedTensorProduct(IRREPS, f"{SPECIES}x0e", IRREPS), 0)

    def arguments(rows: int = 5, seed: int = 1) -> tuple[torch.Tensor, ...]:
        attrs = torch.nn.functional.one_hot(torch.arange(rows) % SPECIES, SPECIES)
        return draw((rows, 13), seed, torch.float32), attrs.float()

    return Case(module, arguments)


def contraction() -> Case:
    pytest.importorskip("mace")
    from mace_parts import Contraction

    of = Contraction("0e+1o", "0e+1o", 3, species=SPECIES)

    def arguments(rows: int = 5, seed: int = 1) -> tuple[torch.Tensor, ...]:
        attrs = torch.nn.functional.one_hot(torch.arange(rows) % SPECIES, SPECIES)
        return of.features(rows, seed, torch.float32), attrs.float()

    return Case(of.build(torch.float32), arguments)


CASES = {"linear": linear, "skip connection": skip_connection, "contraction": contraction}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.set_default_dtype(torch.float32)
    found: Case = CASES[request.param]()
    return found


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Noting]:
    """Installed, and switched on without its self-check, which would note calls of its own."""
    noting = Noting()

    class Plugin:
        @hookimpl
        def e3nn_accel_backends(self) -> list[Noting]:
            return [noting]

    installed_plugins.install(Plugin(), monkeypatch)
    with accelerated(self_check=False, strict=False):
        yield noting


def stock(case: Case, *arguments: torch.Tensor) -> torch.Tensor:
    with suspend():
        found: torch.Tensor = case.module(*arguments)
    return found


def first_call(case: Case) -> None:
    with torch.no_grad():
        case.module(*case.arguments())


@pytest.mark.parametrize("rows", [5, 1, 0, 64])
def test_calls_like_the_first(case: Case, backend: Noting, rows: int) -> None:
    """Of other numbers, and of other rows: without a second look, and each is counted."""
    first_call(case)
    assert not backend.noted
    with torch.no_grad():
        for seed in (2, 3):
            given = case.arguments(rows, seed)
            found = case.module(*given)
            if rows or len(given[0].shape) == 2:  # MACE's own has an error for no rows
                torch.testing.assert_close(found, stock(case, *given))
    assert [noted[0].shape[0] for noted in backend.noted] == [rows, rows]
    assert list(usage(case.module).values()) == [3]


def test_frozen_weights_need_no_mode(case: Case, backend: Noting) -> None:
    case.module.requires_grad_(False)
    for _ in range(2):
        case.module(*case.arguments())
    assert len(backend.noted) == 1


def test_weights_are_read_anew(case: Case, backend: Noting) -> None:
    """Changed in place, by what autograd hears of and what it doesn't, and replaced."""
    first_call(case)

    def in_place(p: torch.nn.Parameter) -> None:
        p.mul_(2)

    def by_data(p: torch.nn.Parameter) -> None:
        p.data = p.data + 1

    with torch.no_grad():
        given = case.arguments()
        for change in (in_place, by_data):
            for p in case.module.parameters():
                change(p)
            torch.testing.assert_close(case.module(*given), stock(case, *given))
        for module in case.module.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    setattr(module, name, torch.nn.Parameter(3 * p))
        torch.testing.assert_close(case.module(*given), stock(case, *given))
    assert len(backend.noted) == 3


Change = Callable[[Case], tuple[torch.Tensor, ...]]


def wanting(case: Case) -> tuple[torch.Tensor, ...]:
    x, *others = case.arguments()
    return x.requires_grad_(), *others


def by_columns(case: Case) -> tuple[torch.Tensor, ...]:
    x, *others = case.arguments()
    return x.transpose(0, 1).contiguous().transpose(0, 1), *others


def expanded(case: Case) -> tuple[torch.Tensor, ...]:
    x, *others = case.arguments()
    return x[:1].expand_as(x), *others


def overlapping(case: Case) -> tuple[torch.Tensor, ...]:
    x, *others = case.arguments()
    flat = draw((1000,), 4, torch.float32)
    return flat.as_strided(x.shape, (1, *x.stride()[1:])), *others


def shorter(case: Case) -> tuple[torch.Tensor, ...]:
    x, *others = case.arguments()
    return x[..., :-1].contiguous(), *others


def of_other_rows(case: Case) -> tuple[torch.Tensor, ...]:
    x, *others = case.arguments()
    return x[:1].clone(), *others


def one_more_dimension(case: Case) -> tuple[torch.Tensor, ...]:
    return tuple(t[None] for t in case.arguments())


def doubled(case: Case) -> tuple[torch.Tensor, ...]:
    return tuple(t.double() for t in case.arguments())


def half(case: Case) -> tuple[torch.Tensor, ...]:
    return tuple(t.half() for t in case.arguments())


class Subclass(torch.Tensor):
    """With behaviour of its own, for all that we know."""


def of_a_subclass(case: Case) -> tuple[torch.Tensor, ...]:
    x, *others = case.arguments()
    return x.as_subclass(Subclass), *others


def sparse(case: Case) -> tuple[torch.Tensor, ...]:
    x, *others = case.arguments()
    return x.to_sparse(), *others


def on_meta(case: Case) -> tuple[torch.Tensor, ...]:
    x, *others = case.arguments()
    return x.to("meta"), *others


OTHERS = (
    wanting, by_columns, expanded, overlapping, shorter, of_other_rows, one_more_dimension, doubled, half,
    of_a_subclass, sparse, on_meta,
)  # fmt: skip


@pytest.mark.parametrize("change", OTHERS, ids=lambda change: change.__name__)
def test_others_take_the_long_way(case: Case, backend: Noting, change: Change) -> None:
    """With stock's results or stock's errors, with gradients of `wanting` alone; the next ordinary one is known."""
    first_call(case)
    if change is of_other_rows and isinstance(case.module, o3.Linear):
        pytest.skip("a linear has but one operand with rows")
    given = change(case)
    mode = nullcontext() if change is wanting else torch.no_grad()
    with mode:
        ours = Behaviour.of(lambda: case.module(*given))
        ours.assert_like(Behaviour.of(lambda: stock(case, *given)))
    assert not backend.noted
    if ours.error is None and change in (by_columns, expanded, overlapping):
        return  # which may be remembered instead
    case.module.requires_grad_(False)
    for _ in range(2):
        case.module(*case.arguments())
    assert backend.noted


@pytest.mark.parametrize(
    "mode",
    [lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad, torch.inference_mode],
    ids=["autocast", "enable_grad", "inference_mode"],
)
def test_modes_of_the_thread(
    case: Case, backend: Noting, mode: Callable[[], AbstractContextManager[object]]
) -> None:
    first_call(case)
    given = case.arguments()
    with torch.no_grad(), mode():
        ours = Behaviour.of(lambda: case.module(*given))  # MACE's has an error for autocast
        ours.assert_like(Behaviour.of(lambda: stock(case, *given)))
    assert not backend.noted


def test_transforms_and_hooks(case: Case, backend: Noting) -> None:
    first_call(case)
    x, *others = case.arguments()
    with torch.no_grad():
        mapped = torch.vmap(lambda x: case.module(x, *others))(torch.stack([x, 2 * x]))
        torch.testing.assert_close(mapped[1], stock(case, 2 * x, *others), rtol=1e-4, atol=1e-4)
        seen: list[Any] = []
        handle = case.module.register_forward_hook(lambda *of: seen.append(of))
        case.module(x, *others)
        handle.remove()
    assert len(seen) == 1
    assert not backend.noted


Call = Callable[[], Any]


def traced(call: Call) -> None:
    torch.jit.trace(lambda y: (call(), y + 1)[1], torch.ones(1), check_trace=False)


def traced_by_fx(call: Call) -> None:
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, *of: object) -> bool:
            return True

        def path_of_module(self, module: torch.nn.Module) -> str:
            return "it"

    Leaves().trace(lambda y: (call(), y + 1)[1])


def within_vmap(call: Call) -> None:
    torch.vmap(lambda y: (call(), y)[1])(torch.ones(2))


def within_a_gradient(call: Call) -> None:
    torch.func.grad(lambda y: (call(), y.sum())[1])(torch.ones(2))


def within_a_jvp(call: Call) -> None:
    torch.func.jvp(lambda y: (call(), y)[1], (torch.ones(2),), (torch.ones(2),))


def with_dual_numbers(call: Call) -> None:
    with torch.autograd.forward_ad.dual_level():
        call()


AROUND = (
    traced, traced_by_fx, within_vmap, within_a_gradient, within_a_jvp, with_dual_numbers,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("around", AROUND, ids=lambda around: around.__name__)
def test_while_a_program_is_transformed(
    case: Case, backend: Noting, around: Callable[[Call], None]
) -> None:
    """Calls with tensors that are no part of it, too; known again afterwards."""
    case.module.requires_grad_(False)
    first_call(case)
    given, outs = case.arguments(), []

    def call() -> None:
        with torch.no_grad():
            outs.append(case.module(*given))

    around(call)
    assert len(outs) == 1
    assert not backend.noted
    call()
    assert len(backend.noted) == 1


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("of_all", [False, True], ids=["its own", "of all modules"])
def test_hooks_of_any_kind(case: Case, backend: Noting, hook: str, of_all: bool) -> None:
    case.module.requires_grad_(False)
    first_call(case)
    register = (
        getattr(torch.nn.modules.module, f"register_module_{hook}")
        if of_all
        else getattr(case.module, f"register_{hook}")
    )
    handle = register(lambda *of: None)
    try:
        first_call(case)
    finally:
        handle.remove()
    assert not backend.noted
    first_call(case)
    assert len(backend.noted) == 1


def test_a_forward_of_its_own(case: Case, backend: Noting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assigned to the instance or to its class, and taken away again."""
    first_call(case)
    given = case.arguments()
    with torch.no_grad():
        case.module.forward = lambda *of: "of the instance"
        assert case.module(*given) == "of the instance"
        del case.module.forward
        with monkeypatch.context() as patched:
            patched.setattr(type(case.module), "forward", lambda *of: "of the class")
            assert case.module(*given) == "of the class"
        case.module(*given)
    assert len(backend.noted) == 1


def test_hooks_that_old_pickles_lack(case: Case, backend: Noting) -> None:
    """As torch before 2.0 wrote them: the long way."""
    first_call(case)
    hooks = case.module.__dict__.pop("_backward_pre_hooks")
    first_call(case)
    case.module.__dict__["_backward_pre_hooks"] = hooks
    assert not backend.noted


@pytest.mark.parametrize("change", ["shape", "dtype", "strides"])
def test_weights_of_another_kind(case: Case, backend: Noting, change: str) -> None:
    first_call(case)
    for p in case.module.parameters():
        if change == "shape":
            p.data = p.data[..., :-1].contiguous()
        elif change == "dtype":
            p.data = p.data.double()
        else:
            p.data = p.data.repeat_interleave(2, -1)[..., ::2]
    given = case.arguments()
    with torch.no_grad():
        ours = Behaviour.of(lambda: case.module(*given))
        ours.assert_like(Behaviour.of(lambda: stock(case, *given)))
    assert not backend.noted


def test_by_keyword_and_with_weights(backend: Noting) -> None:
    """Weights that are passed are no operands of an ordinary call."""
    case = linear()
    (x,) = case.arguments()
    passed = 2 * case.module.weight.detach()
    with torch.no_grad():
        for _ in range(2):
            case.module(features=x)
            torch.testing.assert_close(case.module(x, passed), stock(case, x, passed))
    assert not backend.noted


def test_a_plan_that_was_given_up(case: Case, backend: Noting) -> None:
    first_call(case)
    dispatcher = e3nn_accel.switch.active.dispatcher
    assert dispatcher is not None
    (outcome,) = dispatcher.runners[case.module].outcomes.values()
    with pytest.warns(e3nn_accel.FallbackWarning):
        dispatcher.plans.give_up(outcome, "a test says so")
    first_call(case)
    assert not backend.noted


def test_what_fails_takes_the_long_way(case: Case, backend: Noting) -> None:
    first_call(case)
    backend.fails = True
    given = case.arguments()
    with torch.no_grad():
        torch.testing.assert_close(case.module(*given), stock(case, *given))
    assert len(backend.noted) == 1
    assert list(usage(case.module).values()) == [2]


def _absent(*of: object) -> None:
    return None


def _other(*of: object) -> None:
    raise TypeError("of other arguments")


@pytest.mark.parametrize("function", [_absent, _other])
def test_without_torchs_function(
    case: Case,
    backend: Noting,
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., None],
) -> None:
    """Old torch may lack it, and new torch may have another."""
    monkeypatch.setattr(ordinary, "likeness_of", function)
    for _ in range(3):
        first_call(case)
    assert not backend.noted
    assert list(usage(case.module).values()) == [3]


def test_kinds_that_take_turns(backend: Noting) -> None:
    """Each is remembered in turn, until there were too many to be worth it."""
    case = linear()
    x, looser = case.arguments()[0], case.arguments()[0].requires_grad_()
    with torch.no_grad():
        for _ in range(2 * ordinary.MOST_ATTEMPTS):
            for given in (x, looser):
                torch.testing.assert_close(case.module(given), stock(case, given))
    dispatcher = e3nn_accel.switch.active.dispatcher
    assert dispatcher is not None
    assert dispatcher.runners[case.module].attempts_to_remember == ordinary.MOST_ATTEMPTS


def test_calls_that_are_never_ordinary(case: Case, backend: Noting) -> None:
    """Aren't looked at for ever whether they are."""
    given = one_more_dimension(case)
    if isinstance(case.module, (o3.Linear, o3.FullyConnectedTensorProduct)):
        with torch.no_grad():
            for _ in range(ordinary.MOST_ATTEMPTS + 2):
                case.module(*given)
        dispatcher = e3nn_accel.switch.active.dispatcher
        assert dispatcher is not None
        runner = dispatcher.runners[case.module]
        assert (runner.ordinary, runner.attempts_to_remember) == (None, ordinary.MOST_ATTEMPTS)
    assert not backend.noted


@pytest.mark.parametrize("option", ["verify", "profile"])
def test_calls_that_are_watched_take_the_long_way(backend: Noting, option: str) -> None:
    case = linear()
    with accelerated(self_check=False, strict=False, **{option: True}):
        for _ in range(3):
            first_call(case)
    assert not backend.noted


@pytest.mark.usefixtures("kernels_on_host")
def test_kernels(case: Case) -> None:
    """The long way's numbers to the bit, every one of them written."""
    with accelerated(backend="cuda", self_check=False), torch.no_grad(), poisoned_memory():
        first_call(case)
        runner = e3nn_accel.switch.active.dispatcher.runners[case.module]  # type: ignore[union-attr]
        for rows in (5, 1, 0, 9):
            given = case.arguments(rows, 7)
            assert runner.ordinary is not None
            quick = runner.ordinary.take(case.module, given)
            assert quick is not None
            runner.ordinary, known = None, runner.ordinary
            assert torch.equal(quick, case.module(*given))
            runner.ordinary = known
            if rows or len(given[0].shape) == 2:
                torch.testing.assert_close(quick, stock(case, *given), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernels_on_host")
def test_the_self_check_looks_at_ordinary_calls(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan whose quicker way is wrong is given up before it is taken."""
    right = Ordinary.__new__

    def wrong(cls: Any, dims: Any, run: Any) -> Any:
        return right(cls, dims, lambda *operands: 1.01 * run(*operands))

    monkeypatch.setattr(Ordinary, "__new__", wrong)
    given = case.arguments()
    with (
        e3nn_accel.enabled(backend="cuda"),
        torch.no_grad(),
        pytest.warns(e3nn_accel.FallbackWarning, match="value of an ordinary call"),
        pytest.raises(e3nn_accel.AccelError, match="value of an ordinary call"),
    ):
        case.module(*given)
