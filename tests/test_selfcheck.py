"""The self-check: a wrong plan is caught at its first use, and nobody notices the check itself."""

from __future__ import annotations

import dataclasses
import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import installed_plugins
import numpy as np
import pytest
import torch
from comparison import accelerated, draw, usage
from e3nn import o3

import e3nn_accel
from e3nn_accel import AccelError, FallbackWarning, hookimpl, selfcheck
from e3nn_accel.backends.torch import TorchBackend
from e3nn_accel.descriptor import Descriptor
from e3nn_accel.hookspecs import Event
from e3nn_accel.plan import Availability, Plan, PlanContext, Refusal

pytestmark = pytest.mark.usefixtures("eager_e3nn", "float64")

Run = Callable[..., torch.Tensor]


class Meddling(TorchBackend):
    """The torch backend, with something done to each of its plans."""

    name = "meddling"
    priority = 10

    def __init__(self, meddle: Callable[[Run], Run]) -> None:
        self.meddle = meddle
        self.planned: list[Descriptor] = []

    def available(self) -> Availability:
        return Availability(True)

    def plan(self, descriptor: Descriptor, context: PlanContext) -> Plan | Refusal:
        plan = super().plan(descriptor, context)
        assert isinstance(plan, Plan)
        self.planned.append(descriptor)
        return dataclasses.replace(plan, backend=self.name, run=self.meddle(plan.run))


class Plugin:
    """What a distribution names in the entry-point group."""

    def __init__(self, backend: Meddling) -> None:
        self.backend = backend
        self.events: list[Event] = []

    @hookimpl
    def e3nn_accel_backends(self) -> list[Meddling]:
        return [self.backend]

    @hookimpl
    def e3nn_accel_event(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Run], Run]], Plugin]:
    """Install a third-party backend that meddles with plans."""

    def install_meddling(meddle: Callable[[Run], Run]) -> Plugin:
        plugin = Plugin(Meddling(meddle))
        installed_plugins.install(plugin, monkeypatch)
        return plugin

    return install_meddling


# Ways of being wrong


def honest(run: Run) -> Run:
    return lambda *operands: run(*operands)


def wrong_sign(run: Run) -> Run:
    return lambda *operands: -run(*operands)


def one_wrong_number(run: Run) -> Run:
    def wrong(*operands: torch.Tensor) -> torch.Tensor:
        out = run(*operands).clone()
        out.view(-1)[-1] *= 1.001
        return out

    return wrong


def wrong_shape(run: Run) -> Run:
    return lambda *operands: run(*operands).unsqueeze(0)


def wrong_dtype(run: Run) -> Run:
    return lambda *operands: run(*operands).float()


def not_a_number(run: Run) -> Run:
    return lambda *operands: run(*operands) * float("nan")


def no_gradient(run: Run) -> Run:
    return lambda *operands: run(*operands).detach()


def doubled_gradient(run: Run) -> Run:
    return lambda *operands: 2 * (out := run(*operands)) - out.detach()


def no_gradient_of_the_last(run: Run) -> Run:
    """The value is right, the gradient of the last operand that has one is lost."""

    def wrong(*operands: torch.Tensor) -> torch.Tensor:
        last = max(n for n, t in enumerate(operands) if t.requires_grad and t.numel())
        return run(*(t.detach() if n == last else t for n, t in enumerate(operands)))

    return wrong


def no_gradient_of_the_first(run: Run) -> Run:
    return lambda *operands: run(operands[0].detach(), *operands[1:])


def raises(run: Run) -> Run:
    def wrong(*operands: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("a kernel broke")

    return wrong


WRONG = [
    wrong_sign,
    one_wrong_number,
    wrong_shape,
    wrong_dtype,
    not_a_number,
    no_gradient,
    doubled_gradient,
    no_gradient_of_the_last,
    raises,
]


def linear() -> tuple[Any, tuple[torch.Tensor, ...]]:
    module = o3.Linear("3x0e+2x1o", "2x0e+2x1o")
    return module, (draw((5, module.irreps_in.dim), 1),)


def product() -> tuple[Any, tuple[torch.Tensor, ...]]:
    module = o3.FullyConnectedTensorProduct("2x0e+1x1o", "1x0e+1x1o", "2x0e+1x1o")
    return module, (draw((5, module.irreps_in1.dim), 1), draw((5, module.irreps_in2.dim), 2))


def square() -> tuple[Any, tuple[torch.Tensor, ...]]:
    module = o3.TensorSquare("2x0e+1x1o", "2x0e+1x2e")
    return module, (draw((5, module.irreps_in1.dim), 1),)


def species() -> tuple[Any, tuple[torch.Tensor, ...]]:
    module = o3.FullyConnectedTensorProduct("2x0e+1x1o", "3x0e", "2x0e+1x1o")
    return module, (draw((5, module.irreps_in1.dim), 1), torch.eye(3)[[0, 2, 1, 1, 0]])


def contraction() -> tuple[Any, tuple[torch.Tensor, ...]]:
    pytest.importorskip("mace", reason="MACE isn't installed")
    from mace_parts import Contraction, one_hot

    shape = Contraction("0e+1o", "0e+1o", 2)
    return shape.build(), (shape.features(5), one_hot([0, 1, 2, 3, 1]))


MODULES = {f.__name__: f for f in (linear, product, square, species, contraction)}


@pytest.fixture(params=MODULES)
def module_and_inputs(request: pytest.FixtureRequest) -> tuple[Any, tuple[torch.Tensor, ...]]:
    return MODULES[request.param]()


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_plan_is_caught(
    wrong: Callable[[Run], Run],
    module_and_inputs: tuple[Any, tuple[torch.Tensor, ...]],
    install: Callable[..., Plugin],
) -> None:
    """Warned about once, never used: stock's numbers from the first call on, and an event."""
    module, inputs = module_and_inputs
    expected = module(*inputs)
    plugin = install(wrong)
    with accelerated(strict=False, blocked_plugins=("torch",)):
        with pytest.warns(FallbackWarning, match="self-check"):
            assert torch.equal(module(*inputs), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            assert torch.equal(module(*inputs), expected)
        assert {backend for _, backend in usage(module)} == {"e3nn"}
        assert "self-check" in e3nn_accel.report().fallbacks[0].detail
    assert [event.kind for event in plugin.events].count("self-check failed") == 1


@pytest.mark.parametrize("wrong", [wrong_sign, no_gradient_of_the_last])
def test_next_backend_takes_over(
    wrong: Callable[[Run], Run],
    module_and_inputs: tuple[Any, tuple[torch.Tensor, ...]],
    install: Callable[..., Plugin],
) -> None:
    """One backend's mistake doesn't end acceleration where another can plan."""
    module, inputs = module_and_inputs
    expected = module(*inputs)
    install(wrong)
    with accelerated(strict=False):
        with pytest.warns(FallbackWarning, match="meddling"):
            found = module(*inputs)
        assert {backend for _, backend in usage(module)} == {"torch"}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_module_that_stock_cannot_run_says_nothing_of_others() -> None:
    """One whose weights were replaced by fewer has stock's error, and an equal one its plan."""
    broken, whole = o3.Linear("2x0e", "2x0e"), o3.Linear("2x0e", "2x0e")
    broken.weight.data = broken.weight.data[:-1]
    x = draw((3, 2), 1)
    with pytest.raises(RuntimeError) as expected:
        broken(x)
    with accelerated(strict=False):
        with pytest.raises(RuntimeError) as found:
            broken(x)
        assert str(found.value) == str(expected.value)
        whole(x)
        assert {backend for _, backend in usage(whole)} == {"torch"}


def test_named_backend_has_no_substitute(install: Callable[..., Plugin]) -> None:
    """Who asks for one backend isn't given another."""
    module, inputs = linear()
    install(wrong_sign)
    with accelerated(strict=False, backend="meddling"), pytest.warns(FallbackWarning):
        with pytest.raises(AccelError, match="meddling: self-check"):
            module(*inputs)


@pytest.mark.parametrize("wrong", [wrong_sign, no_gradient_of_the_last])
def test_strict_raises(
    wrong: Callable[[Run], Run],
    module_and_inputs: tuple[Any, tuple[torch.Tensor, ...]],
    install: Callable[..., Plugin],
) -> None:
    """Strict mode has no stock to fall back to."""
    module, inputs = module_and_inputs
    install(wrong)
    with accelerated(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for _ in range(2):
            with pytest.raises(AccelError, match="self-check") as caught:
                module(*inputs)
            assert any("meddling" in reason for reason in caught.value.reasons)


@pytest.mark.parametrize("wrong", [wrong_sign, no_gradient_of_the_last])
def test_convolution_is_checked(
    wrong: Callable[[Run], Run], install: Callable[..., Plugin]
) -> None:
    """The fused operation is checked against gather, product and sum."""
    module = o3.TensorProduct(
        "2x1o", "1x1o", "2x0e", [(0, 0, 0, "uvu", True)], shared_weights=False
    )
    edges = torch.tensor([[0, 1, 2], [1, 1, 0]])
    x, y, w = draw((3, 6), 1), draw((3, 3), 2), draw((3, 2), 3)
    expected = torch.zeros(3, 2).index_add(0, edges[1], module(x[edges[0]], y, w))
    install(wrong)
    with accelerated(strict=False), pytest.warns(FallbackWarning, match="self-check"):
        torch.testing.assert_close(module(x, y, w, edges), expected)


def test_right_plan_passes(
    module_and_inputs: tuple[Any, tuple[torch.Tensor, ...]], install: Callable[..., Plugin]
) -> None:
    """A backend of someone else's that is right is used."""
    module, inputs = module_and_inputs
    expected = module(*inputs)
    install(honest)
    with accelerated():
        torch.testing.assert_close(module(*inputs), expected, rtol=1e-12, atol=1e-12)
        assert {backend for _, backend in usage(module)} == {"meddling"}


def test_switched_off(install: Callable[..., Plugin]) -> None:
    """Without it a wrong plan's numbers are believed: the option does what it says."""
    module, inputs = linear()
    expected = module(*inputs)
    install(wrong_sign)
    with accelerated(self_check=False):
        torch.testing.assert_close(module(*inputs), -expected)


def test_other_dtype_is_checked_anew(install: Callable[..., Plugin]) -> None:
    """A plan that is wrong in one precision only is given up in that precision only."""

    def wrong_in_float32(run: Run) -> Run:
        return lambda *t: run(*t) * (1.5 if t[0].dtype == torch.float32 else 1)

    module, (x,) = linear()
    install(wrong_in_float32)
    with accelerated(strict=False, blocked_plugins=("torch",)):
        module(x)
        module.float()
        with pytest.warns(FallbackWarning, match="self-check"):
            module(x.float())
        module.double()
        module(x)
        counts = usage(module)
    assert counts["linear", "meddling"] == 2
    assert counts["linear", "e3nn"] == 1


def test_equal_modules_are_checked_once(install: Callable[..., Plugin]) -> None:
    """One descriptor, one plan, one check."""
    plugin = install(honest)
    first, (x,) = linear()
    second, _ = linear()
    with accelerated():
        first(x)
        second(x)
    assert len(plugin.backend.planned) == 1


def test_zero_parameters_prove_nothing(install: Callable[..., Plugin]) -> None:
    """A module whose weights are zero (LoRA's second) is checked with others, and keeps its own."""
    module, (x,) = linear()
    with torch.no_grad():
        module.weight.zero_()
    module.weight.requires_grad_(False)
    install(no_gradient_of_the_first)  # with zero weights there is no such gradient
    with accelerated(strict=False), pytest.warns(FallbackWarning, match="self-check"):
        module(x)
    assert not module.weight.any()
    assert not module.weight.requires_grad
    assert module.weight.grad is None


def test_module_is_left_alone(module_and_inputs: tuple[Any, tuple[torch.Tensor, ...]]) -> None:
    """Parameters, buffers, gradients, modes and attributes are the same objects, unchanged."""
    module, inputs = module_and_inputs
    module.eval()
    before = {
        name: (t, t.clone(), t._version) for name, t in module.state_dict(keep_vars=True).items()
    }
    attributes = set(module.__dict__)
    with accelerated():
        module(*inputs)
    for name, tensor in module.state_dict(keep_vars=True).items():
        was, content, version = before[name]
        assert tensor is was
        assert tensor._version == version
        assert torch.equal(tensor, content)
        assert tensor.grad is None
    assert set(module.__dict__) == attributes
    assert not module.training


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_runs_in_every_grad_mode(
    mode: Callable[[], Any], module_and_inputs: tuple[Any, tuple[torch.Tensor, ...]]
) -> None:
    """The first use may be in inference; the mode is left as it was."""
    module, inputs = module_and_inputs
    with accelerated(), mode():
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        module(*inputs)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == state


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_wrong_gradient_is_caught_in_inference(
    mode: Callable[[], Any], install: Callable[..., Plugin]
) -> None:
    """The same plan will serve a training step later."""
    module, inputs = linear()
    install(doubled_gradient)
    with accelerated(strict=False), mode(), pytest.warns(FallbackWarning, match="gradient"):
        module(*inputs)


# Random numbers


def test_random_state_is_untouched(module_and_inputs: tuple[Any, tuple[torch.Tensor, ...]]) -> None:
    """Neither torch's, nor numpy's, nor Python's."""
    module, inputs = module_and_inputs
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with accelerated():
        module(*inputs)
        e3nn_accel.explain(module)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_check_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own seed: what passes today passes tomorrow, whatever the user's seed."""
    seen = []
    real = selfcheck.random_inputs
    monkeypatch.setattr(selfcheck, "random_inputs", lambda *a: seen.append(real(*a)) or seen[-1])
    for seed in (0, 1):
        torch.manual_seed(seed)
        module, inputs = linear()
        with accelerated():
            module(*inputs)
    assert torch.equal(seen[0][0], seen[1][0])


def _seeded_training() -> list[float]:
    """A run whose data, initial weights and dropout all come from the global generator."""
    torch.manual_seed(7)
    module = o3.Linear("4x0e+2x1o", "4x0e+2x1o")
    second = o3.FullyConnectedTensorProduct("4x0e+2x1o", "4x0e+2x1o", "1x0e")
    optimizer = torch.optim.SGD([*module.parameters(), *second.parameters()], lr=0.05)
    losses = []
    for _ in range(4):
        x = torch.nn.functional.dropout(torch.randn(6, 10), 0.3)
        loss = second(module(x), x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_seeded_run_is_the_same() -> None:
    """A user's seed gives the same run with and without us."""
    expected = _seeded_training()
    with accelerated():
        found = _seeded_training()
    np.testing.assert_allclose(found, expected, rtol=1e-11)


# When it must not run


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check fails the test if it runs."""

    def compare(*arguments: object) -> str:
        raise AssertionError("the self-check ran")

    monkeypatch.setattr(selfcheck, "compare", compare)


@pytest.mark.usefixtures("forbidden")
def test_not_while_tracing(module_and_inputs: tuple[Any, tuple[torch.Tensor, ...]]) -> None:
    """torch.jit.trace sees stock e3nn, and its trace gives stock's numbers."""
    module, inputs = module_and_inputs
    expected = module(*inputs)
    with accelerated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, inputs, check_trace=False)
        assert {backend for _, backend in usage(module)} <= {"e3nn"}
    torch.testing.assert_close(traced(*inputs), expected)


@pytest.mark.usefixtures("forbidden")
def test_not_without_being_asked() -> None:
    """With the option off it isn't run."""
    module, inputs = linear()
    with accelerated(self_check=False):
        module(*inputs)


def test_other_threads_wait_for_the_check(install: Callable[..., Plugin]) -> None:
    """While one thread checks a wrong plan, another's call of an equal module doesn't use it."""
    checking, go_on = threading.Event(), threading.Event()

    def slow_and_wrong(run: Run) -> Run:
        def wrong(*operands: torch.Tensor) -> torch.Tensor:
            if not checking.is_set():  # the first run, which is the check's
                checking.set()
                go_on.wait(10)
            return -run(*operands)

        return wrong

    module, (x,) = linear()
    twin, _ = linear()
    expected = twin(x)
    install(slow_and_wrong)
    results: list[torch.Tensor] = []
    with accelerated(strict=False, blocked_plugins=("torch",)), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        first = threading.Thread(target=lambda: module(x))
        second = threading.Thread(target=lambda: results.append(twin(x)))
        first.start()
        assert checking.wait(10)
        second.start()
        second.join(1)  # waits for the check, or is wrong
        go_on.set()
        first.join()
        second.join()
    assert torch.equal(results[0], expected)
