"""Whether kernels can be compiled and launched here, and if not, why: one reason for each cause."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from typing import Any

import torch

from e3nn_accel.compat import CUPY
from e3nn_accel.plan import Availability

log = logging.getLogger(__name__)

_INSTALL = "pip install 'e3nn_accel[cuda{}]'"

NEEDED = {
    "cupy_backends.cuda.api.driver": (
        "launchKernel",
        "ctxGetCurrent",
        "funcSetAttribute",
        "funcGetAttribute",
    ),
    "cupy_backends.cuda.api.runtime": ("memGetInfo", "driverGetVersion", "runtimeGetVersion"),
    "cupy_backends.cuda.libs.nvrtc": ("compileProgram", "getCUBIN", "getPTX", "getProgramLog"),
    "cupy.cuda.function": ("Module",),
}
"""What is used of CuPy."""


@functools.cache
def cuda_availability() -> Availability:
    """Whether kernels run in this process; asked once, and nothing is imported before it is asked.

    Never raises: an installation that is broken in any way is a reason.
    """
    try:
        reason = _torch() or _cupy()
    except Exception as error:
        log.debug("asking for CUDA failed", exc_info=True)
        reason = f"asking for CUDA failed: {_first_line(error)}"
    return Availability(not reason, reason)


def _torch() -> str:
    if getattr(torch.version, "hip", None):
        return "torch is built for ROCm, the kernels are CUDA"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:  # torch warns of old drivers and the like
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    said = "; ".join(_first_line(str(warning.message)) for warning in caught)
    return f"torch finds no CUDA device or driver{': ' if said else ''}{said}"


def _cupy() -> str:
    install = _INSTALL.format(_major(torch.version.cuda))
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return f"CuPy is not installed: {install}"
        return f"CuPy is installed but broken: {_first_line(error)}"
    except Exception as error:
        return f"CuPy is installed but broken: {_first_line(error)}"
    version = getattr(cupy, "__version__", "?")
    for name, functions in NEEDED.items():
        try:
            module = importlib.import_module(name)
        except Exception as error:
            return f"CuPy {version} is broken, {name}: {_first_line(error)}"
        missing = [function for function in functions if not hasattr(module, function)]
        if missing:
            return f"CuPy {version} has no {name}.{missing[0]}; versions {CUPY} have it"
    return _cuda(cupy.cuda.runtime) or _nvrtc(install)


def _cuda(runtime: Any) -> str:
    """CuPy's CUDA beside the driver's and torch's.

    Another major version than torch's does no harm by itself: both use the same driver, which has
    one context a device and one kind of stream. It fails where the driver is older than CuPy's.
    """
    if runtime.is_hip:
        return "CuPy is built for ROCm, torch for CUDA"
    ours, driver = runtime.runtimeGetVersion(), runtime.driverGetVersion()
    if ours // 1000 > driver // 1000:
        fitting = _INSTALL.format(driver // 1000)
        return (
            f"CuPy is built for CUDA {ours // 1000}, the driver supports CUDA {_dotted(driver)}: "
            f"uninstall CuPy, then {fitting}"
        )
    try:
        devices = runtime.getDeviceCount()
    except Exception as error:
        return f"CuPy finds no CUDA device: {_first_line(error)}"
    if devices == 0:
        return "CuPy finds no CUDA device"
    if _major(torch.version.cuda) != ours // 1000:
        log.info("CuPy is built for CUDA %s, torch for %s", _dotted(ours), torch.version.cuda)
    return ""


def _nvrtc(install: str) -> str:
    nvrtc: Any = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
    try:
        nvrtc.getVersion()
    except Exception as error:
        return f"NVRTC, the compiler that CuPy uses, is missing ({_first_line(error)}): {install}"
    return ""


def _major(version: str | None) -> int:
    return int((version or "13").partition(".")[0])


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _first_line(error: object) -> str:
    lines = [line for line in str(error).splitlines() if line.strip(" =")]
    text = lines[0].strip() if lines else "no message"
    return f"{type(error).__name__}: {text}" if isinstance(error, BaseException) else text


def architecture_of(device: torch.device) -> int:
    """Compute capability of a CUDA device, as 90 for 9.0; 0 of any other device, or without a driver."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
