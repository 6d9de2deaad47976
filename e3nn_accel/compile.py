"""From a kernel file and the constants of a plan to machine code, compiled once and kept.

A `KernelProgram` says what to compile; a `Toolchain` compiles it by the compiler that it is given:
the one that CuPy finds where kernels run, or one that needs no driver. What is compiled is one text
with every header in its place. The same text goes to E3NN_ACCEL_DUMP, under the file name that the
compiler was told, so that line numbers in messages, in Nsight and in the dump agree.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from e3nn_accel._version import __version__
from e3nn_accel.config import Config
from e3nn_accel.kernel_cache import Binary, KernelCache, cache_folder, file_stem
from e3nn_accel.nvrtc import Compiler, Resources, resources_in

log = logging.getLogger(__name__)

GENERATED = "plan.cuh"
"""What a kernel file includes to get the constants of its plan."""

OPTIONS = ("-std=c++17", "-default-device", "-lineinfo", "--ptxas-options=-v")
# NVRTC 12.4 and 13.0 take a lambda in a __device__ function for one of the host without -default-device.

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)".*$', re.MULTILINE)
_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once\b.*$", re.MULTILINE)


@dataclass(frozen=True)
class KernelProgram:
    """One translation unit: a kernel file, completed by what a plan generates.

    Attributes:
        name: For people; plans that differ should have names that differ.
        file: The ``.cu`` file.
        entries: Names of its ``extern "C"`` kernels.
        header: Generated constants, constexpr tables or unrolled code, which the file includes as
            "plan.cuh".
        macros: "NAME=VALUE", or "NAME" alone.
        options: Further options of NVRTC.
        description: The plan in one line, for dumps.
        features_of: The compute capability, as 90 for 9.0, whose own instructions it has, which no other takes.
        package: Where the file and the headers that it includes are.
        code: The text to use in place of the file's, where a plugin has replaced it.
    """

    name: str
    file: str
    entries: tuple[str, ...]
    header: str = field(default="", repr=False)
    macros: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    description: str = field(default="", compare=False)
    features_of: int = 0
    package: str = "e3nn_accel.kernels"
    code: str = field(default="", repr=False)

    def source(self) -> str:
        """The file with every ``#include "..."`` of its package replaced by the text.

        A header is put in once, where it is first included, so that it must not first be included
        under an ``#if``. Names that the package doesn't have stay as they are.
        """
        folder = resources.files(self.package)
        included: set[str] = set()

        def inline(match: re.Match[str]) -> str:
            name = match[1]
            if name in included:
                return f"// {name}: above"
            text = self.header if name == GENERATED else None
            if text is None and (folder / name).is_file():
                text = (folder / name).read_text(encoding="utf-8")
            if text is None:
                return match[0]
            included.add(name)
            return f"// {name}\n{expand(text)}\n// end of {name}"

        def expand(text: str) -> str:
            return _INCLUDE.sub(inline, _ONCE.sub("", text))

        return expand(self.code or (folder / self.file).read_text(encoding="utf-8"))

    def compiler_options(self) -> tuple[str, ...]:
        """All options but the architecture.

        Raises:
            ValueError: One of them is for inexact arithmetic.
        """
        macros = (f"-D{macro}" for macro in self.macros)
        found = (*OPTIONS, *macros, *self.options)
        if any("use_fast_math" in option for option in found):
            raise ValueError(f"{self.name}: -use_fast_math would change what e3nn computes")
        return found

    def key(self, target: str, compiler: str) -> str:
        """Hash of all that decides about the machine code; its line numbers have the name."""
        options = self.compiler_options()
        digest = hashlib.sha256()
        for part in (self.name, target, compiler, self.source(), *options):
            digest.update(f"{len(part)}:".encode() + part.encode())
        return digest.hexdigest()

    def expanded(self, target: str = "", compiler: str = "") -> str:
        """The source as it is compiled: under a comment that says what it is."""
        from e3nn_accel.compat import version_of

        # As many lines whatever they say, so that two dumps of a program can be compared.
        lines = (
            f"{self.name}, from {self.file}",
            " ".join(self.description.split()) or "no description",
            f"e3nn_accel {__version__}, e3nn {version_of('e3nn')}",
            f"compiled for {target or 'no device'} by NVRTC {compiler or '-'}",
            f"options: {' '.join(self.compiler_options())}",
            f"key: {self.key(target, compiler)}",
        )
        # A backslash at the end would make the next line part of the comment.
        comment = "".join(f"// {line.rstrip(chr(92))}\n" for line in lines)
        return comment + self.source()


def programs_of(plan: object) -> tuple[KernelProgram, ...]:
    """The programs that a plan runs; none for plans in torch operations."""
    return tuple(getattr(plan, "programs", ()))


@dataclass(frozen=True)
class Toolchain:
    """A compiler, and where its work is kept and shown.

    Attributes:
        compiler: What compiles.
        cache: Kernels on disk, or None to keep none.
        dump: A folder for sources and reports, or None.
    """

    compiler: Compiler
    cache: KernelCache | None = None
    dump: Path | None = None
    _built: dict[str, Binary] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, config: Config, compiler: Compiler) -> Toolchain:
        """The one that a configuration asks for."""
        folder = cache_folder(config.cache_dir)
        dump = Path(config.dump).expanduser().absolute() if config.dump else None
        return cls(compiler, KernelCache(folder) if folder else None, dump)

    def build(self, program: KernelProgram, architecture: int) -> Binary:
        """Compile a program for a device, unless that was done before.

        Args:
            program: What to compile.
            architecture: The device's compute capability, as 90 for 9.0.

        Raises:
            CompileError: NVRTC can't.
        """
        target = self.compiler.target(architecture)
        if target == f"sm_{program.features_of}":
            target += "a"  # NVIDIA's name for code that has them, and runs nowhere else
        key = program.key(target, self.compiler.version)
        binary = self._built.get(key)
        if binary is None:
            binary = self.cache.read(program.name, target, key) if self.cache else None
            if binary is None:
                binary = self._compile(program, target, key)
                if self.cache:
                    self.cache.write(binary)
            self._built[key] = binary
            if self.dump:
                dump(binary, self.dump)
        return binary

    def build_all(self, programs: Sequence[KernelProgram], architecture: int) -> tuple[Binary, ...]:
        """Compile several, in parallel; equal ones once.

        Raises:
            CompileError: NVRTC can't compile one of them.
        """
        unique = list(dict.fromkeys(programs))
        workers = min(len(unique), _cores())
        if workers <= 1:
            return tuple(self.build(program, architecture) for program in programs)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="e3nn_accel compile")
        try:
            running = {p: pool.submit(self.build, p, architecture) for p in unique}
            return tuple(running[program].result() for program in programs)
        finally:  # after an error or an interruption: the rest is not begun
            pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, program: KernelProgram, target: str, key: str) -> Binary:
        version = self.compiler.version
        source = program.expanded(target, version)
        name = f"{file_stem(program.name, target, key)}.cu"
        started = time.perf_counter()
        image, said = self.compiler.run(source, name, program.compiler_options(), target)
        seconds = time.perf_counter() - started
        found = resources_in(said)
        log.info("compiled %s for %s in %.2f s", program.name, target, seconds)
        for kernel, use in found.items():
            log.debug("%s: %s", kernel, use)
        return Binary(program.name, key, target, version, source, said, found, image, seconds)


def dump(binary: Binary, folder: Path) -> tuple[Path, ...]:
    """Write the source, the machine code and the report of a compiled program.

    Returns:
        The files; none where they can't be written, which is logged.
    """
    contents = {
        ".cu": binary.source.encode(),
        ".ptx" if binary.target.startswith("compute_") else ".cubin": binary.image,
        ".txt": report(binary.resources, binary.log).encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in contents.items():
            (folder / f"{binary.stem}{suffix}").write_bytes(content)
    except OSError as error:
        log.warning("can't write the source of %s to %s: %s", binary.name, folder, error)
        return ()
    return tuple(folder / f"{binary.stem}{suffix}" for suffix in contents)


def report(used: dict[str, Resources], said: str) -> str:
    """The resources of every kernel, and under them what NVRTC said."""
    lines: Iterable[str] = (f"{kernel}: {use}" for kernel, use in used.items())
    return "\n".join([*lines, "", said.strip(), ""])


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
