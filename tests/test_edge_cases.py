"""Unusual calls, right and wrong ones: stock's result, stock's layout, or exactly stock's error."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import comparison
import pytest
import torch
from comparison import Behaviour, accelerated, draw
from e3nn import o3
from strategies import Case

pytestmark = pytest.mark.usefixtures("eager_e3nn", "float64")

TOLERANCE = 1e-12
Tensors = tuple[torch.Tensor, ...]


def linear(weights: str, **options: Any) -> Case:
    return Case("Linear", ("3x0e+2x1o", "2x0e+3x1o"), tuple(options.items()), weights)


def product(weights: str, in2: str = "2x0e+1x1o") -> Case:
    return Case("FullyConnectedTensorProduct", ("3x0e+2x1o", in2, "2x0e+2x1o"), (), weights)


def channelwise(weights: str) -> Case:
    paths = ((0, 0, 0), (1, 1, 2), (0, 1, 1))
    instructions = tuple((*path, "uvu", True, 1.0) for path in paths)
    args = ("3x0e+2x1o", "1x0e+1x1o", "3x0e+3x1o+2x0e", instructions)
    return Case("TensorProduct", args, (), weights)


CASES = {
    "linear": linear("internal"),
    "linear, biases": linear("internal", biases=True),
    "linear, given weights": linear("shared", biases=True),
    "linear, weights per row": linear("per row"),
    "linear, columns": linear("internal", f_in=2, f_out=3, biases=True),
    "one block": Case("Linear", ("3x1o", "2x1o")),
    "one scalar block": Case("Linear", ("3x0e", "2x0e")),
    "nothing in common": Case("Linear", ("3x1e", "2x1o+1x0e")),
    "product": product("internal"),
    "product, given weights": product("shared"),
    "product, weights per row": product("per row"),
    "uvu": channelwise("per row"),
    "species": product("internal", "4x0e"),
    "elementwise": Case("ElementwiseTensorProduct", ("3x0e+2x1o", "1x1o+4x0e")),
    "full": Case("FullTensorProduct", ("2x0e+1x1o", "1x1o+1x0e")),
    "square": Case("TensorSquare", ("2x0e+1x1o",)),
    "scalars": Case("FullyConnectedTensorProduct", ("3x0e", "1x0e", "2x0e")),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def assert_like_stock(function: Callable[[], torch.Tensor], strict: bool = False) -> None:
    """The same behaviour with and without us; falling back is fine, a warning isn't."""
    stock = Behaviour.of(function)
    with accelerated(strict=strict and stock.error is not None):
        Behaviour.of(function).assert_like(stock)


def with_leading(case: Case, *leading: tuple[int, ...]) -> Case:
    return Case(case.cls, case.args, case.options, case.weights, leading * (3 // len(leading)))


def operands(case: Case, module: Any) -> dict[str, torch.Tensor]:
    """The arguments of a call, without internal parameters."""
    own = dict(module.named_parameters())
    return {name: t.detach() for name, t in case.operands(module).items() if name not in own}


# Leading dimensions


@each_case
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0), (2, 3), (1, 2, 1, 2)], ids=str)
def test_leading_dimensions(case: Case, leading: tuple[int, ...]) -> None:
    """None, one, many, and none of something."""
    if case.weights == "per row" and leading == ():
        leading = (1,)  # e3nn wants a dimension of rows for a weight a row
    case = with_leading(case, leading)
    module = case.build()
    given = operands(case, module)
    assert_like_stock(lambda: case.call(module, given))
    with accelerated():
        case.call(module, given)
        comparison.assert_ran_on_torch(module, case.operation)


BROADCASTS = [
    ((4,), (4,), (4,)),
    ((4,), (1,), (4,)),
    ((1,), (4,), (1,)),
    ((), (4,), (1,)),
    ((4,), (), (4,)),
    ((), (), (4,)),
    ((), (), (1,)),
    ((3, 1), (2,), (1, 1)),
    ((3, 1), (1, 2), (2,)),
    ((2, 3), (3,), (2, 1)),
    ((2, 1, 3), (4, 1), (1,)),
    ((0,), (1,), (0,)),
    ((1,), (0,), (1,)),
    ((4,), (3,), (4,)),  # from here on they don't broadcast
    ((4,), (4,), (3,)),
    ((2, 3), (2,), (2, 3)),
    ((0,), (2,), (0,)),
]


@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
@pytest.mark.parametrize(
    "name", ["product", "product, weights per row", "uvu", "species", "scalars"]
)
def test_broadcasting(name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Leading dimensions of x, y and w broadcast exactly as in stock, or fail as there."""
    case = with_leading(CASES[name], *shapes)
    module = case.build()
    given = operands(case, module)
    assert_like_stock(lambda: case.call(module, given), strict=True)


# Strides


def _every_other(t: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(2, -1)[..., ::2]


def _transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _expanded(t: torch.Tensor) -> torch.Tensor:
    return t[:1].expand_as(t)


def _one_value(t: torch.Tensor) -> torch.Tensor:
    return t.flatten()[:1].expand(t.shape)


def _offset(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


@each_case
@pytest.mark.parametrize("stride", [_every_other, _transposed, _expanded, _one_value, _offset])
def test_strided_operands(case: Case, stride: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Operands that aren't contiguous, have stride 0, or start within their storage."""
    module = case.build()
    plain = {name: t.requires_grad_() for name, t in operands(case, module).items()}
    strided = lambda o: case.call(module, {n: stride(t) for n, t in o.items()})  # noqa: E731
    expected = comparison.derivatives(strided, plain)
    with accelerated():
        found = comparison.derivatives(strided, plain)
        comparison.assert_ran_on_torch(module, case.operation)
    comparison.assert_close(found, expected, TOLERANCE)


@each_case
def test_expanded_gradient(case: Case) -> None:
    """``out.sum().backward()`` sends a gradient of stride 0."""
    module = case.build()
    given = {name: t.requires_grad_() for name, t in operands(case, module).items()}
    leaves = [*given.values(), *module.parameters()]
    gradients = lambda: torch.autograd.grad(  # noqa: E731
        case.call(module, given).sum(), leaves, allow_unused=True
    )
    if case is CASES["nothing in common"]:
        with accelerated():
            assert not case.call(module, given).requires_grad
        return
    expected = gradients()
    with accelerated():
        found = gradients()
    for a, b, leaf in zip(found, expected, leaves, strict=True):
        a, b = (torch.zeros_like(leaf) if t is None else t for t in (a, b))
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


# Weights given as a list


@pytest.mark.parametrize("weights", ["shared", "per row"])
@pytest.mark.parametrize("make", [product, channelwise])
def test_weights_as_a_list(make: Callable[[str], Case], weights: str) -> None:
    """A tensor for each path, of the path's shape."""
    case = make(weights)
    module = case.build()
    given = operands(case, module)
    flat, slices = given["weight"], case.slices(module)["weight"]
    parts = [
        flat[..., piece].reshape(*flat.shape[:-1], *i.path_shape).requires_grad_()
        for piece, i in zip(slices, module.instructions, strict=True)
    ]
    call = lambda: module(given["x"], given["y"], parts)  # noqa: E731
    expected = call()
    direction = draw(tuple(expected.shape), 5)
    wanted = torch.autograd.grad(expected, parts, direction)
    with accelerated():
        out = call()
        torch.testing.assert_close(out, expected, rtol=TOLERANCE, atol=TOLERANCE)
        for a, b in zip(torch.autograd.grad(out, parts, direction), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        comparison.assert_ran_on_torch(module, "tensor_product")


def test_external_weights_in_place_of_internal_ones() -> None:
    """A weight given to a module that has its own is the one that counts."""
    for case in (CASES["linear"], CASES["product"], CASES["species"]):
        module = case.build()
        given = operands(case, module) | {"weight": draw((module.weight_numel,), 9)}
        assert_like_stock(lambda c=case, m=module, g=given: m(*_positional(c, g)))  # type: ignore[misc]
    biased = linear("internal", biases=True)
    module = biased.build()
    x, bias = operands(biased, module)["x"], draw((module.bias_numel,), 9)
    assert_like_stock(lambda: module(x, bias=bias))
    assert_like_stock(lambda: module(x, None, bias))


def _positional(case: Case, given: dict[str, torch.Tensor]) -> Tensors:
    return tuple(given[name] for name in ("x", "y", "weight", "bias") if name in given)


@pytest.mark.parametrize(
    "shape", ["(1, n)", "(n,)", "(1, 1, n)", "(n, 1)", "(5, n)", "(5, 1, n)", "(0, n)"]
)
@pytest.mark.parametrize("weights", ["internal", "shared", "per row"])
def test_shapes_of_linear_weights(weights: str, shape: str) -> None:
    """Linear reshapes what it is given: any shape with the right number of weights may do."""
    case = linear(weights)
    module = case.build()
    x = operands(case, module)["x"]
    weight = draw(eval(shape, {"n": module.weight_numel}), 3)
    assert_like_stock(lambda: module(x, weight), strict=True)


@pytest.mark.parametrize("shape", ["(1, n)", "(n,)", "(5, n)", "(1, 5, n)", "(n, 1)", "(5, 1, n)"])
@pytest.mark.parametrize("weights", ["internal", "shared"])  # no biases with weights per row
def test_shapes_of_linear_biases(weights: str, shape: str) -> None:
    """Biases too: one for all rows, or a row each."""
    case = linear(weights, biases=True)
    module = case.build()
    given = operands(case, module)
    bias = draw(eval(shape, {"n": module.bias_numel}), 3)
    assert_like_stock(lambda: module(given["x"], given.get("weight"), bias), strict=True)


@each_case
def test_keyword_arguments(case: Case) -> None:
    """By the names that stock has."""
    module = case.build()
    given = operands(case, module)
    if case.cls == "Linear":
        given["features"] = given.pop("x")
    assert_like_stock(lambda: module(**given))


# Gradients wanted or not


@pytest.mark.parametrize(
    "name",
    [
        "linear, given weights",
        "linear, weights per row",
        "product, weights per row",
        "product, given weights",
        "uvu",
    ],
)
def test_every_combination_of_wanted_gradients(name: str) -> None:
    """Each subset of operands, without computing or needing the others."""
    case = CASES[name]
    module = case.build()
    plain = operands(case, module)
    for flags in itertools.product([False, True], repeat=len(plain)):
        given = {
            name: t.clone().requires_grad_(flag)
            for (name, t), flag in zip(plain.items(), flags, strict=True)
        }
        expected = comparison.derivatives(lambda o: case.call(module, o), given)
        with accelerated():
            found = comparison.derivatives(lambda o: case.call(module, o), given)
            assert case.call(module, given).requires_grad == any(flags)
        assert found.tensors.keys() == expected.tensors.keys()
        comparison.assert_close(found, expected, TOLERANCE)


@each_case
@pytest.mark.parametrize("frozen", [False, True])
def test_internal_weights_frozen_or_not(case: Case, frozen: bool) -> None:
    """requires_grad of the result follows the parameters'."""
    module = case.build().requires_grad_(not frozen)
    given = operands(case, module)
    assert_like_stock(lambda: case.call(module, given))


@each_case
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(case: Case, mode: Callable[[], Any]) -> None:
    """The same numbers, no graph, and the kind of tensor stock gives."""
    module = case.build()
    given = {name: t.requires_grad_() for name, t in operands(case, module).items()}
    with mode():
        expected = case.call(module, given)
    with accelerated(), mode():
        found = case.call(module, given)
        comparison.assert_ran_on_torch(module, case.operation)
    assert found.is_inference() == expected.is_inference()
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE, check_stride=True)


@each_case
def test_training_after_inference(case: Case) -> None:
    """Planned in inference mode, then used with gradients."""
    module = case.build()
    given = {name: t.requires_grad_() for name, t in operands(case, module).items()}
    leaves = given | dict(module.named_parameters())
    expected = comparison.derivatives(lambda _: case.call(module, given), leaves)
    with accelerated():
        with torch.inference_mode():
            case.call(module, given)
        found = comparison.derivatives(lambda _: case.call(module, given), leaves)
        comparison.assert_ran_on_torch(module, case.operation)
    comparison.assert_close(found, expected, TOLERANCE)


@pytest.mark.filterwarnings("default::e3nn_accel.FallbackWarning")
@pytest.mark.parametrize("name", ["linear", "product", "uvu", "species"])
def test_batched_backward(name: str) -> None:
    """``is_grads_batched`` runs vmap over the backward: stock's result, or a RuntimeError.

    MACE's Hessian takes the error as a sign to loop; the plan stays.
    """
    case = CASES[name]
    module = case.build()
    given = {n: t.requires_grad_() for n, t in operands(case, module).items()}
    directions = draw((3, *case.call(module, given).shape), 5)

    def jacobian() -> torch.Tensor:
        out = case.call(module, given)
        return torch.autograd.grad(out, given["x"], directions, is_grads_batched=True)[0]

    expected = jacobian()
    with accelerated():
        found = Behaviour.of(jacobian)
        case.call(module, given)
        comparison.assert_ran_on_torch(module, case.operation, 2)
    if found.error is not None:
        assert isinstance(found.error, RuntimeError)
        return
    torch.testing.assert_close(found.value, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["linear", "product", "uvu", "species"])
def test_functorch(name: str) -> None:
    """vmap, grad and jvp of torch.func take stock e3nn, with the reason."""
    case = CASES[name]
    module = case.build().requires_grad_(False)
    given = operands(case, module)
    x = given["x"]
    loss = lambda t: case.call(module, given | {"x": t}).square().sum()  # noqa: E731
    expected = torch.func.grad(loss)(x), torch.func.jvp(loss, (x,), (x,))[1]
    with accelerated(strict=False):
        found = torch.func.grad(loss)(x), torch.func.jvp(loss, (x,), (x,))[1]
        assert any("functorch" in row.detail for row in comparison.e3nn_accel.report().fallbacks)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# The result


@each_case
def test_result_is_a_tensor_of_its_own(case: Case) -> None:
    """Contiguous like stock's, sharing memory with no operand and no parameter."""
    module = case.build()
    given = operands(case, module)
    with accelerated():
        out = case.call(module, given)
    assert out.is_contiguous()
    storage = out.untyped_storage().data_ptr()
    others = [*given.values(), *module.parameters(), *module.buffers()]
    assert all(t.untyped_storage().data_ptr() != storage for t in others if t.numel())


@each_case
def test_result_may_be_changed_in_place(case: Case) -> None:
    """Gradients still come out right, and the next call gives the same result."""
    module = case.build()
    given = {name: t.requires_grad_() for name, t in operands(case, module).items()}
    leaves = given | dict(module.named_parameters())

    def changed(_: dict[str, torch.Tensor]) -> torch.Tensor:
        out = case.call(module, given)
        out.mul_(2.0)
        out[..., 0] = 1.0
        return out

    expected = comparison.derivatives(changed, leaves)
    plain = case.call(module, given)
    with accelerated():
        found = comparison.derivatives(changed, leaves)
        torch.testing.assert_close(case.call(module, given), plain, rtol=TOLERANCE, atol=TOLERANCE)
    comparison.assert_close(found, expected, TOLERANCE)


@each_case
def test_operands_arent_changed(case: Case) -> None:
    """Nothing is written to what a caller owns."""
    module = case.build()
    given = {name: t.requires_grad_() for name, t in operands(case, module).items()}
    watched = [*given.values(), *module.parameters(), *module.buffers()]
    before = [(t.detach().clone(), t._version) for t in watched]
    with accelerated():
        out = case.call(module, given)
        if out.requires_grad:
            out.sum().backward()
    for t, (content, version) in zip(watched, before, strict=True):
        assert t._version == version
        assert torch.equal(t.detach(), content)


# Dtypes

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.complex128,
]


def takes(case: Case, operand: str) -> bool:
    """Whether a call of it gives this operand."""
    return {
        "y": case.cls not in ("Linear", "TensorSquare"),
        "weight": case.weights != "internal",
    }.get(operand, True)


@pytest.mark.parametrize(
    ("name", "operand"),
    [(n, o) for n, c in CASES.items() for o in ("x", "y", "weight") if takes(c, o)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_operand_of_another_dtype(name: str, operand: str, dtype: torch.dtype) -> None:
    """Stock's result or its error, and no plan is given up for it."""
    case = CASES[name]
    module = case.build()
    given = operands(case, module)
    given[operand] = given[operand].to(dtype)
    assert_like_stock(lambda: case.call(module, given))


@each_case
@pytest.mark.parametrize("built", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_and_operands_of_different_dtypes(
    case: Case, built: torch.dtype, dtype: torch.dtype
) -> None:
    """A float32 module with float64 operands and so on: what stock makes of it."""
    module = case.build(built)
    given = {name: t.to(dtype) for name, t in operands(case, module).items()}
    assert_like_stock(lambda: case.call(module, given))


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(case: Case, dtype: torch.dtype) -> None:
    """Half precisions are stock's, bit by bit."""
    module = case.build().to(dtype)
    given = {name: t.to(dtype) for name, t in operands(case, module).items()}
    assert_like_stock(lambda: case.call(module, given))


@each_case
def test_default_dtype_is_irrelevant(case: Case) -> None:
    """Plans depend on the operands' dtype, not on the global one at planning time."""
    module = case.build(torch.float64)
    given = operands(case, module)
    expected = case.call(module, given)
    torch.set_default_dtype(torch.float32)
    with accelerated():
        found = case.call(module, given)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@each_case
def test_autocast(case: Case) -> None:
    """Stock's mixture of precisions."""
    module = case.build(torch.float32)
    given = {name: t.float() for name, t in operands(case, module).items()}

    def call() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.call(module, given)

    assert_like_stock(call)


# Wrong calls

Bad = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]


def _changed(name: str, change: Callable[[torch.Tensor], Any]) -> Bad:
    def call(module: Any, o: dict[str, torch.Tensor]) -> torch.Tensor:
        o = o | {name: change(o[name])}
        positional = [o[n] for n in ("x", "y") if n in o]
        named = {n: t for n, t in o.items() if n not in ("x", "y")}
        out: torch.Tensor = module(*positional, **named)
        return out

    return call


def _on_meta(name: str) -> Bad:
    """What torch 2.4 makes of numbers that aren't there is memory that nobody wrote: an error, or a shape, says all."""
    call = _changed(name, lambda t: t.to("meta"))
    return lambda module, o: torch.zeros_like(call(module, o))


BAD: dict[str, Bad] = {
    f"{name}, {what}": _changed(name, change)
    for name in ("x", "y", "weight")
    for what, change in {
        "one column less": lambda t: t[..., :-1],
        "one column more": lambda t: torch.cat([t, t[..., :1]], -1),
        "no columns": lambda t: t[..., :0],
        "a scalar": lambda t: t.sum(),
        "transposed": lambda t: t.T if t.dim() == 2 else t.unsqueeze(-1),
        "one row less": lambda t: t[:-1],
        "one row more": lambda t: torch.cat([t, t[:1]]),
        "one dimension more": lambda t: t.unsqueeze(0),
        "None": lambda t: None,
        "a list": lambda t: t.tolist(),
        "a number": lambda t: 3.0,
        "a numpy array": lambda t: t.numpy(),
        "sparse": lambda t: t.to_sparse(),
        "a string": lambda t: "tensor",
    }.items()
}
BAD |= {
    "x, meta": _on_meta("x"),
    "y, meta": _on_meta("y"),
    "no arguments": lambda m, o: m(),
    "too many arguments": lambda m, o: m(*o.values(), None, None, None),
    "an unknown name": lambda m, o: m(*o.values(), nothing=1),
    "x twice": lambda m, o: m(*o.values(), x=o["x"]),
}


CALLED_WRONGLY = (
    "linear",
    "linear, columns",
    "linear, given weights",
    "linear, weights per row",
    "product",
    "product, given weights",
    "product, weights per row",
    "uvu",
    "species",
    "square",
)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize(
    ("name", "bad"),
    [(n, b) for n in CALLED_WRONGLY for b in BAD if takes(CASES[n], b.partition(",")[0])],
)
def test_wrong_calls(name: str, bad: str, strict: bool, prepared: dict[str, Any]) -> None:
    """Exactly stock's exception, type and message, or stock's result where it takes the call."""
    _, module, given = prepared[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, about .T and the like
        warnings.simplefilter("error", comparison.e3nn_accel.E3nnAccelWarning)
        assert_like_stock(lambda: BAD[bad](module, dict(given)), strict)


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """Modules and operands, built once."""
    return {
        name: (case, module := case.build(), operands(case, module)) for name, case in CASES.items()
    }


@pytest.mark.parametrize("weights", ["shared", "per row"])
def test_weights_forgotten(weights: str) -> None:
    """External weights, or biases, that aren't given."""
    for case in (linear(weights), product(weights), channelwise(weights)):
        module = case.build()
        given = operands(case, module)
        given.pop("weight")
        assert_like_stock(lambda c=case, m=module, g=given: c.call(m, g), strict=True)  # type: ignore[misc]
    biased = linear("shared", biases=True)
    module = biased.build()
    for name in ("weight", "bias"):
        given = operands(biased, module)
        given.pop(name)
        assert_like_stock(lambda g=given: biased.call(module, g), strict=True)  # type: ignore[misc]


def test_a_wrong_call_doesnt_end_acceleration() -> None:
    """After an error the next good call is accelerated."""
    for case in (linear("internal"), product("internal"), channelwise("per row")):
        module = case.build()
        given = operands(case, module)
        with accelerated(strict=False):
            with pytest.raises((AssertionError, RuntimeError)):
                case.call(module, given | {"x": given["x"][..., :-1]})
            case.call(module, given)
            assert comparison.usage(module)[case.operation, "torch"] == 1


def test_four_arguments_while_disabled() -> None:
    """The convolution's call exists while switched on only."""
    case = channelwise("per row")
    module = case.build()
    given = operands(case, module)
    with pytest.raises(TypeError):
        module(*given.values(), torch.zeros(2, 5, dtype=torch.int64))


def test_a_subclass_with_a_forward_of_its_own() -> None:
    """Its forward wins."""

    class Doubled(o3.Linear):  # type: ignore[misc]
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = 2 * super().forward(features)
            return out

    module = Doubled("2x0e", "2x0e")
    x = draw((3, 2), 1)
    expected = module(x)
    with accelerated(strict=False):
        assert torch.equal(module(x), expected)
        assert "forward of its own" in comparison.e3nn_accel.report().fallbacks[0].detail
