"""What a launch hands to the driver, seen by a driver that only writes it down."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_programs import Compilations, axpy, fake_compiler

from e3nn_accel import argument_block, hookimpl, launch
from e3nn_accel.compile import KernelProgram, Toolchain
from e3nn_accel.config import Config
from e3nn_accel.hookspecs import Event, KernelSource
from e3nn_accel.launch import Kernel, load_all
from e3nn_accel.nvrtc import CompileError
from e3nn_accel.registry import load

pytestmark = pytest.mark.once

TYPES = {
    "P": ctypes.c_uint64,
    "q": ctypes.c_int64,
    "i": ctypes.c_int32,
    "d": ctypes.c_double,
    "f": ctypes.c_float,
}


class Driver:
    """Notes launches; reads arguments as the real one does, through an array of pointers."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.attributes: list[tuple[int, int, int]] = []
        self.most_shared = 48 * 1024
        self.contexts = 0
        self.parameters = ""
        self.device = 0

    def launchKernel(self, function: int, *rest: int) -> None:
        *shape, stream, arguments, extra = rest
        assert extra == 0
        if shape[-1] > self.most_shared:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        pointers = (ctypes.c_void_p * len(self.parameters)).from_address(arguments)
        values = [
            TYPES[letter].from_address(pointers[n] or 0).value
            for n, letter in enumerate(self.parameters)
        ]
        self.launches.append((function, tuple(shape), stream, values))

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:
        self.attributes.append((function, attribute, value))
        if attribute == launch._MAX_SHARED:
            self.most_shared = value

    def funcGetAttribute(self, attribute: int, function: int) -> int:
        return self.most_shared if attribute == launch._MAX_SHARED else 32


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """In place of CuPy's, on device 0 and torch's stream 7."""
    fake = Driver()

    def for_this_thread() -> Driver:
        fake.contexts += 1
        return fake

    monkeypatch.setattr(argument_block, "driver_for_this_thread", for_this_thread)
    monkeypatch.setattr(launch, "current_stream_function", lambda: lambda index: 70 + index)
    monkeypatch.setattr(launch, "current_device_function", lambda: lambda: fake.device)
    return fake


def kernel(driver: Driver, parameters: str, index: int = 0) -> Kernel:
    """A kernel of that driver."""
    driver.parameters = parameters
    return Kernel(driver, SimpleNamespace(ptr=1234), parameters, index)


def test_arguments_and_shape(driver: Driver) -> None:
    """Tensors as addresses, None as null, numbers as what the letters say, each aligned."""
    x = torch.zeros(3)
    kernel(driver, "iPfqPdi")((4, 5, 6), (128, 2, 1), -7, x, 0.5, 2**40, None, 0.1, 9, shared=16)
    expected = [-7, x.data_ptr(), 0.5, 2**40, 0, 0.1, 9]
    assert driver.launches == [(1234, (4, 5, 6, 128, 2, 1, 16), 70, expected)]


def test_first_arguments_anew(driver: Driver) -> None:
    """Launches that differ in their first arguments alone, on the kernel's device, beside others of it."""
    one = kernel(driver, "qqiqd", index=1)
    again = one.again((2, 1, 1), (64, 1, 1), 2, 3, 2**40, 0.5)
    other = one.again((7, 1, 1), (64, 1, 1), 1, 4, 5, 6, 0.25)
    driver.device = 1
    again(10, -(2**50))
    other(8)
    one((1, 1, 1), (1, 1, 1), 0, 0, 0, 0, 0.0)
    again(11, 12)
    two = (1234, (2, 1, 1, 64, 1, 1, 0), 71)
    assert driver.launches == [
        (*two, [10, -(2**50), 3, 2**40, 0.5]),
        (1234, (7, 1, 1, 64, 1, 1, 0), 71, [8, 4, 5, 6, 0.25]),
        (1234, (1, 1, 1, 1, 1, 1, 0), 71, [0, 0, 0, 0, 0.0]),
        (*two, [11, 12, 3, 2**40, 0.5]),
    ]
    with pytest.raises(struct.error):
        again(1)


def test_no_arguments(driver: Driver) -> None:
    """A kernel may have none."""
    kernel(driver, "")((1, 1, 1), (32, 1, 1))
    assert driver.launches == [(1234, (1, 1, 1, 32, 1, 1, 0), 70, [])]


def test_a_view_starts_where_it_starts(driver: Driver) -> None:
    """The storage's offset is in the address."""
    x = torch.zeros(10, dtype=torch.float64)
    kernel(driver, "P")((1, 1, 1), (1, 1, 1), x[3:])
    assert driver.launches[0][3] == [x.data_ptr() + 24]


def test_an_empty_grid_is_no_launch(driver: Driver) -> None:
    """No nodes, no edges."""
    for grid in ((0, 1, 1), (4, 0, 1)):
        kernel(driver, "P")(grid, (32, 1, 1), torch.zeros(0))
    assert driver.launches == []


@pytest.mark.parametrize(
    "arguments", [(), (torch.zeros(1),), (torch.zeros(1), 1, 1), (1, 1), (torch.zeros(1), 2**31)]
)
def test_wrong_arguments_are_an_error(driver: Driver, arguments: tuple[Any, ...]) -> None:
    """Too few, too many, of a wrong kind or too large; nothing is launched."""
    with pytest.raises((ValueError, struct.error, AttributeError)):
        kernel(driver, "Pi")((1, 1, 1), (1, 1, 1), *arguments)
    assert driver.launches == []


def test_unknown_letters(driver: Driver) -> None:
    """Are no silent misreading."""
    with pytest.raises(ValueError, match="wanted letters"):
        kernel(driver, "Px")


def test_shared_memory_is_allowed_once(driver: Driver) -> None:
    """The attribute is set when a launch needs more than any before."""
    reverse = kernel(driver, "P")
    for shared in (0, 60_000, 50_000, 60_000, 70_000):
        reverse((1, 1, 1), (1, 1, 1), None, shared=shared)
    assert driver.attributes == [(1234, 8, 60_000), (1234, 8, 70_000)]


@pytest.mark.parametrize("sizes", [(20, 16, 20), (60_000, 50_000, 60_000)])
def test_plans_of_one_program_share_its_limit(driver: Driver, sizes: tuple[int, ...]) -> None:
    """Models of more and of fewer species: the second's launch takes nothing from the first's."""
    first, second = kernel(driver, "P"), kernel(driver, "P")
    for one, shared in zip((first, second, first), sizes, strict=True):
        one((1, 1, 1), (1, 1, 1), None, shared=shared)
    assert [shape[-1] for _, shape, *_ in driver.launches] == list(sizes)


def test_each_thread_has_its_arguments(driver: Driver) -> None:
    """And gets a context at its first launch."""
    one = kernel(driver, "qq")

    def work(number: int) -> None:
        for _ in range(200):
            one((1, 1, 1), (1, 1, 1), number, -number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = {tuple(values) for *_, values in driver.launches}
    assert seen == {(n, -n) for n in range(4)}
    assert len(driver.launches) == 800
    assert driver.contexts == 5


def test_another_device_is_made_current(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the launch, with that device's stream, and put back."""
    switched: list[int] = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        switched.append(index)
        driver.device = index
        yield
        driver.device = 0

    monkeypatch.setattr(torch.cuda, "device", device)
    on_second = kernel(driver, "q", index=1)
    on_second((2, 1, 1), (1, 1, 1), 5, shared=8)
    assert switched == [1]
    assert driver.launches == [(1234, (2, 1, 1, 1, 1, 1, 8), 71, [5])]


class Module:
    """In place of cupy.cuda.function.Module."""

    loaded: list[bytes] = []  # noqa: RUF012

    def load(self, image: bytes) -> None:
        Module.loaded.append(image)

    def get_function(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(ptr=len(name), module=self)


@pytest.fixture
def two_devices(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Compilations:
    """Devices of 9.0, a module that loads nothing, and what was compiled."""
    calls = Compilations()
    cupy = SimpleNamespace(Module=Module)
    Module.loaded = []
    monkeypatch.setitem(sys.modules, "cupy.cuda.function", cupy)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(launch, "_loaded", {})
    tools = Toolchain(fake_compiler(calls))
    monkeypatch.setattr(launch, "_toolchain", lambda config: tools)
    return calls


def test_loaded_once_on_each_device(two_devices: Compilations) -> None:
    """Compiled once for all of a kind; a device without a number is the current one."""
    one, two = axpy(name="one"), axpy(name="two")
    first = load_all([one, two, one], torch.device("cuda", 0), Config())
    assert first[0] is first[2]
    assert [loaded.program.name for loaded in first] == ["one", "two", "one"]
    assert load_all([two], torch.device("cuda", 0), Config()) == (first[1],)
    (other,) = load_all([one], torch.device("cuda"), Config())
    assert other is not first[0]
    assert other.index == 1
    assert len(two_devices) == 2
    assert len(Module.loaded) == 3


def test_kernels_of_a_loaded_program(two_devices: Compilations, driver: Driver) -> None:
    """By name, with the parameters that they are said to have."""
    (loaded,) = load_all([axpy()], torch.device("cuda", 0), Config())
    driver.parameters = "PPqf"
    loaded.kernel("axpy", "PPqf")((1, 1, 1), (32, 1, 1), None, None, 3, 0.5)
    assert driver.launches == [(4, (1, 1, 1, 32, 1, 1, 0), 70, [0, 0, 3, 0.5])]
    with pytest.raises(ValueError, match="not 'other'"):
        loaded.kernel("other", "P")


def test_a_plugin_replaces_the_source(
    two_devices: Compilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the programs it chooses, with its own options; and it hears what was compiled, once."""
    heard: list[Event] = []

    class Plugin:
        @hookimpl
        def e3nn_accel_kernel_source(self, program: KernelProgram) -> KernelSource | None:
            return KernelSource("// mine", ("-DMINE",)) if program.name == "two" else None

        @hookimpl
        def e3nn_accel_event(self, event: Event) -> None:
            heard.append(event)

    plugins = load(Config())
    plugins.manager.register(Plugin(), name="mine")
    monkeypatch.setattr(launch, "registry", lambda: plugins)
    for _ in range(2):
        load_all([axpy(name="one"), axpy(name="two")], torch.device("cuda", 0), Config())
    compiled = {"// mine" in source: (source, options) for source, _, options, _ in two_devices}
    (source, options), (other, other_options) = compiled[True], compiled[False]
    assert source.endswith("// mine")
    assert "-DMINE" in options
    assert "axpy" in other
    assert "-DMINE" not in other_options
    assert [(e.kind, e.subject, e.detail) for e in heard] == [
        ("compiled", "one", "sm_90"),
        ("compiled", "two", "sm_90"),
    ]


def test_what_does_not_compile_is_not_loaded(
    two_devices: Compilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is tried again by the next call."""

    def refuse(config: Config) -> Toolchain:
        raise CompileError("no")

    monkeypatch.setattr(launch, "_toolchain", refuse)
    with pytest.raises(CompileError):
        load_all([axpy()], torch.device("cuda", 0), Config())
    assert Module.loaded == []
