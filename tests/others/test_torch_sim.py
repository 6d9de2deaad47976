"""torch-sim's MaceModel, by the environment variable alone."""

from __future__ import annotations

import pytest
from both_ways import MODEL, PROGRAMS, STRUCTURES, BothWays, run_both

pytest.importorskip("torch_sim", reason="torch-sim-atomistic isn't installed (make test-others)")

TOLERANCE = {
    "batch energy": 1e-12,
    "batch forces": 1e-9,
    "batch stress": 1e-9,
    "dynamics": 1e-9,
    "fire": 1e-9,
    "cells": 1e-9,
}


@pytest.fixture(scope="module")
def simulations(tmp_path_factory: pytest.TempPathFactory) -> BothWays:
    program = PROGRAMS / "simulate_with_torch_sim.py"
    return run_both(
        tmp_path_factory.mktemp("torch_sim"), [program, MODEL, STRUCTURES, "results.npz"]
    )


@pytest.mark.parametrize("name", TOLERANCE)
def test_like_stock(simulations: BothWays, name: str) -> None:
    """Of systems of different sizes in one batch."""
    simulations.assert_same(name, TOLERANCE[name])


def test_all_in_plans(simulations: BothWays) -> None:
    """Nothing fell back."""
    simulations.assert_planned("linear", "convolution", "contraction", "tensor_product")
