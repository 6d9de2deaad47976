"""``conv_tp(node_feats, edge_attrs, weights, edge_index)`` is gather, product and sum."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import comparison
import numpy as np
import pytest
import strategies
import torch
from comparison import (
    Derivatives,
    Operands,
    accelerated,
    assert_close,
    derivatives,
    draw,
    poisoned_memory,
)
from graphs import GRAPHS, random_edges
from hypothesis import given
from strategies import Case

from e3nn_accel.backends.torch.blocks import blocks_of
from e3nn_accel.interception import suspend

pytestmark = pytest.mark.usefixtures("eager_e3nn", "float64")

TOLERANCE = 1e-12

MIXED = Case(
    "TensorProduct",
    (
        "3x0e+2x1o+1x2e",
        "1x0e+1x1o+1x2e",
        "3x0e+3x1o+2x0e+2x1o+2x1e+2x2e+1x2e+1x1o",
        (
            (0, 0, 0, "uvu", True, 1.0),
            (0, 1, 1, "uvu", True, 0.7),
            (1, 1, 2, "uvu", True, 1.0),
            (1, 0, 3, "uvu", False, 1.0),
            (1, 2, 3, "uvu", True, 2.0),
            (1, 1, 4, "uvu", True, 1.0),
            (1, 1, 5, "uvu", False, 1.0),
            (2, 0, 6, "uvu", True, 1.0),
            (2, 1, 7, "uvu", True, 1.0),
        ),
    ),
    weights="per row",
)
"""Like MACE's, but with different multiplicities, unweighted paths and outputs fed twice."""

SEVERAL = Case(
    "TensorProduct",
    (
        "2x0e+3x1o",
        "2x0e+3x1o",
        "2x0e+3x1o+2x1o+3x0e",
        (
            (0, 0, 0, "uvu", True, 1.0),
            (1, 0, 1, "uvu", True, 1.0),
            (0, 1, 2, "uvu", False, 1.0),
            (1, 1, 3, "uvu", True, 1.0),
        ),
    ),
    weights="per row",
)
"""More than one channel in the second input: v is summed, each with a weight of its own."""


def with_weights(case: Case, weights: str) -> Case:
    return Case(case.cls, case.args, case.options, weights, seed=case.seed)


def operands_of(case: Case, module: Any, nodes: int, edges: int, seed: int = 3) -> Operands:
    """Node features, edge attributes and weights, all wanting gradients."""
    found = {
        "x": draw((nodes, module.irreps_in1.dim), seed).requires_grad_(),
        "y": draw((edges, module.irreps_in2.dim), seed + 1).requires_grad_(),
    }
    if case.weights == "internal":
        return found | dict(module.named_parameters())
    rows = (edges,) if case.weights == "per row" else ()
    if module.weight_numel:
        found["weight"] = draw((*rows, module.weight_numel), seed + 2).requires_grad_()
    return found


def fused(case: Case, module: Any, edge_index: torch.Tensor) -> Callable[[Operands], torch.Tensor]:
    """The four-argument call."""

    def run(o: Operands) -> torch.Tensor:
        weight = None if case.weights == "internal" else o.get("weight")
        out: torch.Tensor = module(o["x"], o["y"], weight, edge_index)
        return out

    return run


def unfused(
    case: Case, module: Any, edge_index: torch.Tensor
) -> Callable[[Operands], torch.Tensor]:
    """Gather, stock product, sum."""

    def run(o: Operands) -> torch.Tensor:
        weight = None if case.weights == "internal" else o.get("weight")
        messages = module(o["x"][edge_index[0]], o["y"], weight)
        out = messages.new_zeros((len(o["x"]), messages.shape[1]))
        return out.index_add(0, edge_index[1], messages)

    return run


def check(case: Case, module: Any, edge_index: torch.Tensor, operands: Operands) -> Derivatives:
    """All derivatives of the fused call equal those of the unfused stock one."""
    expected = derivatives(unfused(case, module, edge_index), operands)
    with accelerated(), poisoned_memory():
        found = derivatives(fused(case, module, edge_index), operands)
        comparison.assert_ran_on_torch(module, "convolution", 1)
    assert_close(found, expected, TOLERANCE, case.slices(module))
    return found


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("case", [MIXED, SEVERAL], ids=["mixed", "several"])
@pytest.mark.parametrize("weights", ["per row", "shared", "internal"])
def test_equals_gather_product_sum(case: Case, weights: str, graph: str) -> None:
    """Every irregular graph, every kind of weights; values, first and second derivatives."""
    case = with_weights(case, weights)
    nodes, edge_index = GRAPHS[graph]
    module = case.build()
    check(case, module, edge_index, operands_of(case, module, nodes, edge_index.shape[1]))


@given(strategies.convolutions())
def test_random_products(case: Case) -> None:
    """Random uvu products, multiplicities from 0 to 5."""
    module = case.build()
    edge_index = random_edges(5, 19, case.seed)
    check(case, module, edge_index, operands_of(case, module, 5, 19, case.seed))


@pytest.mark.parametrize("path", range(len(SEVERAL.args[3])))
def test_one_path_at_a_time(path: int) -> None:
    """With every other path's weights zero, its gradient comes from this path alone."""
    module = SEVERAL.build()
    nodes, edge_index = GRAPHS["unsorted"]
    operands = operands_of(SEVERAL, module, nodes, edge_index.shape[1])
    slices = SEVERAL.slices(module)["weight"]
    weighted = [n for n, i in enumerate(module.instructions) if i.has_weight]
    with torch.no_grad():
        for n, piece in zip(weighted, slices, strict=True):
            if n != path:
                operands["weight"][..., piece] = 0
    found = check(SEVERAL, module, edge_index, operands)
    assert found.tensors["d x"].any()


@pytest.mark.parametrize("wanted", ["x", "y", "weight"])
def test_one_operand_at_a_time(wanted: str) -> None:
    """A gradient doesn't depend on which others are asked for."""
    module = MIXED.build()
    nodes, edge_index = GRAPHS["unsorted"]
    operands = operands_of(MIXED, module, nodes, edge_index.shape[1])
    for name in operands:
        operands[name] = operands[name].detach().requires_grad_(name == wanted)
    check(MIXED, module, edge_index, operands)


def test_huge_node() -> None:
    """A receiver of ten thousand edges."""
    case = Case(
        "TensorProduct",
        ("2x1o", "1x1o", "2x0e", ((0, 0, 0, "uvu", True, 1.0),)),
        weights="per row",
    )
    module = case.build()
    edge_index = random_edges(50, 10_000)
    edge_index[1, 37:] = 7
    check(case, module, edge_index, operands_of(case, module, 50, 10_000))


def test_keyword_arguments() -> None:
    """The block's contract by name."""
    module = MIXED.build()
    nodes, edge_index = GRAPHS["unsorted"]
    o = operands_of(MIXED, module, nodes, edge_index.shape[1])
    expected = unfused(MIXED, module, edge_index)(o)
    with accelerated():
        found = module(o["x"], o["y"], weight=o["weight"], edge_index=edge_index)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("stride", ["every other column", "rows of pairs"])
def test_strided_edge_index(stride: str) -> None:
    """edge_index needn't be contiguous."""
    module = MIXED.build()
    plain = random_edges(6, 22)
    edge_index = (
        plain.repeat_interleave(2, 1)[:, ::2] if "column" in stride else plain.T.contiguous().T
    )
    assert not edge_index.is_contiguous()
    check(MIXED, module, edge_index, operands_of(MIXED, module, 6, 22))


def test_one_weight_expanded_over_edges() -> None:
    """Operands of stride 0."""
    module = MIXED.build()
    nodes, edge_index = GRAPHS["unsorted"]
    edges = edge_index.shape[1]
    o = operands_of(MIXED, module, nodes, 1)
    o = {name: t.detach() for name, t in o.items()}
    o |= {"y": o["y"].expand(edges, -1), "weight": o["weight"].expand(edges, -1)}
    expected = unfused(MIXED, module, edge_index)(o)
    with accelerated():
        found = fused(MIXED, module, edge_index)(o)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("graph", ["isolated nodes", "duplicate edges", "unsorted"])
def test_non_finite_rows_stay_where_they_belong(graph: str, poison: float) -> None:
    """A sender's NaN reaches the receivers of its edges and nobody else, as in stock e3nn.

    One exploding structure must not spoil the others of its batch.
    """
    module = MIXED.build()
    nodes, edge_index = GRAPHS[graph]
    operands = operands_of(MIXED, module, nodes, edge_index.shape[1])
    for node in range(nodes):
        o = {name: t.detach().clone() for name, t in operands.items()}
        o["x"][node] = poison
        expected = unfused(MIXED, module, edge_index)(o)
        with accelerated():
            found = fused(MIXED, module, edge_index)(o)
        spoiled = ~expected.isfinite().all(1)
        assert torch.equal(~found.isfinite().all(1), spoiled), f"node {node}"
        torch.testing.assert_close(found[~spoiled], expected[~spoiled], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["uvw", "uvv", "uuu", "uvuv"])
def test_other_modes_work_unfused(mode: str) -> None:
    """Products that aren't uvu take gather, product and sum one after the other."""
    out = {"uvuv": "4x1o"}.get(mode, "2x1o")
    case = Case(
        "TensorProduct",
        ("2x1o", "2x0e", out, ((0, 0, 0, mode, True, 1.0),)),
        weights="per row",
    )
    module = case.build()
    nodes, edge_index = GRAPHS["unsorted"]
    operands = operands_of(case, module, nodes, edge_index.shape[1])
    expected = derivatives(unfused(case, module, edge_index), operands)
    with accelerated(strict=False):
        found = derivatives(fused(case, module, edge_index), operands)
    assert_close(found, expected, TOLERANCE)


def test_gradgradcheck() -> None:
    """Second derivatives against finite differences."""
    case = with_weights(SEVERAL, "per row")
    module = case.build()
    edge_index = random_edges(3, 5)
    operands = operands_of(case, module, 3, 5)
    with accelerated():
        run = fused(case, module, edge_index)
        call = lambda *given: run(dict(zip(operands, given, strict=True)))  # noqa: E731
        assert torch.autograd.gradgradcheck(call, tuple(operands.values()))


# Bad edges


def bad_edges(name: str) -> torch.Tensor:
    edge_index = random_edges(6, 8)
    if name == "too large":
        edge_index[0, 3] = 6
    elif name == "receiver too large":
        edge_index[1, 3] = 6
    elif name == "negative receiver":
        edge_index[1, 3] = -1
    elif name == "negative sender":
        edge_index[0, 3] = -1
    elif name == "int32":
        edge_index = edge_index.int()
    elif name == "float":
        edge_index = edge_index.double()
    elif name == "too many edges":
        edge_index = random_edges(6, 9)
    return edge_index


@pytest.mark.parametrize(
    "name",
    [
        "too large",
        "receiver too large",
        "negative receiver",
        "negative sender",
        "int32",
        "float",
        "too many edges",
    ],
)
def test_bad_edges_behave_as_unfused(name: str) -> None:
    """Indices out of range or of another dtype: the result, or kind of error, of a block's way."""
    module = MIXED.build()
    edge_index = bad_edges(name)
    operands = operands_of(MIXED, module, 6, 8)
    expected: torch.Tensor | Exception
    try:
        messages = module(operands["x"][edge_index[0]], operands["y"], operands["weight"])
        index = edge_index[1].unsqueeze(1).expand_as(messages)
        expected = messages.new_zeros((6, messages.shape[1])).scatter_add(0, index, messages)
    except Exception as error:
        expected = error
    with accelerated(strict=False):
        if isinstance(expected, Exception):
            with pytest.raises(type(expected)):
                fused(MIXED, module, edge_index)(operands)
            return
        found = fused(MIXED, module, edge_index)(operands)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_bad_edges_dont_end_acceleration() -> None:
    """One call with bad edges says nothing about the plan: the next good call runs on it."""
    module = MIXED.build()
    nodes, good = GRAPHS["unsorted"]
    operands = operands_of(MIXED, module, nodes, good.shape[1])
    bad = good.clone()
    bad[0, 0] = nodes
    with accelerated(strict=False):
        with pytest.raises(IndexError):
            fused(MIXED, module, bad)(operands)
        before = comparison.usage(module).get(("convolution", "torch"), 0)
        fused(MIXED, module, good)(operands)
        assert comparison.usage(module)["convolution", "torch"] == before + 1


# The cache of groupings


@pytest.fixture
def convolution() -> Iterator[Callable[..., None]]:
    """Checks one call against a stock one with the content that edge_index has now."""
    module = MIXED.build()

    def check_call(edge_index: torch.Tensor, nodes: int = 6) -> None:
        o = operands_of(MIXED, module, nodes, edge_index.shape[1])
        content = torch.tensor(edge_index.tolist()).reshape(2, -1).to(torch.int64)
        with suspend():
            expected = unfused(MIXED, module, content)(o)
        for _ in range(2):  # found, then looked up
            found = fused(MIXED, module, edge_index)(o)
            torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)

    with accelerated():  # all the time: nothing is forgotten between the calls
        yield check_call


def test_edges_changed_in_place(convolution: Callable[..., None]) -> None:
    """A write that torch counts."""
    edge_index = random_edges(6, 20)
    convolution(edge_index)
    edge_index[0, 2:9] = 5
    convolution(edge_index)
    edge_index[1].fill_(3)
    convolution(edge_index)


def test_edges_changed_through_data(convolution: Callable[..., None]) -> None:
    """A write that torch doesn't count, and an exchange of the storage."""
    edge_index = random_edges(6, 20)
    convolution(edge_index)
    version = edge_index._version
    edge_index.data.copy_(random_edges(6, 20, 1))
    assert edge_index._version == version
    convolution(edge_index)
    edge_index.data = random_edges(6, 31, 2)
    convolution(edge_index)


def test_edges_changed_through_numpy(convolution: Callable[..., None]) -> None:
    """A numpy array that shares the memory."""
    array = random_edges(6, 20).numpy().copy()
    edge_index = torch.from_numpy(array)
    convolution(edge_index)
    array[:] = random_edges(6, 20, 1).numpy()
    assert np.shares_memory(array, edge_index.numpy())
    convolution(edge_index)


def test_address_used_again(convolution: Callable[..., None]) -> None:
    """A new edge_index often lies where the last one lay: the same address and version."""
    array = np.empty((2, 20), dtype=np.int64)
    for seed in range(4):
        array[:] = random_edges(6, 20, seed).numpy()
        edge_index = torch.from_numpy(array)
        assert (edge_index.data_ptr(), edge_index._version) == (array.ctypes.data, 0)
        convolution(edge_index)
        del edge_index
        gc.collect()


def test_inference_tensors(convolution: Callable[..., None]) -> None:
    """Torch doesn't count writes to these at all."""
    with torch.inference_mode():
        edge_index = random_edges(6, 20)
    convolution(edge_index)
    with torch.inference_mode():
        edge_index.copy_(random_edges(6, 20, 1))
    convolution(edge_index)


def test_number_of_nodes_isnt_in_the_edges(convolution: Callable[..., None]) -> None:
    """The same edge_index with more nodes."""
    edge_index = random_edges(6, 20)
    convolution(edge_index, 6)
    convolution(edge_index, 11)
    convolution(edge_index, 6)


def test_views_of_one_tensor(convolution: Callable[..., None]) -> None:
    """Parts of one edge list are different edge lists."""
    edges = random_edges(6, 40)
    convolution(edges[:, :20])
    convolution(edges[:, 20:])


def test_training_after_inference() -> None:
    """What was found in inference mode serves a later call that wants gradients."""
    module = MIXED.build()
    nodes, edge_index = GRAPHS["unsorted"]
    edge_index = edge_index.clone()
    operands = operands_of(MIXED, module, nodes, edge_index.shape[1])
    expected = derivatives(unfused(MIXED, module, edge_index), operands)
    with accelerated():
        with torch.inference_mode():
            fused(MIXED, module, edge_index)(operands)
        found = derivatives(fused(MIXED, module, edge_index), operands)
    assert_close(found, expected, TOLERANCE)


def test_grouping_is_found_once() -> None:
    """The layers of one call share it."""
    edge_index = random_edges(6, 20)
    assert blocks_of(edge_index, 6) is blocks_of(edge_index, 6)
    assert blocks_of(edge_index, 6) is not blocks_of(edge_index, 7)
    assert blocks_of(edge_index, 6) is not blocks_of(edge_index.clone(), 6)


def test_threads() -> None:
    """Calls from several threads, with edge lists of their own and a common one."""
    module = MIXED.build()
    common = random_edges(6, 20)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(8):
                for edge_index in (common, random_edges(6, 20, 100 * seed + n)):
                    o = operands_of(MIXED, module, 6, 20, seed)
                    with suspend():
                        expected = unfused(MIXED, module, edge_index)(o)
                    found = fused(MIXED, module, edge_index)(o)
                    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        except BaseException as error:
            failures.append(error)

    with accelerated():
        fused(MIXED, module, common)(operands_of(MIXED, module, 6, 20))
        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failures, failures
