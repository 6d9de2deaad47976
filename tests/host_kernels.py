"""The kernels on the CPU: the same sources compiled by g++, called as `e3nn_accel.launch.Kernel` is.

`HostCompiler.load_all` stands in for `e3nn_accel.launch.load_all`; the fixture `kernels_on_host` puts it
there, so that the whole cuda backend runs on CPU tensors. What CUDA C++ means here is in tests/host.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config
from e3nn_accel.launch import Argument, Dimensions

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
LETTERS = {
    torch.float32: "f",
    torch.float64: "d",
    torch.int32: "i",
    torch.int64: "q",
    torch.uint8: "b",
    torch.int8: "b",
    torch.bool: "b",
}
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
NULL_POINTER = 2**64 - 1

_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:__align__\(\s*\d+\s*\)\s*)?([\w ]+?)\s+(\w+)\s*\[\s*\]\s*;"
)


class HostError(RuntimeError):
    """A kernel that g++ doesn't compile, or that did what no kernel may do."""


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def host_source(program: KernelProgram, executable: bool) -> str:
    """What g++ compiles: the program's own text between the shim and a way in."""
    macros = [macro.partition("=") for macro in program.macros]
    lines = [f'#include "{SHIM / "cuda_on_host.h"}"']
    lines += [f"#define {name} {value or 1}" for name, _, value in macros]
    lines += [f'#line 1 "{program.file}"', _with_dynamic_shared_memory(program.source())]
    lines += [f"HOST_ENTRY({entry})" for entry in program.entries]
    if executable:
        table = ", ".join(f'{{"{entry}", launch_{entry}}}' for entry in program.entries)
        lines.append(f'#include "{SHIM / "main.h"}"')
        lines.append(f"int main(int, char** given) {{ return host::run({{{table}}}, given[1], given[2]); }}")  # fmt: skip
    return "\n".join(lines) + "\n"


def _with_dynamic_shared_memory(source: str) -> str:
    """An array without a size becomes a pointer to the buffer, on the same line."""
    return _DYNAMIC.sub(r"\1* const \2 = (\1*)host::dynamic_shared;", source)


@dataclass(frozen=True)
class HostCompiler:
    """Compiles into a folder, where equal programs are compiled once.

    Attributes:
        folder: May be shared by processes.
        sanitizer: "thread" or "address": launches run in a process of their own, on real threads,
            and what the sanitizer finds is a `HostError`; empty: as fibers in this process.
    """

    folder: Path
    sanitizer: str = ""

    def load_all(
        self, programs: Sequence[KernelProgram], device: torch.device, config: Config
    ) -> tuple[HostProgram, ...]:
        """In place of `e3nn_accel.launch.load_all`.

        Raises:
            HostError: g++ can't compile one of them.
        """
        assert device.type == "cpu"
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
        source = host_source(program, executable=bool(self.sanitizer))
        shim = [path.read_text() for path in sorted(SHIM.glob("*.h"))]
        parts = (command, *flags, source, *shim)
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        built = self.folder / f"{digest}.{'run' if self.sanitizer else 'so'}"
        if not built.exists():
            text, part = built.with_suffix(f".{os.getpid()}.cpp"), built.with_suffix(f".{os.getpid()}")  # fmt: skip
            text.write_text(source)
            found = subprocess.run(
                [command, *flags, str(text), "-o", str(part)], capture_output=True, text=True
            )
            if found.returncode:
                raise HostError(f"{program.name} doesn't compile:\n{found.stderr[:4000]}")
            part.replace(built)
        return built


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


class HostKernel:
    """Checks what the real thing takes on trust: devices, dtypes, memory layout, limits of a grid."""

    pointees = ""
    """A letter for each parameter: what a pointer points to, blank for values; empty: not known."""

    def __init__(self, name: str, parameters: str, path: Path) -> None:
        self.name, self.parameters, self.path = name, parameters, path

    def __call__(
        self, grid: Dimensions, block: Dimensions, *arguments: Argument, shared: int = 0
    ) -> None:
        """Launch, and wait for the end.

        Raises:
            HostError: An argument isn't what the kernel reads, or the kernel failed.
        """
        if any(n > most for n, most in zip(grid, MOST_BLOCKS, strict=True)):
            raise HostError(f"{self.name}: a grid of {grid} is more than CUDA allows")
        pointees = self.pointees or "?" * len(self.parameters)
        for n, (argument, letter, pointee) in enumerate(
            zip(arguments, self.parameters, pointees, strict=True)
        ):
            if (letter == "P") != (argument is None or isinstance(argument, torch.Tensor)):
                raise HostError(f"{self.name}: argument {n} is {argument!r}, wanted {letter}")
            if isinstance(argument, torch.Tensor):
                self._check(argument, pointee, n)
        if 0 not in grid:
            self.launch(grid, block, arguments, shared)

    def _check(self, tensor: torch.Tensor, pointee: str, n: int) -> None:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise HostError(f"{self.name}: argument {n} is not contiguous on the CPU")
        if pointee not in ("?", LETTERS.get(tensor.dtype)):
            raise HostError(f"{self.name}: argument {n} is {tensor.dtype}, wanted {pointee}")

    def launch(
        self, grid: Dimensions, block: Dimensions, arguments: Sequence[Argument], shared: int
    ) -> None:
        """Run the kernel on arguments that were checked."""
        raise NotImplementedError


class LibraryKernel(HostKernel):
    """A kernel as a function of a library in this process."""

    def __init__(self, name: str, parameters: str, path: Path) -> None:
        super().__init__(name, parameters, path)
        library = ctypes.CDLL(str(path))
        self._launch = library[f"launch_{name}"]
        self._launch.restype = ctypes.c_char_p
        declared = library[f"parameters_{name}"]
        declared.restype = ctypes.c_char_p
        letters = re.findall(r"P.|[^P]", declared().decode())
        if "".join(letter[0] for letter in letters) != parameters:
            raise HostError(f"{name} takes {letters}, launched as {parameters}")
        self.pointees = "".join(letter[1:] or " " for letter in letters)

    def launch(
        self, grid: Dimensions, block: Dimensions, arguments: Sequence[Argument], shared: int
    ) -> None:
        """Hand over pointers to the arguments, as to the driver."""
        values = [
            ctypes.create_string_buffer(_packed(argument, letter))
            for argument, letter in zip(arguments, self.parameters, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        failure = self._launch(
            (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), ctypes.c_uint(shared), pointers
        )
        if failure:
            raise HostError(f"{self.name}: {failure.decode()}")


class SanitizedKernel(HostKernel):
    """A kernel as a program that reads its operands from a file and writes them back."""

    def launch(
        self, grid: Dimensions, block: Dimensions, arguments: Sequence[Argument], shared: int
    ) -> None:
        """Run the program; what its sanitizer says is the error."""
        parts = [struct.pack("8I", *grid, *block, shared, len(arguments))]
        for argument, letter in zip(arguments, self.parameters, strict=True):
            is_tensor = isinstance(argument, torch.Tensor)
            data = _bytes(argument) if is_tensor else _packed(argument, letter)  # type: ignore[arg-type]
            size = NULL_POINTER if argument is None else len(data)
            parts.append(struct.pack("2Q", letter == "P", size) + (data if argument is not None else b""))  # fmt: skip
        operands = self.path.with_suffix(f".{os.getpid()}.operands")
        operands.write_bytes(b"".join(parts))
        # what is set in the environment may tell the sanitizer to go on after an error
        clean = {k: v for k, v in os.environ.items() if not k.endswith("SAN_OPTIONS")}
        settings = {"UBSAN_OPTIONS": "halt_on_error=1", "TSAN_OPTIONS": "halt_on_error=1"}
        found = subprocess.run(
            [str(self.path), self.name, str(operands)],
            capture_output=True,
            text=True,
            env=clean | settings,
            timeout=300,
        )
        if found.returncode:
            raise HostError(f"{self.name}, exit code {found.returncode}:\n{found.stderr[:4000]}")
        self._take(operands, arguments)

    def _take(self, operands: Path, arguments: Sequence[Argument]) -> None:
        content = operands.read_bytes()
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor):
                size = tensor.nbytes
                ctypes.memmove(tensor.data_ptr(), content[:size], size)
                content = content[size:]
        operands.unlink()


def _packed(argument: Argument, letter: str) -> bytes:
    if letter == "P":
        return struct.pack("P", argument.data_ptr() if isinstance(argument, torch.Tensor) else 0)
    return struct.pack(letter, argument)


def _bytes(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
