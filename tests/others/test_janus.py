"""janus-core's commands and phonopy, by the environment variable alone."""

from __future__ import annotations

import pytest
from both_ways import MODEL, PROGRAMS, STRUCTURES, BothWays, run_both

TOLERANCE = {
    "janus": {
        "single energy": 1e-10, "single forces": 1e-7, "single stress": 1e-7, "single hessian": 1e-7, "dynamics": 1e-7,
        "relaxed": 1e-7, "phonons": 1e-7,
    },
    "phonopy": {"constants": 1e-8, "frequencies": 1e-7},
}  # fmt: skip
"""janus-core writes eight decimals."""


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> BothWays:
    pytest.importorskip("janus_core", reason="janus-core isn't installed (make test-others)")
    program = PROGRAMS / "simulate_with_janus.py"
    return run_both(tmp_path_factory.mktemp("janus"), [program, MODEL, STRUCTURES, "results.npz"])


@pytest.fixture(scope="module")
def phonopy(tmp_path_factory: pytest.TempPathFactory) -> BothWays:
    pytest.importorskip("phonopy", reason="phonopy isn't installed (make test-others)")
    program = PROGRAMS / "simulate_with_phonopy.py"
    return run_both(tmp_path_factory.mktemp("phonopy"), [program, MODEL, "results.npz"])


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package, names in TOLERANCE.items() for name in names]
)
def test_like_stock(package: str, name: str, request: pytest.FixtureRequest) -> None:
    """What each command writes."""
    request.getfixturevalue(package).assert_same(name, TOLERANCE[package][name])


@pytest.mark.parametrize("package", TOLERANCE)
def test_all_in_plans(package: str, request: pytest.FixtureRequest) -> None:
    """Nothing fell back."""
    operations = ("linear", "convolution", "contraction", "tensor_product")
    request.getfixturevalue(package).assert_planned(*operations)
