"""`e3nn-accel kernels`: what is kept, dumped, deleted and compiled ahead."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_programs import Compilations, axpy, fake_compiler
from small_models import build

from e3nn_accel.availability import cuda_availability
from e3nn_accel.cli import main
from e3nn_accel.compile import Toolchain
from e3nn_accel.config import Config
from e3nn_accel.descriptor import LinearDescriptor
from e3nn_accel.hookspecs import hookimpl
from e3nn_accel.kernel_cache import KernelCache
from e3nn_accel.nvrtc import CompileError, bindings_compiler
from e3nn_accel.plan import Availability, Plan, PlanContext, Refusal
from e3nn_accel.programs import programs_for
from e3nn_accel.registry import load

pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, named by the variable."""
    monkeypatch.setenv("E3NN_ACCEL_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def kept(folder: Path) -> Path:
    """With two programs in it, one of them for two devices."""
    tools = Toolchain(fake_compiler(Compilations()), KernelCache(folder))
    for program, architecture in ((axpy(), 90), (axpy(), 75), (axpy(name="other"), 120)):
        tools.build(program, architecture)
    return folder


def succeeds(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Its standard output."""
    assert main(["kernels", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    """Its error."""
    assert main(["kernels", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_list(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each, with what it takes."""
    out = succeeds(capsys, "list")
    assert f"3 compiled programs in {kept}" in out
    lines = [line.split() for line in out.splitlines() if "99.0" in line]
    assert [line[:3] for line in lines] == [
        ["axpy", "sm_75", "99.0"],
        ["axpy", "sm_90", "99.0"],
        ["other", "compute_90", "99.0"],
    ]
    assert lines[1][-4:-1] == ["40", "28", "512"]
    assert lines[1][-1] == axpy().key("sm_90", "99.0")[:8]


def test_list_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first kernel, the folder isn't made either."""
    assert succeeds(capsys, "list") == f"0 compiled programs in {folder}\n"
    assert not folder.exists()


def test_list_damaged(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named, and what becomes of it."""
    (path,) = kept.glob("other*")
    path.write_bytes(b"x")
    out = succeeds(capsys, "list")
    assert "2 compiled programs" in out
    assert f"{path}: it is of another format; it will be compiled anew" in out


def test_list_json(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that is known, for bug reports."""
    document = json.loads(succeeds(capsys, "list", "--json"))
    assert document["folder"] == str(kept)
    assert document["broken"] == []
    facts = document["kernels"][1]
    assert (facts["name"], facts["target"], facts["nvrtc"]) == ("axpy", "sm_90", "99.0")
    assert facts["resources"]["axpy"]["registers"] == 40


def test_dump(kept: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every device's, where the name is all that was given."""
    out = succeeds(capsys, "dump", "axpy", tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert sorted(out.split()) == sorted(map(str, files))
    assert [file.suffix for file in files] == [".cu", ".cubin", ".txt"] * 2
    assert "compiled for sm_75 by NVRTC 99.0" in files[0].read_text()


def test_dump_by_glob_or_key(
    kept: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, unless a folder is given."""
    monkeypatch.chdir(tmp_path)
    assert ".ptx" in succeeds(capsys, "dump", "oth*")
    assert len(list(tmp_path.glob("*.ptx"))) == 1
    succeeds(capsys, "dump", axpy().key("sm_90", "99.0")[:8])
    assert len(list(tmp_path.glob("*.cubin"))) == 1


def test_dump_nothing(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names that there are."""
    assert "no kernel 'convolution' (it has: axpy, other)" in fails(
        capsys, "dump", "convolution", code=2
    )


def test_dump_to_nowhere(kept: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "taken").write_text("")
    assert "can't write to" in fails(capsys, "dump", "other", tmp_path / "taken")


def test_clear(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of ours."""
    assert succeeds(capsys, "clear") == f"deleted 3 compiled programs from {kept}\n"
    assert list(kept.iterdir()) == []
    assert "deleted 0" in succeeds(capsys, "clear")


def test_clear_without_permission(
    kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Says why."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert "can't delete" in fails(capsys, "clear")


# warm


class AxpyBackend:
    """Has a kernel for every Linear; can't run here."""

    name, priority = "axpy", 100

    def available(self) -> Availability:
        return Availability(False, "no device")

    def plan(self, descriptor: Any, context: PlanContext) -> Plan | Refusal:
        assert context.device.type == "cuda"
        if not isinstance(descriptor, LinearDescriptor):
            return Refusal(self.name, "has kernels for Linear alone")
        real = {torch.float32: "float", torch.float64: "double"}[context.dtype]
        program = axpy(name=f"axpy_{real}", macros=(f"REAL={real}",))
        return Plan(self.name, descriptor, "axpy", lambda: torch.ones(1), (program,))


class AxpyPlugin:
    """Brings it."""

    @hookimpl
    def e3nn_accel_backends(self) -> list[AxpyBackend]:
        return [AxpyBackend()]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is installed, and the only one with kernels."""
    found = load(Config(blocked_plugins=("cuda",)))
    found.manager.register(AxpyPlugin(), name="axpy")
    monkeypatch.setattr("e3nn_accel.programs.registry", lambda: found)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save modules as a model's file."""

    def save(*modules: torch.nn.Module) -> Path:
        torch.save(torch.nn.Sequential(*modules), tmp_path / "file.model")
        return tmp_path / "file.model"

    return save


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tests run on one."""
    answer = Availability(False, "torch is built without CUDA")
    monkeypatch.setattr("e3nn_accel.availability.cuda_availability", lambda: answer)


@pytest.mark.usefixtures("plugin")
def test_programs_of_a_model() -> None:
    """Each once, in the model's precision or in those asked for."""
    model = torch.nn.Sequential(build("Linear", 0), build("Linear", 1), build("FullTensorProduct"))
    names = lambda *dtypes: [p.name for p in programs_for(model, dtypes, Config())[0]]  # noqa: E731
    assert names() == ["axpy_float"]
    assert names("float64") == ["axpy_double"]
    assert names("float64", "float32") == ["axpy_double", "axpy_float"]
    assert programs_for(model.double(), (), Config())[0][0].name == "axpy_double"
    assert programs_for(model, (), Config(backend="torch")) == ([], [])
    assert "axpy: has kernels for Linear alone" in programs_for(model, (), Config())[1]


@pytest.mark.usefixtures("plugin", "no_gpu")
def test_warm_without_a_device(
    folder: Path, save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled by the real compiler, once."""
    try:
        version = bindings_compiler().version
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no NVRTC by cuda-bindings: {error}")
    path = save(build("Linear"))
    out = succeeds(capsys, "warm", path, "--arch", "sm_90", "--dtype", "float32,float64")
    assert f"compiled 2, 0 were there, in {folder}" in out
    assert f"NVRTC {version}" in out
    assert "axpy_double  sm_90" in out
    assert "compiled 0, 2 were there" in succeeds(
        capsys, "warm", path, "--arch", "90", "--dtype", "float64,float32"
    )
    assert len(list(folder.glob("*.kernel"))) == 2


@pytest.mark.usefixtures("plugin")
def test_warm_for_the_devices_here(
    folder: Path,
    save: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each kind of device once."""
    calls = Compilations()
    there = lambda: Availability(True)  # noqa: E731
    monkeypatch.setattr("e3nn_accel.availability.cuda_availability", there)
    monkeypatch.setattr("e3nn_accel.nvrtc.cupy_compiler", lambda: fake_compiler(calls))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    capabilities = [(9, 0), (7, 5), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert "compiled 2, 0 were there" in succeeds(capsys, "warm", save(build("Linear")))
    assert sorted(target for *_, target in calls) == ["sm_75", "sm_90"]


@pytest.mark.usefixtures("folder", "no_gpu")
def test_warm_where_nothing_runs(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason, and what can be done here."""
    error = fails(capsys, "warm", save(build("Linear")))
    assert "no kernels run on this machine: torch is built without CUDA" in error
    assert "--arch sm_90" in error


@pytest.mark.usefixtures("folder", "no_gpu")
def test_warm_where_nothing_compiles(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason of each way to compile, and what to install."""

    def nothing() -> Any:
        raise CompileError("there is no NVRTC here", ["bindings_compiler: ImportError: no cuda"])

    monkeypatch.setattr("e3nn_accel.nvrtc.any_compiler", nothing)
    error = fails(capsys, "warm", save(build("Linear")), "--arch", "sm_90")
    assert "nothing can be compiled here" in error
    assert "ImportError: no cuda" in error
    assert "pip install cuda-bindings nvidia-cuda-nvrtc" in error


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Compilations:
    """A compiler is found."""
    calls = Compilations()
    monkeypatch.setattr("e3nn_accel.nvrtc.any_compiler", lambda: fake_compiler(calls))
    return calls


@pytest.mark.usefixtures("folder", "plugin", "compiles")
def test_warm_for_a_device_too_old(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The oldest that it would compile for."""
    error = fails(capsys, "warm", save(build("Linear")), "--arch", "sm_60")
    assert "has no code for sm_60" in error
    assert "sm_75" in error


@pytest.mark.usefixtures("folder", "plugin", "compiles")
def test_warm_without_kernels(
    save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Why there are none."""
    path = save(build("FullTensorProduct"))
    error = fails(capsys, "warm", path, "--arch", "sm_90")
    assert "no kernels to compile: axpy: has kernels for Linear alone" in error
    error = fails(capsys, "warm", save(torch.nn.Linear(2, 2)), "--arch", "sm_90")
    assert "it has no module that is accelerated" in error


@pytest.mark.usefixtures("plugin", "compiles")
def test_warm_without_a_place(
    save: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Compiling ahead without keeping it is a failure."""
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("E3NN_ACCEL_CACHE_DIR", str(tmp_path / "taken"))
    assert "can't keep" in fails(capsys, "warm", save(build("Linear")), "--arch", "sm_90")


@pytest.mark.usefixtures("folder", "compiles")
def test_warm_a_file_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As every command that takes a model."""
    assert "no such file" in fails(
        capsys, "warm", tmp_path / "none.model", "--arch", "sm_90", code=2
    )


@pytest.mark.parametrize("arch", ["90a", "hopper", "compute_90", ""])
def test_strange_architectures(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Say what is wanted."""
    with pytest.raises(SystemExit):
        main(["kernels", "warm", "x", "--arch", arch])
    assert "wanted sm_90, say" in capsys.readouterr().err


def test_availability_is_a_real_answer() -> None:
    """On this machine, whatever it is."""
    found = cuda_availability()
    assert found.ok is not bool(found.reason)
