"""Launches that may begin before the last kernel has ended: what the driver is handed, and who hands it."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_driver import devices_of
from test_launch import Driver, driver, kernel

from e3nn_accel import overlapping_launch

pytestmark = pytest.mark.once
__all__ = ["driver"]  # a fixture


class Value(ctypes.Union):
    """Of a CUlaunchAttribute, as cuda.h has it: 64 bytes, of which this attribute's are an int."""

    _fields_ = (("pad", ctypes.c_char * 64), ("allowed", ctypes.c_int))


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: its value begins at the eighth byte."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", Value))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{of}{axis}", ctypes.c_uint) for of in ("grid", "block") for axis in "XYZ"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


class Function:
    """In place of cuLaunchKernelEx: notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.status = 0

    def __call__(self, config: int, kernel: int, arguments: int, extra: int) -> int:
        given = Config.from_address(config)
        before = bytes(given)
        time.sleep(1e-4)  # as the real one, lets other threads run
        assert bytes(given) == before
        attribute = given.attributes[0]
        assert (given.count, attribute.id, attribute.value.allowed) == (1, 6, 1)
        sizes = [getattr(given, name) for name, _ in Config._fields_[:7]]
        self.calls.append((kernel, tuple(sizes), given.stream, arguments, extra))
        return self.status


def test_sizes_of_structures() -> None:
    """Nothing is packed that the driver doesn't have."""
    assert len(overlapping_launch.OVERLAPPING) == ctypes.sizeof(Attribute) == 72
    last = Config.count.offset + Config.count.size
    assert overlapping_launch.CONFIG.size == last <= ctypes.sizeof(Config)


def test_what_the_driver_is_handed() -> None:
    """As it was handed to launchKernel, with the attribute."""
    function = Function()
    launch = overlapping_launch._calling(function, RuntimeError)
    launch(12, 4, 5, 6, 128, 2, 1, 70_000, 2**40, 2**41, 0)
    assert function.calls == [(12, (4, 5, 6, 128, 2, 1, 70_000), 2**40, 2**41, 0)]


def test_a_failure_is_an_error_with_its_number() -> None:
    """By which a full device is known."""
    function = Function()
    function.status = 2

    class Failed(RuntimeError):
        def __init__(self, status: int) -> None:
            self.status = status

    launch = overlapping_launch._calling(function, Failed)
    with pytest.raises(Failed) as failed:
        launch(12, 1, 1, 1, 32, 1, 1, 0, 7, 8, 0)
    assert failed.value.status == 2


def test_each_thread_has_its_own() -> None:
    function = Function()
    launch = overlapping_launch._calling(function, RuntimeError)

    def work(number: int) -> None:
        for _ in range(100):
            launch(number, number, 1, 1, 32, 1, 1, 0, 100 + number, 200 + number, 0)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(function.calls) == 400
    assert set(function.calls) == {
        (n, (n, 1, 1, 32, 1, 1, 0), 100 + n, 200 + n, 0) for n in range(1, 5)
    }


class Library:
    """In place of ctypes.CDLL."""

    def __init__(self, **functions: object) -> None:
        self.functions = functions

    def __call__(self, name: str) -> SimpleNamespace:
        if not self.functions:
            raise OSError(f"no {name}")
        return SimpleNamespace(**self.functions)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., None] | None]:
    """What is found with a driver of that version, and its library."""

    def found(version: int, library: Library) -> Callable[..., None] | None:
        runtime = SimpleNamespace(driverGetVersion=lambda: version)
        cuda = SimpleNamespace(
            driver=SimpleNamespace(CUDADriverError=RuntimeError), runtime=runtime
        )
        monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api", cuda)
        monkeypatch.setattr(overlapping_launch.ctypes, "CDLL", library)
        return overlapping_launch.overlapping_launch.__wrapped__()

    return found


def test_drivers_that_can(machine: Callable[..., Any]) -> None:
    """From CUDA 12.3 on, in whose captures such launches may be; others launch in the usual way."""
    function = Function()
    library = Library(cuLaunchKernelEx=function, other=None)
    assert machine(12020, library) is None
    assert machine(13000, Library(other=None)) is None
    assert machine(13000, Library()) is None
    launch = machine(12030, library)
    launch(1, 1, 1, 1, 32, 1, 1, 0, 7, 8, 0)
    assert len(function.calls) == 1


@pytest.mark.parametrize("can", [True, False])
def test_kernels(driver: Driver, monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    """Those that are asked to, if the driver can; on the kernel's device, with room made for shared memory."""
    function = Function()
    calling = overlapping_launch._calling(function, RuntimeError)
    monkeypatch.setattr(overlapping_launch, "overlapping_launch", lambda: calling if can else None)
    monkeypatch.setattr(torch.cuda, "device", devices_of(driver))
    one = kernel(driver, "q", index=1)
    one((2, 1, 1), (64, 1, 1), 5, shared=60_000, overlapping=True)
    _, address = one.arguments.own
    one.prepared((3, 1, 1), (64, 1, 1), 60_000, overlapping=True)(71, address, 0)
    shapes = [(2, 1, 1, 64, 1, 1, 60_000), (3, 1, 1, 64, 1, 1, 60_000)]
    assert [call[:4] for call in function.calls] == (
        [(1234, shape, 71, address) for shape in shapes] if can else []
    )
    usual = [] if can else [(1234, shape, 71, [5]) for shape in shapes]
    assert driver.launches == usual
    assert driver.attributes == [(1234, 8, 60_000)]
    one((4, 1, 1), (64, 1, 1), 6)
    assert driver.launches == [*usual, (1234, (4, 1, 1, 64, 1, 1, 0), 71, [6])]


def test_a_full_device(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's allocator gives back what it keeps, and the same launch is made again."""
    function = Function()
    function.status = 2

    class Full(RuntimeError):
        status = 2

    def emptied() -> None:
        function.status = 0

    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    calling = overlapping_launch._calling(function, lambda status: Full())
    monkeypatch.setattr(overlapping_launch, "overlapping_launch", lambda: calling)
    kernel(driver, "q")((2, 1, 1), (64, 1, 1), 5, overlapping=True)
    assert (
        len(function.calls) == 3
    )  # the call, with room made, and what asks whether that was needed in between
    assert len(set(function.calls)) == 1
    assert driver.launches == []
