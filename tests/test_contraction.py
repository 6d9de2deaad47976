"""MACE's symmetric contraction in the reduced basis: the same function of the same weights."""

from __future__ import annotations

import functools
import io
from typing import Any

import comparison
import mace_parts
import pytest
import torch
from comparison import (
    Behaviour,
    Operands,
    accelerated,
    assert_close,
    derivatives,
    draw,
    poisoned_memory,
)
from mace_parts import ATTRS, Contraction, node_attrs

from e3nn_accel.descriptor import Coupling
from e3nn_accel.layout import expand_weights, reduce_weights
from e3nn_accel.symmetric_basis import SymmetricBasis, symmetric_basis

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [pytest.mark.mace, pytest.mark.usefixtures("float64")]

TOLERANCE = 1e-12

SMALL = Contraction("0e+1o", "0e+1o", 3)
"""For everything that doesn't depend on the irreps."""

SHAPES = [
    Contraction("0e+1o", "0e", 1),
    Contraction("0e+1o", "1o+0e", 2),
    Contraction("0e+1o", "0e+1o", 4),
    Contraction("0e+1o+2e", "0e+1o+2e", 2),
    Contraction("0e+1o+2e", "0e+1o", 3, channels=5),
    Contraction("0e+1o+2e+3o", "0e+1o", 3, channels=2),
    Contraction("0e+1o+2e+3o", "2e", 2, channels=1, species=1),
    Contraction("0e+0o+1o+1e", "0e+0o+1o+1e", 2),
]

EMPTY = Contraction("0e+1o", "2e", 3)
"""Nothing of degree 1 reaches 2e: MACE puts an EmptyParam somewhere."""


def leaves(module: Any, x: torch.Tensor, y: torch.Tensor) -> Operands:
    """Features, node_attrs as given, and every weight that takes gradients."""
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return {"x": x.clone().requires_grad_(), "y": y, **weights}


def call(module: Any, o: Operands) -> torch.Tensor:
    out: torch.Tensor = module(o["x"], o["y"])
    return out


def check(module: Any, x: torch.Tensor, y: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Values, first and second derivatives by features, weights and (if wanted) node_attrs."""
    operands = leaves(module, x, y)
    expected = derivatives(functools.partial(call, module), operands)
    with accelerated(), poisoned_memory():
        found = derivatives(functools.partial(call, module), operands)
        comparison.assert_ran_on_torch(module, "contraction", 1)
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_stock(shape: Contraction) -> None:
    """Correlations 1 to 4, several outputs, odd channels, both parities."""
    check(shape.build(), shape.features(6), node_attrs("all species", 6, shape.species))


@pytest.mark.slow
def test_large_shape() -> None:
    """MACE-MP's irreps with all three outputs."""
    shape = Contraction("0e+1o+2e+3o", "0e+1o+2e", 3, channels=8, species=89)
    check(shape.build(), shape.features(40), node_attrs("all species", 40, 89))


@pytest.mark.parametrize("attrs", ATTRS)
@pytest.mark.parametrize("gradient", [False, True], ids=["constant", "wants gradient"])
def test_node_attrs(attrs: str, gradient: bool) -> None:
    """One-hot or not, the function is linear in node_attrs, and so is its gradient."""
    y = node_attrs(attrs, 7).requires_grad_(gradient)
    check(SMALL.build(), SMALL.features(7), y)


@pytest.mark.parametrize("nodes", [1, 2])
def test_few_nodes(nodes: int) -> None:
    """Fewer nodes than species."""
    check(SMALL.build(), SMALL.features(nodes), node_attrs("all species", nodes))


def test_no_nodes() -> None:
    """An empty result, and zero gradients; MACE itself can't reshape no rows."""
    module = SMALL.build()
    operands = leaves(module, SMALL.features(0), node_attrs("all species", 0))
    with accelerated():
        found = derivatives(functools.partial(call, module), operands)
    assert found.tensors["value"].shape == (0, module.irreps_out.dim)
    assert not any(bool(t.any()) for t in found.tensors.values())


def test_more_nodes_than_a_chunk() -> None:
    """Nodes are taken some thousand columns at a time; here the last chunk is a partial one."""
    shape = Contraction("0e+1o", "0e+1o", 2, channels=700)
    check(shape.build(), shape.features(13), node_attrs("all species", 13))


@pytest.mark.parametrize("outputs", ["1e", "1e+0e"])
def test_antisymmetric_output(outputs: str) -> None:
    """1o x 1o -> 1e is antisymmetric: of equal features nothing remains, in stock only rounding."""
    shape = Contraction("0e+1o", outputs, 2)
    module, x, y = saved_and_loaded(shape.build()), shape.features(5), node_attrs("all species", 5)
    with accelerated():
        out = module(x, y)
        comparison.assert_ran_on_torch(module, "contraction", 1)
    assert out[:, : 3 * shape.channels].abs().max() < 1e-14


def saved_and_loaded(module: Any) -> Any:
    """As from a file: an EmptyParam comes back as an ordinary Parameter."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_cross_product_among_others() -> None:
    """Outputs that are partly antisymmetric."""
    shape = Contraction("0e+1o+1e", "0e+1e", 3, channels=2)
    check(shape.build(), shape.features(5), node_attrs("all species", 5))


@pytest.mark.parametrize("strided", ["features", "node_attrs", "both"])
def test_strided_operands(strided: str) -> None:
    """Features as MACE's reshape leaves them (a transposed view), node_attrs expanded."""
    x, y = SMALL.features(6), node_attrs("one species", 1).expand(6, -1)
    if strided != "node_attrs":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert not x.is_contiguous()
    if strided == "features":
        y = y.contiguous()
    check(SMALL.build(), x, y)


@pytest.mark.parametrize("name", ["weights_max", "weights.0", "weights.1"])
def test_one_weight_at_a_time(name: str) -> None:
    """Each weight's function alone: the others are zero, and only it wants a gradient."""
    module = SMALL.build()
    for path, parameter in module.named_parameters():
        parameter.requires_grad_(path.endswith(name))
        if not path.endswith(name):
            parameter.data.zero_()
    check(module, SMALL.features(5), node_attrs("all species", 5))


def empty_module() -> Any:
    """A module with an EmptyParam, which doesn't lie where its couplings are zero."""
    module = EMPTY.build()
    kinds = {name: type(p).__name__ for name, p in module.named_parameters()}
    assert kinds["contractions.0.weights.0"] == "EmptyParam"
    assert bool((module.contractions[0].U_matrix_1 == 0).all())
    assert bool((module.contractions[0].U_matrix_2 != 0).any())
    return module


def test_empty_parameters() -> None:
    """Just built: weights that MACE zeroed and froze."""
    check(empty_module(), EMPTY.features(5), node_attrs("all species", 5))


def test_empty_parameters_without_self_check() -> None:
    """The plan itself is right about them."""
    module, x, y = empty_module(), EMPTY.features(5), node_attrs("all species", 5)
    operands = leaves(module, x, y)
    expected = derivatives(functools.partial(call, module), operands)
    with accelerated(self_check=False):
        found = derivatives(functools.partial(call, module), operands)
        comparison.assert_ran_on_torch(module, "contraction", 1)
    assert_close(found, expected, TOLERANCE)


def test_empty_parameters_from_a_file() -> None:
    """A checkpoint has ordinary parameters there."""
    module = saved_and_loaded(empty_module())
    for attrs in ("all species", "random"):
        check(module, EMPTY.features(5), node_attrs(attrs, 5))


def test_frozen_weights() -> None:
    """A model in evaluation: nothing but the features wants a gradient."""
    module = SMALL.build().requires_grad_(False)
    check(module, SMALL.features(5), node_attrs("all species", 5))


def test_built_in_float32_used_in_float64() -> None:
    """Constants rounded to float32 are the ones to reproduce, to float64 accuracy."""
    shape = Contraction("0e+1o+2e", "0e+1o", 3)
    module = shape.build(torch.float32).double()
    check(module, shape.features(6), node_attrs("all species", 6))


def test_float32() -> None:
    """Single precision is as good as stock's, against the float64 truth."""
    shape = Contraction("0e+1o+2e", "0e+1o+2e", 3, channels=4)
    module = shape.build(torch.float32)
    exact = shape.build(torch.float32).double()
    x, y = shape.features(30, dtype=torch.float32), node_attrs("all species", 30)
    truth = derivatives(functools.partial(call, exact), leaves(exact, x.double(), y))
    operands = leaves(module, x, y.float())
    stock = derivatives(functools.partial(call, module), operands)
    with accelerated():
        found = derivatives(functools.partial(call, module), operands)
        comparison.assert_ran_on_torch(module, "contraction", 1)
    comparison.assert_as_good_as(found, stock, truth, 1e-6)


def test_gradgradcheck() -> None:
    """Second derivatives against finite differences, node_attrs included."""
    shape = Contraction("0e+1o", "0e+1o", 2, channels=1, species=2)
    module = shape.build()
    operands = leaves(module, shape.features(2), node_attrs("random", 2, 2).requires_grad_())
    with accelerated():
        assert torch.autograd.gradgradcheck(lambda x, y, *_: module(x, y), tuple(operands.values()))


def test_rotation_equivariance() -> None:
    """Rotated and inverted features give a rotated and inverted result."""
    from e3nn import o3

    shape = Contraction("0e+1o+2e+3o", "0e+1o+2e", 3, channels=2)
    module, x, y = shape.build(), shape.features(4), node_attrs("all species", 4)
    rotation = -o3.matrix_x(torch.tensor(0.7)) @ o3.matrix_y(torch.tensor(1.9))
    into = o3.Irreps(shape.components).D_from_matrix(rotation)
    out = o3.Irreps([(2, ir) for _, ir in o3.Irreps(shape.outputs)]).D_from_matrix(rotation)
    with accelerated():
        found, expected = module(x @ into.T, y), module(x, y) @ out.T
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_reduced_couplings() -> None:
    """MACE's other basis, made by cuequivariance."""
    pytest.importorskip("cuequivariance", reason="use_reduced_cg needs cuequivariance")
    shape = Contraction("0e+1o+2e", "0e+1o", 3, use_reduced_cg=True)
    module = shape.build()
    full = Contraction("0e+1o+2e", "0e+1o", 3).build()
    assert module.contractions[0].weights_max.shape[1] < full.contractions[0].weights_max.shape[1]
    check(module, shape.features(5), node_attrs("all species", 5))


def test_reduced_couplings_without_cuequivariance() -> None:
    """MACE then builds the ordinary basis, whatever was asked; so do we follow it."""
    try:
        import cuequivariance  # noqa: F401
    except ImportError:
        shape = Contraction("0e+1o", "0e+1o", 2, use_reduced_cg=True)
        check(shape.build(), shape.features(5), node_attrs("all species", 5))
        return
    pytest.skip("cuequivariance is installed")


# Two coupling bases without cuequivariance: a module given reduced couplings by hand.


def bases(shape: Contraction) -> dict[str, tuple[torch.Tensor, SymmetricBasis]]:
    """U and its reduced basis, by output and degree."""
    found = {}
    outputs = shape.outputs.split("+")
    for contraction, output in zip(shape.build().contractions, outputs, strict=True):
        for nu in range(1, shape.correlation + 1):
            u = getattr(contraction, f"U_matrix_{nu}")
            u = u.unsqueeze(0) if u.dim() == nu + 1 else u
            found[f"{output} {nu}"] = (u, symmetric_basis(Coupling.of(u.numpy()), 2.2e-16))
    return found


MP = Contraction("0e+1o+2e+3o", "0e+1o+2e", 3, channels=1, species=2)
SIZES = {
    "0e": ((1, 4, 23), (1, 4, 8)),
    "1o": ((1, 6, 51), (1, 3, 12)),
    "2e": ((1, 7, 65), (1, 5, 14)),
}
"""Paths of degree 1, 2, 3: MACE's, and independent ones."""


@pytest.fixture(scope="module")
def mp_bases() -> dict[str, tuple[torch.Tensor, SymmetricBasis]]:
    return bases(MP)


@pytest.mark.parametrize("output", SIZES)
def test_sizes_of_the_reduced_basis(output: str, mp_bases: dict[str, Any]) -> None:
    """Known ranks of the symmetrised couplings of 0e+1o+2e+3o."""
    found = [mp_bases[f"{output} {nu}"] for nu in (1, 2, 3)]
    assert tuple(u.shape[-1] for u, _ in found) == SIZES[output][0]
    assert tuple(len(basis.coefficients) for _, basis in found) == SIZES[output][1]


@pytest.mark.parametrize("key", [f"{output} {nu}" for output in SIZES for nu in (2, 3)])
def test_weights_there_and_back(key: str, mp_bases: dict[str, Any]) -> None:
    """Reduced weights survive the way there and back; original ones keep their function."""
    u, basis = mp_bases[key]
    projection = torch.as_tensor(basis.projection)
    reduced = draw((2, projection.shape[1], 5), 1)
    back = reduce_weights(expand_weights(reduced, projection), projection)
    torch.testing.assert_close(back, reduced, rtol=1e-10, atol=1e-10)

    original = draw((2, projection.shape[0], 5), 2)
    same = expand_weights(reduce_weights(original, projection), projection)
    x = draw((16,), 3)
    polynomials = u
    for _ in range(int(key[-1])):
        polynomials = torch.tensordot(polynomials, x, dims=([1], [0]))
    torch.testing.assert_close(polynomials @ same, polynomials @ original, rtol=1e-10, atol=1e-10)


def test_weight_conversion_is_differentiable(mp_bases: dict[str, Any]) -> None:
    """Both ways, twice."""
    projection = torch.as_tensor(mp_bases["0e 2"][1].projection)
    original = draw((2, projection.shape[0], 2), 1).requires_grad_()
    reduced = draw((2, projection.shape[1], 2), 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: reduce_weights(w, projection), original)
    assert torch.autograd.gradcheck(lambda w: expand_weights(w, projection), reduced)
    square = lambda w: reduce_weights(w, projection) ** 2  # noqa: E731
    assert torch.autograd.gradgradcheck(square, original)


def test_a_basis_that_is_reduced_already() -> None:
    """Couplings that are symmetric and independent keep every path, and give stock's numbers."""
    module = SMALL.build()
    for contraction in module.contractions:
        for nu in (2, 3):
            _replace_by_symmetric(contraction, nu)
    check(module, SMALL.features(6), node_attrs("all species", 6))


def _replace_by_symmetric(contraction: Any, nu: int) -> None:
    """Put the independent symmetric couplings in place of MACE's, and weights for them."""
    u = getattr(contraction, f"U_matrix_{nu}")
    scalar = u.dim() == nu + 1
    full = u.unsqueeze(0) if scalar else u
    basis = symmetric_basis(Coupling.of(full.numpy()), 2.2e-16)
    kept = torch.zeros(*full.shape[:-1], len(basis.coefficients))
    for column, monomial in enumerate(basis.monomials):
        kept[(slice(None), *monomial)] = torch.as_tensor(basis.coefficients[:, :, column]).T
    setattr(contraction, f"U_matrix_{nu}", kept[0] if scalar else kept)
    shape = (mace_parts.SPECIES, kept.shape[-1], mace_parts.CHANNELS)
    weight = torch.nn.Parameter(draw(shape, nu))
    if nu == contraction.correlation:
        contraction.weights_max = weight
    else:
        contraction.weights[contraction.correlation - nu - 1] = weight


# Wrong arguments

BAD = {
    "features too narrow": lambda x, y: (x[..., :-1], y),
    "channels missing": lambda x, y: (x[:, :-1], y),
    "species missing": lambda x, y: (x, y[:, :-1]),
    "fewer attrs than nodes": lambda x, y: (x, y[:-2]),
    "flat features": lambda x, y: (x.flatten(1), y),
    "other dtype": lambda x, y: (x.float(), y),
    "attrs of other dtype": lambda x, y: (x, y.float()),
    "not a tensor": lambda x, y: (x.tolist(), y),
    "one attrs for all": lambda x, y: (x, y[:1]),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments(name: str, strict: bool) -> None:
    """Stock's own result, or exactly its error."""
    module = SMALL.build()
    arguments = BAD[name](SMALL.features(5), node_attrs("all species", 5))
    stock = Behaviour.of(lambda: module(*arguments))
    with accelerated(strict=strict and stock.error is not None):
        Behaviour.of(lambda: module(*arguments)).assert_like(stock)
