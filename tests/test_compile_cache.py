"""Kernels are compiled once and kept; nothing that can happen to a disk stops a program."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kernel_programs import ENTRIES, Compilations, axpy, fake_compiler

from e3nn_accel.compile import KernelProgram, Toolchain, programs_of
from e3nn_accel.config import Config
from e3nn_accel.kernel_cache import MAGIC, Binary, BrokenEntry, KernelCache, cache_folder
from e3nn_accel.nvrtc import (
    CompileError,
    Compiler,
    Resources,
    all_options,
    any_compiler,
    bindings_compiler,
    resources_in,
)

pytestmark = pytest.mark.once


@pytest.fixture
def calls() -> Compilations:
    """What the fake compiler was given."""
    return Compilations()


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    """An empty cache, whose folder isn't there yet."""
    return KernelCache(tmp_path / "a" / "kernels")


def toolchain(calls: Compilations, cache: KernelCache, **settings: Any) -> Toolchain:
    """A process of its own, as far as the cache can tell."""
    return Toolchain(fake_compiler(calls, **settings), cache)


def files(cache: KernelCache) -> list[Path]:
    """All that is in the folder."""
    return sorted(cache.folder.iterdir()) if cache.folder.exists() else []


@pytest.fixture(scope="module")
def nvrtc() -> Compiler:
    """The real compiler, which needs no driver."""
    try:
        return bindings_compiler()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no NVRTC by cuda-bindings: {error}")


# What is compiled


def test_source_has_every_header_once() -> None:
    """plan.cuh, what the file includes and what that includes, each where it is first wanted."""
    source = axpy().source()
    assert source.count("constexpr int FACTOR = 2;") == 1
    assert source.index("FACTOR = 2") < source.index("REAL product(") < source.index("void axpy")
    assert "#include" not in source
    assert "#pragma once" not in source


def test_unknown_includes_stay() -> None:
    """The compiler says what it thinks of them."""
    program = axpy(
        code='#include "of_the_system.h"\n#include <math.h>\n#  include "plan.cuh" // ours\n'
    )
    assert '#include "of_the_system.h"\n#include <math.h>\n' in program.source()
    assert "FACTOR" in program.source()


def test_code_stands_in_for_the_file() -> None:
    """A plugin's source replaces ours."""
    assert axpy(code="mine").source() == "mine"


def test_expanded_says_what_it_is() -> None:
    """A comment of always as many lines, that no description can break out of."""
    plain = axpy(description="").expanded()
    odd = axpy(description="two\nlines, ends with \\").expanded("sm_90", "13.0")
    assert plain.count("\n") == odd.count("\n")
    head = odd.splitlines()[:5]
    assert all(line.startswith("// ") and not line.endswith("\\") for line in head)
    assert "two lines, ends with" in odd
    assert "compiled for sm_90 by NVRTC 13.0" in odd
    assert "-DREAL=float" in odd
    assert axpy().key("sm_90", "13.0") in odd
    assert odd.endswith(axpy().source())


def test_exact_arithmetic_only() -> None:
    """No options that let a compiler change results."""
    assert "-lineinfo" in axpy().compiler_options()
    assert "-std=c++17" in axpy().compiler_options()
    with pytest.raises(ValueError, match="use_fast_math"):
        axpy(options=("-use_fast_math",)).compiler_options()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "axpy2"},
        {"header": "constexpr int FACTOR = 3;\n"},
        {"macros": ("REAL=double",)},
        {"macros": ("REAL=float", "CHECKED")},
        {"options": ("--maxrregcount=64",)},
        {"code": 'extern "C" __global__ void axpy() {}'},
        {"macros": (), "options": ("-DREAL=float", "-DX")},
    ],
)
def test_key_depends_on_what_is_compiled(changes: dict[str, Any]) -> None:
    """Source, generated header, macros, options; and the name, which is in the line information."""
    assert axpy(**changes).key("sm_90", "13.0") != axpy().key("sm_90", "13.0")


def test_key_depends_on_shared_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An edited header of the package is another program."""
    package = tmp_path / "edited_kernels"
    package.mkdir()
    (package / "a.cu").write_text('#include "b.cuh"\n')
    (package / "b.cuh").write_text("int x;\n")
    monkeypatch.syspath_prepend(tmp_path)
    program = KernelProgram("a", "a.cu", (), package="edited_kernels")
    before = program.key("sm_90", "13.0")
    (package / "b.cuh").write_text("int y;\n")
    assert program.key("sm_90", "13.0") != before


def test_key_depends_on_device_and_compiler_alone() -> None:
    """Besides the program; its description is for people."""
    key = axpy().key("sm_90", "13.0")
    assert axpy().key("sm_80", "13.0") != key
    assert axpy().key("sm_90", "13.1") != key
    assert axpy(description="other words").key("sm_90", "13.0") == key


def test_programs_of_a_plan() -> None:
    """Plans in torch operations have none."""

    class Plan:
        programs = (axpy(),)

    assert programs_of(Plan()) == (axpy(),)
    assert programs_of(object()) == ()


# The device decides between machine code and PTX


def test_target() -> None:
    """Machine code for a device that NVRTC knows, the newest PTX for one that is newer."""
    compiler = fake_compiler(Compilations(), architectures=(75, 80, 90))
    assert compiler.target(80) == "sm_80"
    assert compiler.target(120) == "compute_90"
    assert compiler.target(86) == "compute_80"
    with pytest.raises(CompileError, match=r"sm_70\n.*sm_75"):
        compiler.target(70)


def test_target_where_machine_code_takes_minutes() -> None:
    """PTX for the newest device that doesn't, unless it is asked for."""
    compiler = fake_compiler(Compilations(), architectures=(75, 90, 100, 120))
    assert [compiler.target(a) for a in (90, 100, 103, 120)] == ["sm_90", *["compute_90"] * 3]
    native = replace(compiler, native=True)
    assert [native.target(a) for a in (100, 103, 120)] == ["sm_100", "compute_100", "sm_120"]
    only = fake_compiler(Compilations(), architectures=(100, 120))
    assert only.target(110) == "compute_100"


def test_target_of_a_program_for_one_device(calls: Compilations, cache: KernelCache) -> None:
    """Its own instructions are asked for by name, and there alone."""
    tools = toolchain(calls, cache, architectures=(80, 90, 100))
    own = replace(axpy(), features_of=90)
    assert [tools.build(own, a).target for a in (80, 90, 100)] == ["sm_80", "sm_90a", "compute_90"]
    assert tools.build(axpy(), 90).target == "sm_90"


def test_resources_of_each_kernel() -> None:
    """Those of functions that were not inlined are not taken for a kernel's."""
    log = """
ptxas info    : Compiling entry function 'other' for 'sm_90'
ptxas info    : Function properties for other
ptxas         .     576 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 34 registers, used 0 barriers, 576 bytes cumulative stack size
ptxas info    : Function properties for _Z4slowf
ptxas         .     64 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function 'axpy' for 'sm_90'
ptxas info    : Function properties for _Z4slowf
ptxas         .     64 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for axpy
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]
"""
    expected = {"other": Resources(34, 0, 0, 0, 576), "axpy": Resources(255, 4, 12, 512, 8)}
    assert resources_in(log) == expected
    assert (
        str(expected["axpy"]) == "255 registers, 16 bytes spilled, 512 bytes shared, 8 bytes stack"
    )
    assert resources_in("warning: something else") == {}


# The cache


def test_compiled_once(calls: Compilations, cache: KernelCache) -> None:
    """Within a process, and by the next one from the disk."""
    first = toolchain(calls, cache)
    built = first.build(axpy(), 90)
    assert first.build(axpy(), 90) is built
    again = toolchain(calls, cache).build(axpy(), 90)
    assert again == built
    assert len(calls) == 1
    assert built.resources["axpy"] == Resources(40, 12, 16, 512, 128)
    (path,) = files(cache)
    assert path.name == f"axpy.sm_90.{built.key[:16]}.kernel"
    source, name, options, target = calls[0]
    assert source == axpy().expanded("sm_90", "99.0") == built.source
    assert (name, target) == (f"axpy.sm_90.{built.key[:16]}.cu", "sm_90")
    assert options == axpy().compiler_options()


def test_each_compiler_and_device_its_own(calls: Compilations, cache: KernelCache) -> None:
    """An update of NVRTC compiles anew, beside what is there."""
    toolchain(calls, cache).build(axpy(), 90)
    toolchain(calls, cache, version="99.1").build(axpy(), 90)
    toolchain(calls, cache).build(axpy(), 75)
    assert len(calls) == len(files(cache)) == 3


def test_an_odd_name_is_a_plain_file(calls: Compilations, cache: KernelCache) -> None:
    """Irreps in a name don't lead out of the folder."""
    built = toolchain(calls, cache).build(axpy(name="../x 4x0e+1o" + "y" * 300), 90)
    (path,) = files(cache)
    assert path.name.startswith(".._x_4x0e+1oyyy")
    assert len(path.name) < 140
    assert toolchain(calls, cache).build(axpy(name=built.name), 90) == built


def damage(content: bytes, how: str) -> bytes:
    """A file that a crash, a full disk or another version has left."""
    middle = len(content) // 2
    return {
        "empty": b"",
        "truncated": content[:-7],
        "only magic": MAGIC,
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "another format": content.replace(MAGIC, b"e3nn_accel kernel 0\n"),
        "text": b"<html>404</html>",
    }[how]


@pytest.mark.parametrize(
    "how", ["empty", "truncated", "only magic", "one bit", "another format", "text"]
)
def test_damaged_entry_is_replaced(calls: Compilations, cache: KernelCache, how: str) -> None:
    """It is compiled anew, and the next process finds it whole."""
    built = toolchain(calls, cache).build(axpy(), 90)
    (path,) = files(cache)
    path.write_bytes(damage(path.read_bytes(), how))
    assert isinstance(next(cache.entries()), BrokenEntry)
    assert toolchain(calls, cache).build(axpy(), 90).image == built.image
    toolchain(calls, cache).build(axpy(), 90)
    assert len(calls) == 2
    assert isinstance(next(cache.entries()), Binary)


def test_another_programs_file_is_not_taken(calls: Compilations, cache: KernelCache) -> None:
    """The whole key is compared, not the part of it in the name."""
    toolchain(calls, cache).build(axpy(header="constexpr int FACTOR = 3;"), 90)
    (other,) = files(cache)
    key = axpy().key("sm_90", "99.0")
    other.rename(cache.folder / f"axpy.sm_90.{key[:16]}.kernel")
    assert toolchain(calls, cache).build(axpy(), 90).key == key
    assert len(calls) == 2


def cold_start(folder: Path, barrier: Any, results: Any) -> None:
    """One of several processes that need the same kernels at the same time."""
    calls = Compilations()
    tools = toolchain(calls, KernelCache(folder), before=lambda: time.sleep(0.05))
    barrier.wait()
    built = [tools.build(axpy(name=f"axpy{n}"), 90) for n in range(3)]
    results.put([b.image for b in built])


def test_eight_processes_on_a_cold_cache(cache: KernelCache, calls: Compilations) -> None:
    """All get what they need, and the cache is whole afterwards."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    started = [
        context.Process(target=cold_start, args=(cache.folder, barrier, results)) for _ in range(8)
    ]
    for process in started:
        process.start()
    images = [results.get(timeout=60) for _ in started]
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * 8
    assert all(image == images[0] for image in images)
    assert [path.suffix for path in files(cache)] == [".kernel"] * 3
    toolchain(calls, cache).build_all([axpy(name=f"axpy{n}") for n in range(3)], 90)
    assert calls == []


def fail(number: int) -> Any:
    """A function that fails as the system does."""

    def failing(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    return failing


@pytest.mark.parametrize(
    ("function", "number"),
    [
        ("os.replace", errno.EROFS),
        ("os.replace", errno.EACCES),
        ("tempfile.mkstemp", errno.EROFS),
        ("tempfile.mkstemp", errno.ENOSPC),
        ("os.fdopen", errno.EDQUOT),
        ("pathlib.Path.mkdir", errno.EACCES),
    ],
)
def test_nothing_can_be_kept(
    calls: Compilations,
    cache: KernelCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    number: int,
) -> None:
    """A read-only folder, a home of another user, a full disk: it works, and is said once."""
    monkeypatch.setattr(function, fail(number))
    tools = toolchain(calls, cache)
    with caplog.at_level(logging.WARNING):
        for name in ("one", "two"):
            assert tools.build(axpy(name=name), 90).image
    (record,) = caplog.records
    assert os.strerror(number) in record.getMessage()
    assert os.strerror(number) in cache.problem
    monkeypatch.undo()
    assert files(cache) == []


def test_disk_full_while_writing(
    calls: Compilations, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file is taken away again."""
    opened = os.fdopen

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[:100])
            fail(errno.ENOSPC)()

    monkeypatch.setattr("os.fdopen", lambda *a, **k: Full(opened(*a, **k)))
    assert toolchain(calls, cache).build(axpy(), 90).image
    assert files(cache) == []


def test_unreadable_entry(
    calls: Compilations, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry of another user is compiled anew."""
    toolchain(calls, cache).build(axpy(), 90)
    monkeypatch.setattr("pathlib.Path.read_bytes", fail(errno.EACCES))
    assert toolchain(calls, cache).build(axpy(), 90).image
    assert len(calls) == 2


def test_a_file_where_the_folder_should_be(calls: Compilations, tmp_path: Path) -> None:
    """E3NN_ACCEL_CACHE_DIR may name anything."""
    (tmp_path / "taken").write_text("mine")
    tools = toolchain(calls, KernelCache(tmp_path / "taken"))
    assert tools.build(axpy(), 90).image
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("where", ["compiling", "writing"])
def test_interruption_leaves_nothing(
    calls: Compilations, cache: KernelCache, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Ctrl-C while a kernel is compiled or written: no entry, and no half of one."""

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    before = interrupt if where == "compiling" else (lambda: None)
    if where == "writing":
        monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        toolchain(calls, cache, before=before).build(axpy(), 90)
    assert files(cache) == []
    monkeypatch.undo()
    assert toolchain(calls, cache).build(axpy(), 90).image


def test_what_does_not_compile_is_not_kept(cache: KernelCache) -> None:
    """The next process tries again."""

    def run(*_: Any) -> Any:
        raise CompileError("no", ["line 3"])

    with pytest.raises(CompileError, match="line 3"):
        Toolchain(Compiler("99.0", (90,), run), cache).build(axpy(), 90)
    assert files(cache) == []


def test_clear_deletes_only_its_own(calls: Compilations, cache: KernelCache) -> None:
    """Also what killed processes have left; other files stay."""
    toolchain(calls, cache).build_all([axpy(name="a"), axpy(name="b")], 90)
    (cache.folder / "axpy.sm_90.0123.xyz.part").write_text("half")
    (cache.folder / "notes.txt").write_text("mine")
    assert cache.clear() == 2
    assert [path.name for path in files(cache)] == ["notes.txt"]


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user's cache unless one is chosen; none rather than a folder named "~" in the way."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: tmp_path / "e3nn_accel")
    assert cache_folder(None) == tmp_path / "e3nn_accel" / "kernels"
    assert cache_folder(str(tmp_path / "x")) == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    assert cache_folder("here") == tmp_path / "here"
    monkeypatch.setattr(
        "platformdirs.user_cache_path", lambda *_, **__: Path("~/.cache/e3nn_accel")
    )
    assert cache_folder(None) is None


# Several at once, and dumps


def test_several_compile_in_parallel(calls: Compilations, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are in the compiler at a time, results keep their order, equal ones compile once."""
    monkeypatch.setattr("e3nn_accel.compile._cores", lambda: 2)
    both = threading.Barrier(2)
    tools = Toolchain(fake_compiler(calls, before=lambda: both.wait(timeout=30)))
    one, two = axpy(name="one"), axpy(name="two")
    built = tools.build_all([two, one, two], 90)
    assert [binary.name for binary in built] == ["two", "one", "two"]
    assert len(calls) == 2


def test_one_of_several_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is raised, and those that wait are not begun."""
    monkeypatch.setattr("e3nn_accel.compile._cores", lambda: 2)
    begun = Compilations()

    def run(source: str, name: str, options: Any, target: str) -> Any:
        begun.append((source, name, options, target))
        time.sleep(0.05)
        raise CompileError(name)

    with pytest.raises(CompileError):
        Toolchain(Compiler("99.0", (90,), run)).build_all(
            [axpy(name=f"n{n}") for n in range(9)], 90
        )
    assert len(begun) < 9


def test_dump(calls: Compilations, cache: KernelCache, tmp_path: Path) -> None:
    """The very text that was compiled under the name the compiler knows, code and report; also of
    kernels from the cache."""
    toolchain(calls, cache).build(axpy(), 90)
    config = Config(cache_dir=str(cache.folder), dump=str(tmp_path / "dump"))
    Toolchain.of(config, fake_compiler(calls)).build(axpy(), 90)
    assert len(calls) == 1
    stem = tmp_path / "dump" / calls[0][1].removesuffix(".cu")
    assert Path(f"{stem}.cu").read_text() == calls[0][0]
    assert Path(f"{stem}.cubin").read_bytes().startswith(b"code of")
    report = Path(f"{stem}.txt").read_text()
    assert "axpy: 40 registers, 28 bytes spilled, 512 bytes shared, 128 bytes stack" in report


def test_dump_that_fails(
    calls: Compilations, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Is no reason to stop."""
    (tmp_path / "taken").write_text("")
    tools = Toolchain(fake_compiler(calls), dump=tmp_path / "taken")
    with caplog.at_level(logging.WARNING):
        assert tools.build(axpy(), 90).image
    assert "can't write the source" in caplog.text


# The real compiler


def test_real_machine_code(nvrtc: Compiler, cache: KernelCache) -> None:
    """A cubin with the resources of every kernel, the same from the cache."""
    built = Toolchain(nvrtc, cache).build(axpy(), 90)
    assert built.image.startswith(b"\x7fELF")
    assert set(built.resources) == set(ENTRIES)
    for name in ENTRIES:
        assert name.encode() in built.image
    assert 0 < built.resources["axpy"].registers < 64
    assert built.resources["axpy"].spill_stores == 0
    assert Toolchain(nvrtc, cache).build(axpy(), 90) == built


def test_real_constants_matter(nvrtc: Compiler) -> None:
    """The generated header and the macros reach the kernel."""
    images = {
        Toolchain(nvrtc).build(program, 90).image
        for program in (
            axpy(),
            axpy(header="constexpr int FACTOR = 3;"),
            axpy(macros=("REAL=double",)),
        )
    }
    assert len(images) == 3


def test_real_ptx_for_an_unknown_device(nvrtc: Compiler) -> None:
    """Of a device that NVRTC doesn't know yet; it has no report of resources."""
    built = Toolchain(replace(nvrtc, native=True)).build(axpy(), 999)
    assert built.target == f"compute_{max(nvrtc.architectures)}"
    assert b".visible .entry axpy(" in built.image
    assert not built.image.endswith(b"\0")
    assert built.resources == {}


def test_real_errors_are_the_compilers(nvrtc: Compiler) -> None:
    """With the line as the dump has it, in the name of the dump's file."""
    program = axpy(header="constexpr int FACTOR = 2 +;\n")
    with pytest.raises(CompileError, match="expected an expression") as caught:
        Toolchain(nvrtc).build(program, 90)
    (log,) = caught.value.reasons
    line = (
        program.expanded("sm_90", nvrtc.version).splitlines().index("constexpr int FACTOR = 2 +;")
    )
    assert f".cu({line + 1}): error" in log


def test_real_parallel_compilation(nvrtc: Compiler) -> None:
    """Several threads in NVRTC at once."""
    programs = [axpy(name=f"n{n}", header=f"constexpr int FACTOR = {n};") for n in range(6)]
    built = Toolchain(nvrtc).build_all(programs, 90)
    assert [binary.name for binary in built] == [program.name for program in programs]
    assert len({binary.image for binary in built}) == 6


def test_any_compiler(nvrtc: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that works; if none does, why not."""
    assert any_compiler().version
    broken = fail(errno.ENOENT)
    monkeypatch.setattr("e3nn_accel.nvrtc.cupy_compiler", broken)
    assert any_compiler().version == nvrtc.version
    monkeypatch.setattr("e3nn_accel.nvrtc.bindings_compiler", broken)
    with pytest.raises(CompileError, match="there is no NVRTC here"):
        any_compiler()


def test_nvrtc_is_told_to_keep_nothing() -> None:
    """What it takes from a cache of its own has no report on registers; older ones don't know the option."""
    given = ("--ptxas-options=-v",)
    assert all_options(given, "sm_90", (13, 5)) == [
        "--gpu-architecture=sm_90",
        "--no-cache",
        *given,
    ]
    assert "--no-cache" not in all_options(given, "sm_90", [12, 9])
