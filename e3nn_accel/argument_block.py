"""The arguments of a kernel in memory that stays, as the driver wants them: an array of pointers to the values.

The driver reads them within its call, during which other threads of Python run. So each thread has a block of its own.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable
from typing import Any


class ArgumentBlock(threading.local):
    """Of one kernel.

    Each thread has its own (the engine of torch's autograd runs in threads), made at its first
    launch, which is also where the thread gets its context.

    Attributes:
        own: What packs values into the thread's block, and the block's address.
    """

    def __init__(self, parameters: str) -> None:
        layout = struct.Struct(f"@{parameters}")  # native alignment, as in a C struct
        sizes = [struct.calcsize(letter) for letter in parameters]
        ends = [struct.calcsize(f"@{parameters[: n + 1]}") for n in range(len(parameters))]
        values = ctypes.create_string_buffer(max(layout.size, 1))
        start = ctypes.addressof(values)
        pointers = [start + end - size for end, size in zip(ends, sizes, strict=True)]
        self._values = values
        self._pointers = (ctypes.c_void_p * max(len(pointers), 1))(*pointers)
        pack: Callable[..., None] = functools.partial(layout.pack_into, values, 0)
        self.own = pack, ctypes.addressof(self._pointers)
        driver_for_this_thread()


class ReadyBlock(ArgumentBlock):
    """Of which only the first arguments are packed anew."""

    def __init__(self, parameters: str, most: int, rest: tuple[int | float, ...]) -> None:
        super().__init__(parameters)
        pack, address = self.own
        pack(*[0] * most, *rest)
        first = struct.Struct(f"@{parameters[:most]}")
        self.own = functools.partial(first.pack_into, self._values, 0), address


def driver_for_this_thread() -> Any:
    """CuPy's driver module, with a context for this thread, which may not have used CUDA yet."""
    from cupy_backends.cuda.api import driver, runtime

    if driver.ctxGetCurrent() == 0:
        runtime.memGetInfo()  # any call of the run-time library makes the device's context current
    return driver
