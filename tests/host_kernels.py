"""The kernels on the CPU: the same sources compiled by g++, called as `e3nn_accel.launch.Kernel` is.

`HostCompiler.load_all` stands in for `e3nn_accel.launch.load_all`; the fixture `kernels_on_host` puts it
there, so that the whole cuda backend runs on CPU tensors. What CUDA C++ means here is in tests/host.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from host_launch import HostError, HostKernel, LibraryKernel, SanitizedKernel

from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config

SHIM = Path(__file__).parent / "host"
FLAGS = (
    "-std=c++20",
    "-pthread",
    "-w",  # about pragmas and unused variables; warnings about CUDA C++ are NVRTC's to give
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fno-gnu-unique",  # libraries of two programs share no variable
    "-U_FORTIFY_SOURCE",  # its longjmp takes fibers for a mistake
)
SANITIZERS = {"thread": ("-fsanitize=thread",), "address": ("-fsanitize=address,undefined",)}

_precompiling = threading.Lock()
_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:__align__\(\s*\d+\s*\)\s*)?([\w ]+?)\s+(\w+)\s*\[\s*\]\s*;"
)


def race_shown() -> AbstractContextManager[object]:
    """Around kernels that lack a barrier: ThreadSanitizer says so, or an index that isn't written yet kills them.

    Or results are wrong: now and then threads run so that it has no two accesses left to compare. Or they miss a turn,
    or wait for one another for good, where they don't agree on how often to meet.
    """
    shows = r"data race|ThreadSanitizer: SEGV|error (nan|inf|\d)|waits for a turn|timed out"
    return pytest.raises((HostError, AssertionError, subprocess.TimeoutExpired), match=shows)


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def host_source(program: KernelProgram, header: Path, executable: bool) -> str:
    """What g++ compiles: the program's own text between the shim's header and a way in."""
    macros = [macro.partition("=") for macro in program.macros]
    lines = [f'#include "{header}"']  # first, or what is precompiled of it isn't taken
    lines += [f"#define {name} {value or 1}" for name, _, value in macros]
    lines += [f'#line 1 "{program.file}"', _with_dynamic_shared_memory(program.source())]
    lines += [f"HOST_ENTRY({entry})" for entry in program.entries]
    if executable:
        table = ", ".join(f'{{"{entry}", launch_{entry}}}' for entry in program.entries)
        lines.append(f'#include "{SHIM / "main.h"}"')
        run = f"host::run({{{table}}}, given[1], given[2])"
        lines.append(f"int main(int, char** given) {{ return {run}; }}")
    return "\n".join(lines) + "\n"


def _with_dynamic_shared_memory(source: str) -> str:
    """An array without a size becomes a pointer to the buffer, on the same line."""
    return _DYNAMIC.sub(r"\1* const \2 = (\1*)host::dynamic_shared;", source)


@dataclass
class HostCompiler:
    """Compiles into a folder, where equal programs are compiled once.

    Attributes:
        folder: May be shared by processes.
        sanitizer: "thread" or "address": launches run in a process of their own, on real threads,
            and what the sanitizer finds is a `HostError`; empty: as fibers in this process.
        change: Makes another program of each, to see what the tests say to it.
    """

    folder: Path
    sanitizer: str = ""
    change: Callable[[KernelProgram], KernelProgram] = field(default=lambda program: program)

    def load_all(
        self, programs: Sequence[KernelProgram], device: torch.device, config: Config
    ) -> tuple[HostProgram, ...]:
        """In place of `e3nn_accel.launch.load_all`.

        Raises:
            HostError: g++ can't compile one of them.
        """
        assert device.type == "cpu"
        programs = [self.change(program) for program in programs]
        with ThreadPoolExecutor(2) as pool:
            paths = pool.map(self._build, programs)
            return tuple(
                HostProgram(program, path, self.sanitizer)
                for program, path in zip(programs, paths, strict=True)
            )

    def _build(self, program: KernelProgram) -> Path:
        command = compiler()
        assert command is not None, "the test should have been skipped"
        flags = [*FLAGS, *SANITIZERS.get(self.sanitizer, ())]
        flags += ["-g", "-O1"] if self.sanitizer else ["-O1", "-shared", "-fPIC"]
        source = host_source(program, self._header(command, flags), bool(self.sanitizer))
        digest = _digest(command, *flags, source)
        built = self.folder / f"{digest}.{'run' if self.sanitizer else 'so'}"
        if not built.exists():
            part = built.with_suffix(f".{os.getpid()}")
            text = part.with_suffix(f"{part.suffix}.cpp")
            text.write_text(source)
            found = subprocess.run(
                [command, *flags, str(text), "-o", str(part)], capture_output=True, text=True
            )
            if found.returncode:
                raise HostError(f"{program.name} doesn't compile:\n{found.stderr[:4000]}")
            part.replace(built)
        return built

    def _header(self, command: str, flags: Sequence[str]) -> Path:
        """The shim's, precompiled beside it: reading the standard library takes as long as most kernels do.

        A compiler that makes nothing of that reads it.
        """
        shim = [path.read_text() for path in sorted(SHIM.glob("*.h"))]
        header = self.folder / f"{_digest(command, *flags, *shim)}.h"
        with _precompiling:
            if not header.exists():
                part = header.with_suffix(f".{os.getpid()}.h")
                part.write_text(f'#include "{SHIM / "cuda_on_host.h"}"\n')
                precompiled = part.with_suffix(".gch")
                build = [command, *flags, "-x", "c++-header", str(part), "-o", str(precompiled)]
                if not subprocess.run(build, capture_output=True).returncode:
                    precompiled.replace(f"{header}.gch")
                part.replace(header)
        return header


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class HostProgram:
    """In place of `e3nn_accel.launch.LoadedProgram`."""

    program: KernelProgram
    path: Path
    sanitizer: str

    def kernel(self, name: str, parameters: str) -> HostKernel:
        """One of its kernels; the letters are held against its declaration.

        Raises:
            HostError: The letters aren't those of its parameters.
            ValueError: The program has no such kernel.
        """
        if name not in self.program.entries:
            raise ValueError(f"{self.program.name} has {self.program.entries}, not {name!r}")
        if self.sanitizer:
            return SanitizedKernel(name, parameters, self.path)
        return LibraryKernel(name, parameters, self.path)
