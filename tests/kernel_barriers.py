"""Kernel files with one barrier left out, to see that tests of races find it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from e3nn_accel.compile import KernelProgram

BARRIER = r"__syncthreads\(\);"


def barriers(file: str, pattern: str = BARRIER) -> range:
    """Numbers of the barriers of a file and of the headers that it includes."""
    return range(len(re.findall(pattern, KernelProgram(file, file, ()).source())))


def without(
    file: str, barrier: int, pattern: str = BARRIER
) -> Callable[[KernelProgram], KernelProgram]:
    """Leaves out one barrier, a statement that the pattern finds, of a kernel file's programs."""

    def change(program: KernelProgram) -> KernelProgram:
        if program.file != file:
            return program
        source = program.source()
        found = list(re.finditer(pattern, source))[barrier]
        return replace(program, code=f"{source[: found.start()]};{source[found.end() :]}")

    return change
