"""Processes forked from one that has used us: they get stock's numbers, and wait for nobody."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import build, inputs_of, same, value_and_gradients

import e3nn_accel
from e3nn_accel import selfcheck
from e3nn_accel.backends.torch import TorchBackend
from e3nn_accel.forks import ForkSafeLock
from e3nn_accel.interception import suspend

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
PATIENCE = 60.0


def in_child(work: Callable[[], None]) -> None:
    """Run in a forked process; what goes wrong there goes wrong here."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert status == 0, f"the child ended with status {status}"
            return
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child waits for what it will never get")


def agrees(name: str, backend: str = "torch") -> None:
    """A module without gradients, as a data loader's worker would call it."""
    module = build(name)
    inputs = inputs_of(module)
    with torch.no_grad():
        with suspend():
            expected = module(*inputs)
        same(module(*inputs), expected)
    rows = [row for row in e3nn_accel.report().rows if row.cls == type(module).__name__]
    assert backend in {row.backend for row in rows}, e3nn_accel.report()


@pytest.mark.parametrize("name", ["Linear", "TensorProduct"])
def test_a_child(name: str) -> None:
    """Goes on with the plans of its parent, and makes its own."""
    module = build("Linear")
    e3nn_accel.enable()
    value_and_gradients(module, *inputs_of(module))
    in_child(lambda: agrees(name))


def test_a_child_may_switch() -> None:
    """And its parent doesn't notice."""
    e3nn_accel.enable()

    def work() -> None:
        e3nn_accel.disable()
        assert not e3nn_accel.is_enabled()
        e3nn_accel.enable()
        agrees("Linear")

    in_child(work)
    assert e3nn_accel.is_enabled()


@pytest.mark.parametrize("name", ["Linear", "TensorProduct"], ids=["the same", "another"])
def test_forked_while_another_thread_plans(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The plan it is making is not there in the child, which makes its own."""
    plan = TorchBackend.plan
    planning, enough, parent = threading.Event(), threading.Event(), os.getpid()

    def slow(backend: TorchBackend, *arguments: Any) -> Any:
        if os.getpid() == parent:
            planning.set()
            assert enough.wait(PATIENCE)
        return plan(backend, *arguments)

    monkeypatch.setattr(TorchBackend, "plan", slow)
    module = build("Linear")
    inputs = inputs_of(module)
    e3nn_accel.enable()
    thread = threading.Thread(target=module, args=inputs)
    thread.start()
    try:
        assert planning.wait(PATIENCE)
        in_child(lambda: agrees(name))
    finally:
        enough.set()
        thread.join()


def test_forked_while_another_thread_switches() -> None:
    """Which holds the lock that switching on and off takes."""
    from e3nn_accel import switch

    holds, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with switch._lock:
            holds.set()
            assert enough.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert holds.wait(PATIENCE)

        def work() -> None:
            e3nn_accel.enable()
            agrees("Linear")

        in_child(work)
    finally:
        enough.set()
        thread.join()


def test_a_lock_of_the_forking_thread_stays_its_own() -> None:
    """It is in the middle of something, in the child too."""
    lock = ForkSafeLock()

    def work() -> None:
        taken = threading.Event()

        def other() -> None:
            with lock:
                taken.set()

        waiting = threading.Thread(target=other, daemon=True)
        waiting.start()
        assert not taken.wait(0.2)

    with lock:
        in_child(work)


def test_without_autograd(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch refuses backward passes in children forked after CUDA was used: stock e3nn runs, and nothing is said."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unable to handle autograd's threading in combination with fork")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    e3nn_accel.enable()
    agrees("Linear", "e3nn")
    (row,) = e3nn_accel.report().rows
    assert selfcheck.SKIPPED in row.detail
    assert "autograd's threading" in row.detail
    assert capfd.readouterr().err == ""
