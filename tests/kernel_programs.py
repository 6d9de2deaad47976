"""A small program for the tests of the runtime, and a compiler that compiles nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from e3nn_accel.compile import KernelProgram
from e3nn_accel.nvrtc import Compiler, Output

ENTRIES = ("axpy", "arguments", "reverse")

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'axpy' for 'sm_90'
ptxas info    : Function properties for axpy
ptxas         .     128 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 2.271 ms
"""


def axpy(**changes: Any) -> KernelProgram:
    """tests/kernel_files/axpy.cu, in float with FACTOR 2 unless changed."""
    settings: dict[str, Any] = {
        "name": "axpy",
        "file": "axpy.cu",
        "entries": ENTRIES,
        "header": "constexpr int FACTOR = 2;\n",
        "macros": ("REAL=float",),
        "description": "y + 2 a x",
        "package": "kernel_files",
    }
    return KernelProgram(**settings | changes)


class Compilations(list[tuple[str, str, tuple[str, ...], str]]):
    """What a fake compiler was given: source, file name, options, target."""


def fake_compiler(
    calls: Compilations,
    before: Callable[[], object] = lambda: None,
    version: str = "99.0",
    architectures: Sequence[int] = (75, 90),
) -> Compiler:
    """Notes what it is given; its machine code is a function of the source."""

    def run(source: str, name: str, options: Sequence[str], target: str) -> Output:
        calls.append((source, name, tuple(options), target))
        before()
        return Output(f"code of {len(source)} characters\0\n".encode() * 50, LOG)

    return Compiler(version, tuple(architectures), run)
