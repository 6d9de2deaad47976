"""Why kernels can't run here: one reason for each cause, and never an exception."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from e3nn_accel.availability import NEEDED, cuda_availability

pytestmark = pytest.mark.once

Install = Callable[..., None]


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No answer is kept, and torch is one for CUDA 13 on a machine with a device."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    cuda_availability.cache_clear()
    yield
    cuda_availability.cache_clear()
    for name in imported():  # half a CuPy would be the next test's
        del sys.modules[name]


def imported() -> list[str]:
    """CuPy's modules, whole or broken."""
    return [name for name in sys.modules if name.partition(".")[0] in ("cupy", "cupy_backends")]


def reason() -> str:
    """Why not; empty where kernels run."""
    found = cuda_availability()
    assert found.ok is not bool(found.reason)
    return found.reason


class Answers:
    """Attributes that answer, or raise what they are given."""

    def __init__(self, **answers: Any) -> None:
        for name, answer in answers.items():
            setattr(self, name, self._function(answer))

    @staticmethod
    def _function(answer: Any) -> Any:
        def function(*_: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return function


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a CuPy for CUDA 13 on a driver for 13.1, changed in some way."""

    def install(
        runtime: Any = 13000,
        driver: Any = 13010,
        devices: Any = 1,
        nvrtc: Any = (13, 0),
        hip: bool = False,
    ) -> None:
        modules = {name: ModuleType(name) for name in ("cupy", *NEEDED)}
        for name, functions in NEEDED.items():
            for function in functions:
                setattr(modules[name], function, lambda *_: None)
        answers = Answers(
            runtimeGetVersion=runtime,
            driverGetVersion=driver,
            getDeviceCount=devices,
            getVersion=nvrtc,
        )
        api = modules["cupy_backends.cuda.api.runtime"]
        vars(api).update(vars(answers), is_hip=hip)
        vars(modules["cupy_backends.cuda.libs.nvrtc"]).update(vars(answers))
        vars(modules["cupy"]).update(__version__="14.2.0", cuda=Answers())
        modules["cupy"].cuda.runtime = api
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    return install


def test_available(install: Install) -> None:
    """Everything is there."""
    install()
    assert reason() == ""


def test_asked_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning asks for every module."""
    install()
    assert reason() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    assert reason() == ""


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy isn't even looked for."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in reason()
    assert "cupy" not in sys.modules


def test_torch_for_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are CUDA."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in reason()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what torch says of it, once here and not as a warning."""

    def is_available() -> bool:
        warnings.warn(
            "CUDA initialization: the driver is too old (found 11040).\nUpdate", stacklevel=1
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = reason()
    assert found.startswith("torch finds no CUDA device or driver: CUDA initialization")
    assert "\n" not in found
    assert "cupy" not in sys.modules


def test_no_device_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES="", say."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "torch finds no CUDA device or driver"


@pytest.mark.parametrize(("cuda", "extra"), [("13.0", "cuda13"), ("12.8", "cuda12")])
def test_no_cupy(monkeypatch: pytest.MonkeyPatch, cuda: str, extra: str) -> None:
    """The extra to install is torch's CUDA."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert reason() == f"CuPy is not installed: pip install 'e3nn_accel[{extra}]'"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "raise ImportError('=====\\n\\nFailed to import CuPy.\\n=====')",
            "ImportError: Failed to",
        ),
        ("import no_such_part", "ModuleNotFoundError: No module named 'no_such_part'"),
        ("raise RuntimeError('CUDA path could not be detected')", "RuntimeError: CUDA path"),
        ("raise OSError('libcuda.so.1: cannot open')", "OSError: libcuda.so.1"),
        ("raise AttributeError", "AttributeError: no message"),
        ("1 +", "SyntaxError"),
        ("import ctypes; ctypes.CDLL('libnone.so')", "OSError: libnone.so"),
    ],
)
def test_cupy_broken_at_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, said: str
) -> None:
    """Whatever it raises."""
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert reason().startswith(f"CuPy is installed but broken: {said}")


def test_cupy_without_its_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half an installation."""
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text("__version__ = '14.2.0'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "cupy_backends", None)
    assert reason().startswith("CuPy 14.2.0 is broken, cupy_backends.cuda.api.driver: ")


def test_another_cupy(install: Install) -> None:
    """A release that has moved what is used."""
    install()
    del sys.modules["cupy_backends.cuda.api.driver"].launchKernel  # type: ignore[attr-defined]
    assert "has no cupy_backends.cuda.api.driver.launchKernel; versions 14.* have it" in reason()


def test_cupy_too_new_for_the_driver(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another CUDA than torch, and it can't work."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    install(runtime=13000, driver=12080)
    assert reason() == (
        "CuPy is built for CUDA 13, the driver supports CUDA 12.8: "
        "uninstall CuPy, then pip install 'e3nn_accel[cuda12]'"
    )


@pytest.mark.parametrize(("torchs", "cupys"), [("13.0", 12090), ("12.8", 13000)])
def test_cupy_of_another_cuda_that_works(
    install: Install, monkeypatch: pytest.MonkeyPatch, torchs: str, cupys: int
) -> None:
    """Both use the one driver, which is new enough for both."""
    monkeypatch.setattr(torch.version, "cuda", torchs)
    install(runtime=cupys)
    assert reason() == ""


def test_cupy_for_rocm(install: Install) -> None:
    """Beside a torch for CUDA."""
    install(hip=True)
    assert "CuPy is built for ROCm" in reason()


@pytest.mark.parametrize("devices", [0, RuntimeError("cudaErrorNoDevice: no CUDA-capable device")])
def test_cupy_finds_no_device(install: Install, devices: Any) -> None:
    """Where torch has found one."""
    install(devices=devices)
    assert reason().startswith("CuPy finds no CUDA device")


def test_no_nvrtc(install: Install) -> None:
    """CuPy installed without the extra that brings it."""
    install(nvrtc=RuntimeError("Failure finding libnvrtc.so"))
    assert "NVRTC" in reason()
    assert "Failure finding libnvrtc.so" in reason()
    assert "pip install 'e3nn_accel[cuda13]'" in reason()


def test_what_nobody_thought_of(install: Install) -> None:
    """Is a reason, too."""
    install(driver=MemoryError("odd"))
    assert reason() == "asking for CUDA failed: MemoryError: odd"
