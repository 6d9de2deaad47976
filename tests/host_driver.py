"""A driver whose kernels run on the CPU: what is launched is `e3nn_accel.launch.Kernel` itself, addresses and all."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from host_kernels import HostCompiler, HostProgram
from host_launch import HostError, LibraryKernel

from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config
from e3nn_accel.launch import Kernel


def devices_of(driver: Any) -> Callable[[int], AbstractContextManager[None]]:
    """In place of torch.cuda.device: makes a device the driver's current one, and puts back what was."""

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, driver.device = driver.device, index
        yield
        driver.device = before

    return device


class HostDriver:
    """Launches by the addresses that it is given, and notes them.

    Attributes:
        launches: Names of kernels, with the stream.
        overlapping: Of those that may have begun before the launch in front of them had ended.
        fails: What is asked before each launch, and may raise.
        device: The current one.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[str, int]] = []
        self.overlapping: list[str] = []
        self._last: dict[int, tuple[str, int]] = {}  # of each thread
        self.fails: Callable[[str], None] = lambda name: None
        self.device = 0
        self._kernels: list[LibraryKernel] = []
        self._running = threading.Lock()  # a library has one shared memory

    def kernel(self, kernel: LibraryKernel) -> Kernel:
        """The real thing on device 0, which ends in this library's."""
        self._kernels.append(kernel)
        function = SimpleNamespace(ptr=len(self._kernels) - 1)
        return Kernel(self, function, kernel.parameters, 0)

    def launchKernel(self, function: int, *rest: int) -> None:
        *sizes, shared, stream, arguments, _ = rest
        kernel = self._kernels[function]
        self.fails(kernel.name)
        if 0 in sizes:
            raise HostError(f"{kernel.name}: a launch of nothing, {sizes}")
        time.sleep(1e-4)  # as the real one, lets other threads run before it reads arguments
        grid, block = ((ctypes.c_uint * 3)(*sizes[n : n + 3]) for n in (0, 3))
        with self._running:
            self.launches.append((kernel.name, stream))
            self._last[threading.get_ident()] = kernel.name, stream
            failure = kernel._launch(grid, block, ctypes.c_uint(shared), ctypes.c_void_p(arguments))
        if failure:
            raise HostError(f"{kernel.name}: {failure.decode()}")

    def overlapping_launch(self, function: int, *rest: int) -> None:
        """Of a kernel that waits for one that cuts weights, the last that its thread has launched."""
        name, stream = self._last[threading.get_ident()]
        if name != "halve_weights" or stream != rest[-3]:
            raise HostError(f"a launch that overlaps with {name} of stream {stream}")
        self.launchKernel(function, *rest)
        self.overlapping.append(self._kernels[function].name)

    def funcGetAttribute(self, attribute: int, function: int) -> int:
        return 48 * 1024

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:
        pass


@dataclass
class DrivenCompiler:
    """In place of `launch.load_all`, with kernels of the driver's."""

    host: HostCompiler
    driver: HostDriver = field(default_factory=HostDriver)

    def load_all(
        self, programs: Sequence[KernelProgram], device: torch.device, config: Config
    ) -> tuple[Any, ...]:
        """As `HostCompiler.load_all`."""
        return tuple(map(self._driven, self.host.load_all(programs, device, config)))

    def _driven(self, program: HostProgram) -> SimpleNamespace:
        def kernel(name: str, parameters: str) -> Kernel:
            found = program.kernel(name, parameters)
            assert isinstance(found, LibraryKernel)
            return self.driver.kernel(found)

        return SimpleNamespace(kernel=kernel)
