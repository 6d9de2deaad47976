"""Launches of kernels that may begin before the end of the last one in their stream (programmatic dependent launch).

Such a kernel waits for that end itself, when it needs it (kernels/overlapping.cuh): until then it does what it can, and
the device doesn't stand still between two kernels. CuPy has no call for it, so this one is the driver's own.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

LEAST_DRIVER = 12030
"""Whose streams can be captured with such launches in them: of CUDA 12.3."""
OVERLAPPING = struct.pack("@i4xi60x", 6, 1)
"""A CUlaunchAttribute, number and value: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed."""
CONFIG = struct.Struct("@7IPPI")
"""CUlaunchConfig: grid, block, bytes of shared memory, stream, attributes and how many."""


class _Config(threading.local):
    """Of a thread: the driver reads it within its call, during which other threads of Python run.

    Attributes:
        own: What packs it, and its address.
        attribute: Address of the one attribute.
    """

    def __init__(self) -> None:
        self._attribute = ctypes.create_string_buffer(OVERLAPPING, len(OVERLAPPING))
        self._config = ctypes.create_string_buffer(CONFIG.size)
        self.attribute = ctypes.addressof(self._attribute)
        pack: Callable[..., None] = functools.partial(CONFIG.pack_into, self._config, 0)
        self.own = pack, ctypes.addressof(self._config)


@functools.cache
def overlapping_launch() -> Callable[..., None] | None:
    """As ``launchKernel`` of CuPy's driver module, of such kernels; None: this driver can't."""
    from cupy_backends.cuda.api import driver, runtime

    if runtime.driverGetVersion() < LEAST_DRIVER:
        return None
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        function = library.cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    return _calling(function, driver.CUDADriverError)


def _calling(function: Any, error: Callable[[int], Exception]) -> Callable[..., None]:
    """What calls the driver's function, and raises such an error."""
    function.argtypes = [ctypes.c_void_p] * 4
    configs = _Config()

    def launch(
        kernel: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int,
        stream: int, arguments: int, extra: int,
    ) -> None:  # fmt: skip
        pack, config = configs.own
        pack(gx, gy, gz, bx, by, bz, shared, stream, configs.attribute, 1)
        status = function(config, kernel, arguments, extra)
        if status:
            raise error(status)

    return launch
