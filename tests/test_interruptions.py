"""Ctrl-C at the first call: it ends the call and nothing else, and the next call is accelerated."""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from host_kernels import HostCompiler
from kernel_programs import Compilations, axpy, fake_compiler
from small_models import build, inputs_of, same, value_and_gradients

import e3nn_accel
from e3nn_accel import compile as compiling
from e3nn_accel import selfcheck
from e3nn_accel.backends.cuda import CudaBackend
from e3nn_accel.backends.torch import TorchBackend
from e3nn_accel.compile import Toolchain
from e3nn_accel.planning import Plans

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eager_e3nn", "float64", "ctrl_c")]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """It interrupts, whatever a program that ran here before made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, during whose first call the user presses Ctrl-C."""
    calls: list[int] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return run


def then_all_is_well(module: torch.nn.Module, *inputs: torch.Tensor, backend: str) -> None:
    """The call is interrupted; the next gives stock's numbers from a plan."""
    with e3nn_accel.interception.suspend():
        expected = value_and_gradients(module, *inputs)
    with pytest.raises(KeyboardInterrupt):
        value_and_gradients(module, *inputs)
    same(value_and_gradients(module, *inputs), expected, 1e-12)
    assert backend in {row.backend for row in e3nn_accel.report().rows}


PLACES = {
    "describing": (Plans, "preview"),
    "planning": (TorchBackend, "plan"),
    "before the self-check": (selfcheck, "compare"),
    "after the self-check": (Plans, "outcome"),
}


@pytest.mark.parametrize("place", PLACES)
def test_while_planning(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Nothing half-made is kept, and no lock is."""
    owner, name = PLACES[place]
    monkeypatch.setattr(owner, name, interrupted_once(getattr(owner, name)))
    module = build("Linear")
    e3nn_accel.enable()
    then_all_is_well(module, *inputs_of(module), backend="torch")
    other = build("TensorProduct")
    thread = threading.Thread(target=other, args=inputs_of(other))  # a lock that is held stops it
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_while_the_self_check_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a thread of its own, for which the interrupted one waits."""
    compare, waiting = selfcheck._compare, threading.Event()

    def slow(*arguments: Any) -> str:
        if not waiting.is_set():
            waiting.set()
            _thread.interrupt_main()
        return compare(*arguments)

    monkeypatch.setattr(selfcheck, "_compare", slow)
    module = build("Linear")
    e3nn_accel.enable()
    then_all_is_well(module, *inputs_of(module), backend="torch")


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_while_kernels_compile(
    kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """At the first call, or in a backward pass whose kernels are compiled when they are wanted."""
    load_all = kernels_on_host.load_all
    wanted = {"forward": 1, "backward": 2}[when]
    calls: list[int] = []

    def load(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == wanted:
            raise KeyboardInterrupt
        return load_all(*arguments)

    from e3nn_accel.backends.cuda import tensor_product_launch

    monkeypatch.setattr(tensor_product_launch, "load_all", load)
    module = build("TensorProduct")
    e3nn_accel.enable(self_check=False)
    then_all_is_well(module, *inputs_of(module), backend=CudaBackend.name)
    assert len(calls) > wanted


@contextlib.contextmanager
def no_threads_left() -> Iterator[None]:
    """Those that compile end by themselves."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()


def test_while_several_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that haven't begun don't begin; what was compiled needn't be again."""
    monkeypatch.setattr(compiling, "_cores", lambda: 2)
    begun, calls = threading.Event(), Compilations()

    def interrupt() -> None:
        if not begun.is_set():
            begun.set()
            _thread.interrupt_main()
        threading.Event().wait(0.05)

    tools = Toolchain(fake_compiler(calls, before=interrupt))
    programs = [axpy(name=f"axpy{n}") for n in range(8)]
    with no_threads_left(), pytest.raises(KeyboardInterrupt):
        tools.build_all(programs, 90)
    done = len(calls)
    assert done < len(programs)
    assert [binary.name for binary in tools.build_all(programs, 90)] == [p.name for p in programs]
    assert len(calls) == len(programs)
