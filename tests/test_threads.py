"""Threads that call one model, from its first call on: stock's numbers for each."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from host_kernels import HostCompiler
from host_launch import LibraryKernel
from small_models import (
    build,
    energy_and_forces,
    inputs_of,
    mace,
    molecules,
    same,
    value_and_gradients,
)
from test_out_of_memory import backends

import e3nn_accel
from e3nn_accel.interception import suspend

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eager_e3nn", "float64")]

THREADS, CALLS = 6, 3


def together(work: Any, arguments: list[Any]) -> list[Any]:
    """Results of a function for each argument, each in a thread of its own, all begun at once."""
    barrier, found = threading.Barrier(len(arguments)), [None] * len(arguments)

    def run(n: int) -> None:
        barrier.wait(60)
        found[n] = [work(arguments[n]) for _ in range(CALLS)]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return found


def check(work: Any, arguments: list[Any]) -> None:
    """Against stock e3nn, one after the other."""
    with suspend():
        expected = [work(argument) for argument in arguments]
    for results, truth in zip(together(work, arguments), expected, strict=True):
        assert results is not None, "a thread ended by an exception"
        for result in results:
            same(result, truth, 1e-9)


@pytest.mark.mace
def test_a_mace() -> None:
    """Energies and forces, each thread with structures of its own."""
    model = mace()
    e3nn_accel.enable()
    check(lambda n: energy_and_forces(model, molecules(n)), list(range(1, THREADS + 1)))
    assert backends() == {"torch"}


@pytest.mark.parametrize("name", ["Linear", "TensorProduct", "FullTensorProduct"])
def test_kernels(kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Planned, loaded and launched by several threads; a kernel on the host has the block to itself."""
    launch, alone = LibraryKernel.launch, threading.Lock()

    def one_at_a_time(*arguments: Any) -> None:
        with alone:
            launch(*arguments)

    monkeypatch.setattr(LibraryKernel, "launch", one_at_a_time)
    module = build(name)
    e3nn_accel.enable()
    check(
        lambda rows: value_and_gradients(module, *inputs_of(module, rows)),
        list(range(1, THREADS + 1)),
    )
    assert backends() == {"cuda"}
