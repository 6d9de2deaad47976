"""Kernels on a device: loaded once, launched on torch's current stream with little Python.

A launch is one call of the driver. The arguments are packed into a block of memory that stays, one
for each thread and kernel, and the stream is passed as the number that torch has for it, where a
launch by CuPy makes an object for each argument and needs one for the stream. Nothing is allocated,
nothing waits for the device, and a launch can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from e3nn_accel import argument_block, overlapping_launch
from e3nn_accel.argument_block import ArgumentBlock, ReadyBlock
from e3nn_accel.compat import (
    current_device_function,
    current_stream_function,
)
from e3nn_accel.compile import KernelProgram, Toolchain
from e3nn_accel.config import Config
from e3nn_accel.device_memory import is_full, with_memory
from e3nn_accel.forks import ForkSafeLock
from e3nn_accel.health import registry
from e3nn_accel.hookspecs import Event
from e3nn_accel.kernel_cache import Binary

Argument = torch.Tensor | int | float | None
Dimensions = tuple[int, int, int]

COPY_BYTES = 16
"""Of the largest copy to shared memory, and what bulk copies are multiples of; where one may begin is aligned to it."""
_REGISTERS, _MAX_SHARED = 4, 8  # CUfunction_attribute

_lock = ForkSafeLock()
_loaded: dict[tuple[KernelProgram, int], LoadedProgram] = {}


def load_all(
    programs: Sequence[KernelProgram], device: torch.device, config: Config
) -> tuple[LoadedProgram, ...]:
    """Compile programs, in parallel, where they weren't yet, and load them on a device.

    Not to be called while a CUDA graph is being captured: loading allocates.

    Args:
        programs: What to load.
        device: A CUDA device.
        config: Says where compiled kernels are kept and dumped.

    Raises:
        CompileError: NVRTC can't compile one of them.
        torch.cuda.OutOfMemoryError: The device has no room for one of them.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    programs = [as_plugins_have_it(program) for program in programs]
    missing = [p for p in dict.fromkeys(programs) if (p, index) not in _loaded]
    if missing:
        major, minor = torch.cuda.get_device_capability(index)
        binaries = _toolchain(config).build_all(missing, 10 * major + minor)
        for program, binary in zip(missing, binaries, strict=True):
            with _lock:
                if (program, index) not in _loaded:
                    _loaded[program, index] = LoadedProgram(program, binary, index)
            registry().event(Event("compiled", program.name, binary.target))
    return tuple(_loaded[program, index] for program in programs)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; 1 of what stands in for one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def aligned(t: torch.Tensor) -> torch.Tensor:
    """As it is, or a copy where it begins in the middle of what a kernel copies at once."""
    return t if t.data_ptr() % COPY_BYTES == 0 else t.clone()


def as_plugins_have_it(program: KernelProgram) -> KernelProgram:
    """The program with the source that a plugin puts in place of its file, if one does."""
    source = registry().kernel_source(program)
    if source is None:
        return program
    return replace(program, code=source.code, options=(*program.options, *source.options))


@functools.cache
def _toolchain(config: Config) -> Toolchain:
    from e3nn_accel.nvrtc import cupy_compiler

    return Toolchain.of(config, cupy_compiler())


class LoadedProgram:
    """A compiled program on one device."""

    def __init__(self, program: KernelProgram, binary: Binary, index: int) -> None:
        from cupy.cuda.function import Module

        self.program, self.binary, self.index = program, binary, index
        self._module = Module()
        with torch.cuda.device(index):
            argument_block.driver_for_this_thread()
            with_memory(lambda: self._module.load(binary.image), index)

    def kernel(self, name: str, parameters: str) -> Kernel:
        """One of its kernels.

        Args:
            name: Its ``extern "C"`` name.
            parameters: A letter for each of its parameters, in order: P a pointer, given as a
                tensor or None; q an int64, i an int32; d a double, f a float.

        Raises:
            ValueError: The program has no such kernel, or a letter is none of these.
        """
        if name not in self.program.entries:
            raise ValueError(f"{self.program.name} has {self.program.entries}, not {name!r}")
        with torch.cuda.device(self.index):
            driver = argument_block.driver_for_this_thread()
            function = with_memory(lambda: self._module.get_function(name), self.index)
            # A driver that loads lazily does it now and not within a launch that is being captured.
            with_memory(lambda: driver.funcGetAttribute(_REGISTERS, function.ptr), self.index)
        return Kernel(driver, function, parameters, self.index)


class Kernel:
    """A kernel on one device, to be called like a function.

    Attributes:
        parameters: The letters that `LoadedProgram.kernel` was given.
        index: Of the device.
        arguments: Where they are packed for a launch.
        current_device, stream_of: The current device's index, and the address of a device's current stream.
    """

    def __init__(self, driver: Any, function: Any, parameters: str, index: int) -> None:
        if not set(parameters) <= set("Pqidf"):
            raise ValueError(f"parameters {parameters!r}: wanted letters of P, q, i, d, f")
        self.parameters, self.index = parameters, index
        self._driver = driver
        self._owner = function  # keeps the module loaded
        self._function: int = function.ptr
        self._launch: Callable[..., None] = driver.launchKernel
        self._count = len(parameters)
        self._pointers = tuple(n for n, letter in enumerate(parameters) if letter == "P")
        self.arguments = ArgumentBlock(parameters)
        self._shared_limit = 0
        self.stream_of = current_stream_function()
        self.current_device = current_device_function()

    def __call__(
        self,
        grid: Dimensions,
        block: Dimensions,
        *arguments: Argument,
        shared: int = 0,
        overlapping: bool = False,
    ) -> None:
        """Launch on torch's current stream of the device; a grid of nothing is no launch.

        The caller answers for tensors on this device, of the dtypes that the kernel reads.

        Args:
            grid: Blocks, in x, y and z.
            block: Threads of a block, likewise.
            *arguments: One for each parameter.
            shared: Bytes of dynamic shared memory of a block.
            overlapping: Whether it may begin before the stream's last kernel has ended, for which it waits itself.
                Everything that it reads sooner must have been there when that one began.

        Raises:
            torch.cuda.OutOfMemoryError: The device has no room for the launch.
        """
        if 0 in grid:
            return
        if self.current_device() != self.index:
            with torch.cuda.device(self.index):
                self(grid, block, *arguments, shared=shared, overlapping=overlapping)
            return
        if shared > self._shared_limit:
            self._make_room(shared)
        values: list[Any] = [*arguments]
        if len(values) != self._count:
            raise ValueError(f"{len(values)} arguments for parameters {self.parameters!r}")
        for n in self._pointers:
            tensor = values[n]
            values[n] = 0 if tensor is None else tensor.data_ptr()
        pack, address = self.arguments.own
        pack(*values)
        gx, gy, gz = grid
        bx, by, bz = block
        stream = self.stream_of(self.index)
        launch = self._overlapping() if overlapping else self._launch
        try:
            launch(self._function, gx, gy, gz, bx, by, bz, shared, stream, address, 0)
        except Exception as error:
            again = self.prepared(grid, block, shared, overlapping)
            self.with_room_made(error, again, stream, address)

    def prepared(
        self, grid: Dimensions, block: Dimensions, shared: int = 0, overlapping: bool = False
    ) -> Callable[[int, int, int], None]:
        """A launch but for what changes: given the stream, the address of packed arguments, and 0.

        Of kernels that are launched together on one device, with one look at it and at the stream.

        Args:
            grid: Blocks, in x, y and z: some.
            block: Threads of a block, likewise.
            shared: Bytes of dynamic shared memory of a block.
            overlapping: As of a call.
        """
        if shared > self._shared_limit:
            if self.current_device() != self.index:
                with torch.cuda.device(self.index):
                    return self.prepared(grid, block, shared, overlapping)
            self._make_room(shared)
        launch = self._overlapping() if overlapping else self._launch
        return functools.partial(launch, self._function, *grid, *block, shared)

    def again(
        self, grid: Dimensions, block: Dimensions, most: int, *rest: int | float
    ) -> Callable[..., None]:
        """The same launch again and again, but for its first arguments: all others are packed once.

        Args:
            grid: Blocks, in x, y and z: some.
            block: Threads of a block, likewise.
            most: How many arguments come first; with each launch, as numbers.
            *rest: The others, likewise.
        """
        ready = ReadyBlock(self.parameters, most, rest)

        def launch(*first: int | float) -> None:
            if self.current_device() != self.index:
                with torch.cuda.device(self.index):
                    launch(*first)
                return
            pack, address = ready.own
            pack(*first)
            stream = self.stream_of(self.index)
            try:
                self._launch(self._function, *grid, *block, 0, stream, address, 0)
            except Exception as error:
                self.with_room_made(error, self.prepared(grid, block), stream, address)

        return launch

    def with_room_made(
        self, error: Exception, launch: Callable[[int, int, int], None], stream: int, address: int
    ) -> None:
        """A launch that failed for want of memory, again; any other error is raised."""
        if not is_full(error):
            raise error
        with_memory(lambda: launch(stream, address, 0), self.index)

    def _overlapping(self) -> Callable[..., None]:
        """What launches so, or else in the usual way."""
        return overlapping_launch.overlapping_launch() or self._launch

    def _make_room(self, shared: int) -> None:
        """Raise the limit of dynamic shared memory; never lower it, for plans of one program have one function."""
        with _lock:
            limit = self._driver.funcGetAttribute(_MAX_SHARED, self._function)
            if shared > limit:
                self._driver.funcSetAttribute(self._function, _MAX_SHARED, shared)
        self._shared_limit = max(shared, limit)
