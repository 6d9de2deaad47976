"""Polynomials written in quadratic covariants: the same as MACE's couplings, and fewer terms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from contraction_parity import check_operands
from mace_parts import Contraction, node_attrs
from numpy.typing import NDArray

from e3nn_accel.backends.cuda.contraction_code import lines_of
from e3nn_accel.backends.cuda.contraction_paths import Paths, Terms
from e3nn_accel.descriptor import ContractionDescriptor
from e3nn_accel.patches.symmetric_contraction import e3nn_accel_describe

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [pytest.mark.mace, pytest.mark.once, pytest.mark.usefixtures("float64")]

EPSILON = {torch.float32: 2**-23, torch.float64: 2**-52}
CASES = {
    "MACE": Contraction("0e+1o+2e+3o", "0e+1o", 3),
    "high degrees first": Contraction("2e+0e+1o", "1o+2e", 3),
    "both parities": Contraction("0e+0o+1o+1e", "0e+1o+1e", 3),
    "twice the same": Contraction("0e+1o+1o", "0e+1o", 3),
    "degree four": Contraction("0e+1o", "0e+1o", 4),
}


def described(
    shape: Contraction, dtype: torch.dtype = torch.float64, degrees: bool = True
) -> ContractionDescriptor:
    found = e3nn_accel_describe(shape.build(dtype), "contraction")
    assert isinstance(found, ContractionDescriptor)
    return found if degrees else replace(found, degrees=())


def values(terms: Terms, variables: NDArray[np.float64]) -> NDArray[np.float64]:
    return sum((c * variables[list(m)].prod(0) for m, c in terms), np.zeros(variables.shape[1]))


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("expanded", [False, True])
def test_the_polynomials_span_the_couplings(case: str, expanded: bool) -> None:
    """Every original path is what the projection says, for random features."""
    d = described(CASES[case])
    paths = Paths.of(d, EPSILON[torch.float64])
    paths = paths.expanded() if expanded else paths
    x = np.random.default_rng(1).normal(size=(d.components, 5))
    variables = np.concatenate([x, *(values(t, x)[None] for t in paths.features)])
    first = 0
    couplings = [c for output in d.outputs for c in output.couplings]
    for coupling, projection in zip(couplings, paths.projections, strict=True):
        ours = paths.paths[first : first + projection.shape[1]]
        first += len(ours)
        if not ours:
            continue
        found = np.array([[values(t, variables) for t in path.components] for path in ours])
        dense = coupling.dense()
        letters = "ijkl"[: dense.ndim - 2]
        features = ",".join(f"{letter}n" for letter in letters)
        expected = np.einsum(f"m{letters}p,{features}->mpn", dense, *[x] * len(letters))
        np.testing.assert_allclose(
            np.einsum("pr,rmn->mpn", projection, found),
            expected,
            atol=1e-12 * np.abs(expected).max(),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fewer_multiply_adds(dtype: torch.dtype) -> None:
    """Half as many; and the maps to the basis lose no digits."""
    with_factors = Paths.of(described(CASES["MACE"], dtype), EPSILON[dtype])
    without = Paths.of(described(CASES["MACE"], dtype, degrees=False), EPSILON[dtype])
    assert with_factors.features
    assert not without.features
    assert lines_of(with_factors) < 0.6 * lines_of(without)
    for projection in with_factors.projections:
        assert np.linalg.cond(projection) < 30


def test_degrees_that_are_wrong() -> None:
    """What isn't in the span is left out."""
    d = described(CASES["MACE"])
    wrong = Paths.of(replace(d, degrees=(3, 2, 1, 0)), EPSILON[torch.float64])
    assert wrong.weights == Paths.of(d, EPSILON[torch.float64]).weights


@pytest.mark.usefixtures("kernels_on_host")
def test_constants_that_were_rounded() -> None:
    """A float32 model in float64 keeps its own polynomials, and its own values."""
    shape = Contraction("0e+1o", "0e+1o", 3)
    module = shape.build(torch.float32).double()
    check_operands(module, shape.features(5), node_attrs("all species", 5))
