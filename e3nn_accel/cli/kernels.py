"""Show, compile ahead or delete the compiled CUDA kernels that are kept on disk.

`warm` plans every module of a saved model and compiles its kernels, so that no process has to: for
the devices of this machine, or for another one with `--arch`, which needs no GPU. A model's file is
a pickle, which runs code when it is loaded: open only files that you trust.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e3nn_accel.cli import CommandError
from e3nn_accel.cli.arguments import add_json, dtypes, readable, without_warnings
from e3nn_accel.cli.tables import Table, progress, show, show_json
from e3nn_accel.config import Config

if TYPE_CHECKING:
    from e3nn_accel.kernel_cache import Binary, KernelCache
    from e3nn_accel.nvrtc import Compiler

HELP = "list, dump, delete or compile ahead the CUDA kernels kept on disk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions, each with its own."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="what is kept, and what each kernel takes")
    add_json(listing)
    dumping = actions.add_parser("dump", help="write source, machine code and resources of kernels")
    dumping.add_argument("name", metavar="NAME", help="as in `list`; or a glob, or a key's start")
    dumping.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="default: here")
    actions.add_parser("clear", help="delete all that is kept")
    warming = actions.add_parser("warm", help="compile the kernels of a model")
    warming.add_argument("model", metavar="MODEL", help="a model saved by torch.save")
    warming.add_argument(
        "--arch",
        type=_architecture,
        metavar="sm_XX",
        help="for such a device (default: the devices of this machine)",
    )
    warming.add_argument(
        "--dtype",
        type=dtypes,
        metavar="DTYPES",
        help="float32, float64 or both, with a comma (default: the model's)",
    )


def run(args: argparse.Namespace) -> int:
    """Do it."""
    action = {"list": _list, "dump": _dump, "clear": _clear, "warm": _warm}[args.action]
    with without_warnings():
        return action(args, Config.from_env())


def _cache(config: Config) -> KernelCache:
    from e3nn_accel.kernel_cache import KernelCache, cache_folder

    folder = cache_folder(config.cache_dir)
    if folder is None:
        raise CommandError("there is no home folder; set E3NN_ACCEL_CACHE_DIR", code=1)
    return KernelCache(folder)


def _list(args: argparse.Namespace, config: Config) -> int:
    from e3nn_accel.kernel_cache import Binary

    cache = _cache(config)
    entries = list(cache.entries())
    kept = [entry for entry in entries if isinstance(entry, Binary)]
    broken = [entry for entry in entries if not isinstance(entry, Binary)]
    if args.json:
        damaged = [{"file": str(entry.path), "reason": entry.reason} for entry in broken]
        show_json({"folder": str(cache.folder), "kernels": [*map(_facts, kept)], "broken": damaged})
        return 0
    show(f"{len(kept)} compiled programs in {cache.folder}")
    if kept:
        show(Table(_COLUMNS, [_row(binary) for binary in kept]))
    show(*[f"{entry.path}: {entry.reason}; it will be compiled anew" for entry in broken])
    return 0


_COLUMNS = ("name", "arch", "NVRTC", "kB", "date", "registers", "spilled", "shared", "key")


def _row(binary: Binary) -> tuple[str, ...]:
    """One line; of several kernels the greatest of each figure. PTX has no figures."""
    used = list(binary.resources.values())

    def most(values: Iterable[int]) -> str:
        return str(max(values, default="-"))

    return (
        binary.name,
        binary.target,
        binary.compiler,
        f"{len(binary.image) / 1000:.1f}",
        datetime.fromtimestamp(binary.created).strftime("%Y-%m-%d %H:%M"),
        most(use.registers for use in used),
        most(use.spill_stores + use.spill_loads for use in used),
        most(use.shared for use in used),
        binary.key[:8],
    )


def _facts(binary: Binary) -> dict[str, Any]:
    return {
        "name": binary.name,
        "key": binary.key,
        "target": binary.target,
        "nvrtc": binary.compiler,
        "bytes": len(binary.image),
        "created": binary.created,
        "seconds": binary.seconds,
        "resources": {kernel: asdict(use) for kernel, use in binary.resources.items()},
    }


def _dump(args: argparse.Namespace, config: Config) -> int:
    from e3nn_accel.compile import dump
    from e3nn_accel.kernel_cache import Binary

    cache = _cache(config)
    kept = [entry for entry in cache.entries() if isinstance(entry, Binary)]
    wanted = [b for b in kept if fnmatchcase(b.name, args.name) or b.key.startswith(args.name)]
    if not wanted:
        names = ", ".join(sorted({binary.name for binary in kept})) or "none"
        raise CommandError(f"{cache.folder} has no kernel {args.name!r} (it has: {names})")
    for binary in wanted:
        files = dump(binary, Path(args.folder))
        if not files:
            raise CommandError(f"can't write to {args.folder}", code=1)
        show(*map(str, files))
    return 0


def _clear(args: argparse.Namespace, config: Config) -> int:
    cache = _cache(config)
    try:
        count = cache.clear()
    except OSError as error:
        raise CommandError(f"can't delete from {cache.folder}: {error.strerror}", code=1) from error
    show(f"deleted {count} compiled programs from {cache.folder}")
    return 0


def _warm(args: argparse.Namespace, config: Config) -> int:
    from e3nn_accel.compile import Toolchain
    from e3nn_accel.nvrtc import CompileError
    from e3nn_accel.programs import programs_for
    from e3nn_accel.structures import load_module

    cache = _cache(config)
    compiler, architectures = _compiler_for(args.arch)
    with readable(), progress("planning"):
        model = load_module(args.model)
        planned = {a: programs_for(model, args.dtype or (), config, a) for a in architectures}
    programs = [(a, program) for a, (found, _) in planned.items() for program in found]
    if not programs:
        reasons = dict.fromkeys(reason for _, found in planned.values() for reason in found)
        why = "; ".join(reasons) or "it has no module that is accelerated"
        raise CommandError(f"{args.model}: no kernels to compile: {why}", code=1)
    toolchain = Toolchain.of(config, compiler)
    started = time.time()
    try:
        with progress(f"compiling {len(programs)} programs"):
            built = [b for a, (found, _) in planned.items() for b in toolchain.build_all(found, a)]
    except CompileError as error:
        raise CommandError(str(error), code=1) from error
    if toolchain.cache is None or toolchain.cache.problem:
        raise CommandError(toolchain.cache.problem if toolchain.cache else "no cache", code=1)
    new = sum(binary.created >= started for binary in built)
    show(Table(_COLUMNS, [_row(binary) for binary in built]))
    show(f"compiled {new}, {len(built) - new} were there, in {cache.folder}")
    show(f"They serve processes whose CuPy finds NVRTC {compiler.version}.")
    return 0


def _compiler_for(arch: int | None) -> tuple[Compiler, Sequence[int]]:
    """What to compile with, and for which devices."""
    from e3nn_accel.availability import cuda_availability
    from e3nn_accel.nvrtc import CompileError, any_compiler, cupy_compiler

    if arch is None:
        found = cuda_availability()
        if not found.ok:
            advice = "'--arch sm_90' compiles for a device that isn't here"
            raise CommandError(f"no kernels run on this machine: {found.reason}. {advice}", code=1)
        return cupy_compiler(), present_architectures()
    try:
        compiler = any_compiler()
        compiler.target(arch)
    except CompileError as error:
        advice = "pip install cuda-bindings nvidia-cuda-nvrtc, which need no GPU"
        raise CommandError(f"nothing can be compiled here: {error}\n{advice}", code=1) from error
    return compiler, [arch]


def present_architectures() -> list[int]:
    """Compute capabilities of the devices of this machine, each once, as 90 for 9.0."""
    import torch

    count = torch.cuda.device_count()
    found = (torch.cuda.get_device_capability(index) for index in range(count))
    return sorted({10 * major + minor for major, minor in found})


def _architecture(text: str) -> int:
    match = re.fullmatch(r"(?:sm_)?(\d{2,3})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted sm_90, say")
    return int(match[1])
