"""`e3nn-accel kernels warm` of a whole model: what is kept then is what the model loads when it runs."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from host_kernels import HostCompiler, HostProgram
from kernel_programs import Compilations, fake_compiler
from small_models import mace, molecules

import e3nn_accel
from e3nn_accel.backends import cuda
from e3nn_accel.cli import main
from e3nn_accel.compile import KernelProgram, Toolchain
from e3nn_accel.config import Config
from e3nn_accel.nvrtc import bindings_compiler

pytestmark = [pytest.mark.once, pytest.mark.mace]

SHIPPED = Path(__file__).parents[1] / "examples" / "water_ethanol" / "water_ethanol.model"
HOPPER = 90
FIRST_USE = {
    False: set(),
    # convolutions: by features and weights, without edges, and second derivatives
    True: {"convolution_backward_float_by_xw_staged", "convolution_double_float_staged"},
}
"""What isn't compiled ahead, in calls for forces and in training."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, named by the variable."""
    monkeypatch.setenv("E3NN_ACCEL_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def warmed(capsys: pytest.CaptureFixture[str], model: Path) -> int:
    """Warms for compute capability 9.0, and again; the programs that are listed then."""

    def said(*arguments: object) -> str:
        assert main(["kernels", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    first = said("warm", model, "--arch", f"sm_{HOPPER}")
    kernels = json.loads(said("list", "--json"))["kernels"]
    assert f"compiled {len(kernels)}, 0 were there" in first
    targets = {kernel["target"] for kernel in kernels}
    # some have instructions that it alone has
    assert targets - {f"sm_{HOPPER}a"} == {f"sm_{HOPPER}"}
    again = said("warm", model, "--arch", f"sm_{HOPPER}")
    assert f"compiled 0, {len(kernels)} were there" in again
    return len(kernels)


@pytest.fixture
def loaded(kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch) -> list[KernelProgram]:
    """Programs that would be loaded on such a device; their kernels do nothing."""
    found: list[KernelProgram] = []

    def noted(program: KernelProgram) -> KernelProgram:
        found.append(program)
        return program

    kernels_on_host.change = noted
    nothing = lambda *arguments, **shared: None  # noqa: E731
    monkeypatch.setattr(HostCompiler, "_build", lambda self, program: Path())
    monkeypatch.setattr(HostProgram, "kernel", lambda self, name, parameters: nothing)
    for of in pkgutil.iter_modules(cuda.__path__, f"{cuda.__name__}."):
        module = importlib.import_module(of.name)
        if hasattr(module, "architecture_of"):
            monkeypatch.setattr(module, "architecture_of", lambda device: HOPPER)
    return found


def run(model: Any, training: bool) -> None:
    """Energies and forces, or a step of training on them; numbers mean nothing."""
    batch = {
        name: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for name, t in molecules().items()
    }
    with e3nn_accel.enabled(self_check=False, backend="cuda", graph="0"):
        out = model(batch, training=training)
        if training:
            loss = out["energy"].sum() + out["forces"].square().sum()
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.usefixtures("eager_e3nn")
def test_what_a_model_loads_is_there(
    folder: Path,
    loaded: list[KernelProgram],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every program of a call, but those that the derivatives wanted decide about."""
    ahead, later = Compilations(), Compilations()
    monkeypatch.setattr("e3nn_accel.nvrtc.any_compiler", lambda: fake_compiler(ahead))
    model = mace().float()
    torch.save(model, tmp_path / "small.model")
    assert warmed(capsys, tmp_path / "small.model") == len(ahead) > 50
    for training in (False, True):
        run(model, training)
        Toolchain.of(Config.from_env(), fake_compiler(later)).build_all(loaded, HOPPER)
        assert {name.split(".")[0] for _, name, _, _ in later} <= FIRST_USE[training]
    assert len(set(loaded)) > 50


@pytest.mark.slow
def test_the_shipped_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the real compiler."""
    try:
        bindings_compiler()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no NVRTC by cuda-bindings: {error}")
    assert warmed(capsys, SHIPPED) > 50
