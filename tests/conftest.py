"""What every test may rely on: e3nn imports, stock before and after, bounded hypothesis runs."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

if "E3NN_ACCEL_CHECKPOINTS" in os.environ:  # which would be taken for a misspelt variable of ours
    os.environ["CHECKPOINTS_OF_TESTS"] = os.environ.pop("E3NN_ACCEL_CHECKPOINTS")

import pytest
import torch
from host_kernels import HostCompiler, compiler
from hypothesis import HealthCheck, Phase, settings

import e3nn_accel
from e3nn_accel.backends.torch import tensor_product
from e3nn_accel.plan import Availability

torch.set_num_threads(1)

_COMMON = settings(
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("ci", _COMMON, max_examples=30, derandomize=True, database=None)
settings.register_profile("full", _COMMON, max_examples=400, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def stock_before_and_after() -> Iterator[None]:
    """Every test starts with stock e3nn and float32, and leaves nothing switched on."""
    e3nn_accel.disable()
    dtype = torch.get_default_dtype()
    yield
    e3nn_accel.disable()
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def small_products_are_ours(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests are of plans, and most have few rows, which on a CPU stock e3nn has by choice."""
    if request.node.get_closest_marker("few_rows") is None:
        monkeypatch.setattr(tensor_product, "FEWEST_ROWS", 0)
        monkeypatch.setattr(tensor_product, "LEAST_WORK", 0)


@pytest.fixture
def float64() -> None:
    """Modules and tensors of this test are float64 unless it says otherwise."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="session")
def eager_e3nn() -> Iterator[None]:
    """e3nn builds modules without TorchScript: the same mathematics, built several times faster."""
    import e3nn

    before = e3nn.get_optimization_defaults()
    e3nn.set_optimization_defaults(jit_script_fx=False)
    yield
    e3nn.set_optimization_defaults(**before)


@pytest.fixture(scope="session")
def host_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels compiled for the CPU are, for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "host_kernels"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def kernels_on_host(host_folder: Path, monkeypatch: pytest.MonkeyPatch) -> HostCompiler:
    """The cuda backend plans for CPU tensors, and its kernels run on the CPU."""
    if compiler() is None:
        pytest.skip("no g++")
    from e3nn_accel.backends import cuda

    host = HostCompiler(host_folder)
    for found in pkgutil.iter_modules(cuda.__path__, f"{cuda.__name__}."):
        module = importlib.import_module(found.name)
        if hasattr(module, "load_all"):
            monkeypatch.setattr(module, "load_all", host.load_all)
    monkeypatch.setattr(cuda.CudaBackend, "device_type", "cpu")
    monkeypatch.setattr(cuda.CudaBackend, "available", lambda self: Availability(True))
    return host


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
