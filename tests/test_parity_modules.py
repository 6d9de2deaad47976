"""Random modules of every class and option: stock e3nn's numbers, to the second derivative."""

from __future__ import annotations

import copy
import functools

import comparison
import pytest
import strategies
import torch
from comparison import Derivatives, accelerated, assert_close, derivatives, poisoned_memory
from hypothesis import given, settings
from strategies import Case

pytestmark = pytest.mark.usefixtures("eager_e3nn")

FLOAT64 = 1e-12
FLOAT32 = 2e-6


def outcome(case: Case, module: torch.nn.Module, dtype: torch.dtype) -> Derivatives | Exception:
    """All derivatives, or the exception that the call raised."""
    operands = case.operands(module, dtype)
    try:
        case.call(module, operands)
    except Exception as error:
        return error
    return derivatives(functools.partial(case.call, module), operands, case.seed)


def same_error(found: Derivatives | Exception, expected: Exception) -> bool:
    return type(found) is type(expected) and str(found) == str(expected)


def is_refused(case: Case, module: torch.nn.Module) -> bool:
    """A Linear with feature columns but no weights of its own doesn't say how many it has."""
    own_weights = case.weights == "internal" and module.weight_numel > 0
    return "f_in" in dict(case.options) and not own_weights


def check_refused(case: Case, module: torch.nn.Module) -> None:
    """Stock e3nn takes the calls, even where no self-check would catch a wrong plan."""
    expected = outcome(case, module, torch.float64)
    with accelerated(strict=False, self_check=False):
        found = outcome(case, module, torch.float64)
        assert {backend for _, backend in comparison.usage(module)} == {"e3nn"}
    assert isinstance(found, Derivatives)
    assert isinstance(expected, Derivatives)
    assert_close(found, expected, FLOAT64)


def check_float64(case: Case) -> None:
    """Values and derivatives equal stock's, on the torch backend, with unset memory poisoned."""
    module = case.build()
    if is_refused(case, module):
        check_refused(case, module)
        return
    expected = outcome(case, module, torch.float64)
    with accelerated(), poisoned_memory():
        found = outcome(case, module, torch.float64)
        if isinstance(expected, Exception):
            assert same_error(found, expected), f"stock {expected!r}, ours {found!r}"
            return
        if isinstance(found, Exception):
            raise found
        comparison.assert_ran_on_torch(module, case.operation)
    assert_close(found, expected, FLOAT64, case.slices(module))


def check_float32(case: Case) -> None:
    """Float32 errors against the float64 truth stay within a few times stock's own."""
    module = case.build(torch.float32)
    stock = outcome(case, module, torch.float32)
    if isinstance(stock, Exception) or is_refused(case, module):
        return
    exact = copy.deepcopy(module).double()
    operands = {
        name: t.detach().double().requires_grad_()
        for name, t in case.operands(module, torch.float32).items()
    } | dict(exact.named_parameters())
    truth = derivatives(functools.partial(case.call, exact), operands, case.seed)
    with accelerated():
        found = outcome(case, module, torch.float32)
        comparison.assert_ran_on_torch(module, case.operation)
    assert isinstance(found, Derivatives)
    comparison.assert_as_good_as(found, stock, truth, FLOAT32)


@given(strategies.tensor_products())
@settings(max_examples=4 * settings().max_examples)
def test_tensor_product(case: Case) -> None:
    """All instruction modes, weights, normalisations, variances and leading dimensions."""
    check_float64(case)


@given(strategies.subclasses())
@settings(max_examples=2 * settings().max_examples)
def test_subclass(case: Case) -> None:
    """The classes that only choose instructions."""
    check_float64(case)


@given(strategies.linears())
@settings(max_examples=4 * settings().max_examples)
def test_linear(case: Case) -> None:
    """Biases, feature columns, instruction subsets, shared and per-row weights."""
    check_float64(case)


@given(strategies.tensor_products() | strategies.subclasses() | strategies.linears())
@settings(max_examples=2 * settings().max_examples)
def test_float32(case: Case) -> None:
    """Single precision is as good as stock's."""
    check_float32(case)


# One module of each kind

ROWS = ((2,), (2,), (2,))


def one_path(mode: str, weights: str = "shared") -> Case:
    """A product of two vectors in one mode, by constants that aren't an identity."""
    mul = {"uvuv": 4, "uvu<v": 1}.get(mode, 2)
    instruction = (0, 0, 0, mode, True, 1.0)
    return Case("TensorProduct", ("2x1o", "2x1o", f"{mul}x1e", (instruction,)), (), weights, ROWS)


FULL = "FullyConnectedTensorProduct"
LINEAR_IRREPS = ("2x0e+1x1o", "1x0e+2x1o")
STRATEGIES = {
    "one matrix product a path": Case("Linear", LINEAR_IRREPS, (("biases", True),), "shared", ROWS),
    "batched matrix products, a weight a row": Case("Linear", LINEAR_IRREPS, (), "per row", ROWS),
    "1 paths, constants with the second input first": one_path("uvw", "per row"),
    "2 paths, constants with the second input first": Case(
        FULL, ("1x0e+1x1o", "1x0e", "1x0e+1x1o"), (), "shared", ROWS
    ),
    "indexed linear over 3 species": Case(
        FULL, ("1x0e+1x1o", "3x0e", "1x0e+1x1o"), (), "shared", ROWS
    ),
}


@pytest.mark.parametrize(("strategy", "case"), STRATEGIES.items(), ids=STRATEGIES)
def test_strategy(strategy: str, case: Case) -> None:
    """Each kind of module gets the plan meant for it."""
    module = case.build()
    with accelerated():
        case.call(module, case.operands(module))
        assert comparison.strategy(module) == strategy


@pytest.mark.parametrize(
    "case", [*STRATEGIES.values(), *map(one_path, strategies.ALL_MODES)], ids=str
)
def test_gradgradcheck(case: Case) -> None:
    """Second derivatives against finite differences."""
    module = case.build()
    operands = case.operands(module)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return case.call(module, dict(zip(operands, tensors, strict=True)))

    with accelerated():
        assert torch.autograd.gradgradcheck(call, tuple(operands.values()))
        comparison.assert_ran_on_torch(module, case.operation)
