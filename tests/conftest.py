"""What every test may rely on: e3nn imports, stock before and after, bounded hypothesis runs."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import e3nn_accel

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
