"""NVRTC, NVIDIA's run-time compiler: by CuPy where kernels run, by cuda-bindings elsewhere.

CuPy's own compile function asks the driver for the device. Here the architecture is an argument, so
the same kernels compile where there is no driver at all (continuous integration, a login node).
Both ways release the GIL. NVRTC then optimises and assembles several programs in parallel, but
reads them one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from e3nn_accel.errors import AccelError


class CompileError(AccelError):
    """CUDA source that NVRTC doesn't compile, or an architecture that it has no code for."""


class Output(NamedTuple):
    """What a compilation gives: a cubin for sm_XX or PTX for compute_XX, and the compiler's log."""

    binary: bytes
    log: str


SLOW_FROM = 100
"""The compute capability from which on NVRTC takes a hundred times as long for kernels like ours.

13.5 needs 0.4 s for a backward kernel of MACE's second layer for 9.0, and 29 s for 10.0 and 12.0, where
its optimiser looks for pairs of 32-bit operations. PTX for 9.0 takes 0.4 s, and the driver assembles it.
"""


@dataclass(frozen=True)
class Compiler:
    """One NVRTC.

    Attributes:
        version: "13.5"; part of the key of what it compiled.
        architectures: The compute capabilities that it has code for, as 90 for 9.0, rising.
        run: Compiles (source, file name for messages, options, "sm_90" or "compute_90");
            raises `CompileError`.
        native: Make machine code for every architecture that it has code for, however long it takes.
    """

    version: str
    architectures: tuple[int, ...]
    run: Callable[[str, str, Sequence[str], str], Output] = field(compare=False)
    native: bool = False

    def target(self, architecture: int) -> str:
        """What to compile for a device: its own machine code, or PTX where that is too new or too slow to make.

        Raises:
            CompileError: The device is too old.
        """
        if architecture in self.architectures and (self.native or architecture < SLOW_FROM):
            return f"sm_{architecture}"
        older = [known for known in self.architectures if known < architecture]
        quick = [known for known in older if known < SLOW_FROM]
        if quick and not self.native:
            return f"compute_{max(quick)}"
        if not older:
            oldest = min(self.architectures, default=0)
            raise CompileError(
                f"NVRTC {self.version} has no code for sm_{architecture}",
                [f"the oldest that it knows is sm_{oldest}; NVRTC of an older CUDA may have it"],
            )
        return f"compute_{max(older)}"


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, by the assembler's report.

    Attributes:
        registers: Of one thread.
        spill_stores: Bytes that a thread moves to local memory for want of registers.
        spill_loads: Bytes that it reads back.
        shared: Bytes of static shared memory of a block.
        stack: Bytes of local memory of a thread: spills, and arrays indexed by variables.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    stack: int

    def __str__(self) -> str:
        spills = self.spill_stores + self.spill_loads
        return (
            f"{self.registers} registers, {spills} bytes spilled, "
            f"{self.shared} bytes shared, {self.stack} bytes stack"
        )


_ENTRY = re.compile(r"Compiling entry function '(\S+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def resources_in(log: str) -> dict[str, Resources]:
    """Read the report that ``--ptxas-options=-v`` puts in the log: resources by kernel.

    Functions that were not inlined are reported, too; only kernels are kept. PTX has no report.
    """
    found: dict[str, Resources] = {}
    entry, stack = "", (0, 0, 0)
    described = ""
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry, stack = match[1], (0, 0, 0)
        elif match := _PROPERTIES.search(line):
            described = match[1]
        elif (match := _STACK.search(line)) and described == entry:
            stack = (int(match[1]), int(match[2]), int(match[3]))
        elif (match := _USED.search(line)) and entry:
            shared = _SHARED.search(line)
            size, stores, loads = stack
            found[entry] = Resources(
                int(match[1]), stores, loads, int(shared[1]) if shared else 0, size
            )
    return found


def cupy_compiler() -> Compiler:
    """The NVRTC that CuPy finds: a wheel's, a conda package's or the toolkit's.

    Raises:
        ImportError: CuPy is not installed; a broken one raises anything.
        RuntimeError: There is no NVRTC.
    """
    from cupy_backends.cuda.libs import nvrtc

    def run(source: str, name: str, options: Sequence[str], target: str) -> Output:
        program = nvrtc.createProgram(source, name, (), ())
        try:
            try:
                nvrtc.compileProgram(program, all_options(options, target, version))
            except nvrtc.NVRTCError as error:
                log = nvrtc.getProgramLog(program)
                raise CompileError(f"NVRTC: {name}: {error}", [log.strip()]) from None
            get = nvrtc.getPTX if target.startswith("compute_") else nvrtc.getCUBIN
            return Output(get(program), nvrtc.getProgramLog(program))
        finally:
            nvrtc.destroyProgram(program)

    version = nvrtc.getVersion()
    return Compiler(_dotted(version), tuple(sorted(nvrtc.getSupportedArchs())), run)


def bindings_compiler() -> Compiler:
    """The NVRTC of the package nvidia-cuda-nvrtc, through cuda-bindings: needs no driver.

    Raises:
        ImportError: cuda-bindings is not installed.
        RuntimeError: There is no NVRTC.
    """
    from cuda.bindings import nvrtc

    def checked(answer: Any) -> Any:
        status, *values = answer
        if int(status) != 0:
            raise CompileError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
        return values[0] if len(values) == 1 else values

    def text(program: Any, size: Callable[..., Any], get: Callable[..., Any]) -> bytes:
        buffer = bytearray(checked(size(program)))
        checked(get(program, buffer))
        return bytes(buffer)

    def log_of(program: Any) -> str:
        log = text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        return log.decode(errors="replace").rstrip("\0 \n")

    def run(source: str, name: str, options: Sequence[str], target: str) -> Output:
        program = checked(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
        try:
            encoded = [option.encode() for option in all_options(options, target, version)]
            (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
            if int(status) != 0:
                reason = nvrtc.nvrtcGetErrorString(status)[1].decode()
                raise CompileError(f"NVRTC: {name}: {reason}", [log_of(program)])
            if target.startswith("compute_"):
                ptx = text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
                return Output(ptx.rstrip(b"\0"), log_of(program))
            cubin = text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
            return Output(cubin, log_of(program))
        finally:
            nvrtc.nvrtcDestroyProgram(program)

    architectures = checked(nvrtc.nvrtcGetSupportedArchs())
    version = checked(nvrtc.nvrtcVersion())
    return Compiler(_dotted(version), tuple(sorted(architectures)), run)


def any_compiler() -> Compiler:
    """The first that works here.

    Raises:
        CompileError: None does; with the reason of each.
    """
    reasons = []
    for make in (cupy_compiler, bindings_compiler):
        try:
            return make()
        except Exception as error:  # a broken CuPy raises whatever it likes
            first_line = str(error).strip().partition("\n")[0]
            reasons.append(f"{make.__name__}: {type(error).__name__}: {first_line}")
    raise CompileError("there is no NVRTC here", reasons)


def all_options(options: Sequence[str], target: str, version: Sequence[int]) -> list[str]:
    """A program's options, for a target, of an NVRTC.

    What NVRTC takes from a cache of its own comes without the report on registers; `KernelCache` keeps
    kernels itself.
    """
    from e3nn_accel.compat import nvrtc_can_forget

    uncached = ["--no-cache"] if nvrtc_can_forget(version) else []
    return [f"--gpu-architecture={target}", *uncached, *options]


def _dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))
