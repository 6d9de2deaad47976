"""One kernel on the CPU, called as `e3nn_accel.launch.Kernel` is, and stricter with its caller.

What the real launch takes on trust is checked here: devices, dtypes, memory layout, limits of a grid.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from e3nn_accel.launch import Argument, Dimensions

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


class HostError(RuntimeError):
    """A kernel that g++ doesn't compile, or that did what no kernel may do."""


class HostKernel:
    """Checks what the real thing takes on trust: devices, dtypes, memory layout, limits of a grid."""

    pointees = ""
    """A letter for each parameter: what a pointer points to, blank for values; empty: not known."""

    def __init__(self, name: str, parameters: str, path: Path) -> None:
        self.name, self.parameters, self.path = name, parameters, path

    def __call__(
        self,
        grid: Dimensions,
        block: Dimensions,
        *arguments: Argument,
        shared: int = 0,
        overlapping: bool = False,
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

    def again(
        self, grid: Dimensions, block: Dimensions, most: int, *rest: int | float
    ) -> Callable[..., None]:
        """As `launch.Kernel.again`."""

        def launch(*first: int | float) -> None:
            if len(first) != most:
                raise HostError(f"{self.name}: {len(first)} arguments come first, not {most}")
            self(grid, block, *first, *rest)

        return launch


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
            parts.append(struct.pack("2Q", letter == "P", size))
            parts += [] if argument is None else [data]
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
