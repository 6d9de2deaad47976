"""The convolution kernels against float64 stock e3nn: values, first and second derivatives, on a GPU."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3

import e3nn_accel
from e3nn_accel.backends.cuda import convolution_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SH = "0e+1o+2e+3o"
NEQUIP = "+".join(f"8x{degree}{parity}" for degree in range(3) for parity in "eo")
CASES = {
    "mace layer 1": ("128x0e", SH, SH),
    "mace layer 2": ("128x0e+128x1o", SH, SH),
    "192 channels": ("192x0e+192x1o", "0e+1o", "0e+1o"),
    "mixed multiplicities": ("128x0e+64x1e+32x2e", "0e+1e+2e", "0e+1e+2e"),
    "odd multiplicities": ("5x0e+3x1o", "0e+1o", "0e+1o"),
    "several channels of the second input": ("8x0e+8x1o", "2x0e+3x1o", "0e+1o"),
    "many paths": (
        NEQUIP,
        "0e+1o+2e",
        "+".join(f"{degree}{parity}" for degree in range(3) for parity in "eo"),
    ),
}
TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.float64: (1e-12, 1e-12)}


def product(case: str, dtype: torch.dtype) -> o3.TensorProduct:
    """An uvu product with a weight a path, channel and edge, on the GPU."""
    irreps1, irreps2, target = map(o3.Irreps, CASES[case])
    outputs, instructions = [], []
    for i, (mul, a) in enumerate(irreps1):
        for j, (_, b) in enumerate(irreps2):
            for c in a * b:
                if c in target:
                    instructions.append((i, j, len(outputs), "uvu", True))
                    outputs.append((mul, c))
    module = o3.TensorProduct(
        irreps1,
        irreps2,
        o3.Irreps(outputs),
        instructions,
        shared_weights=False,
        internal_weights=False,
    )
    return module.to("cuda", dtype)


def operands(
    module: o3.TensorProduct, nodes: int, edges: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Random features, edge attributes, weights and an unsorted edge index with isolated nodes."""
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    ends = torch.randint(0, max(nodes - 2, 1), (2, edges), device="cuda")
    return [
        draw(nodes, module.irreps_in1.dim),
        draw(edges, module.irreps_in2.dim),
        draw(edges, module.weight_numel),
        ends,
    ]


def unfused(
    module: o3.TensorProduct, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Stock e3nn: gather, product, sum."""
    messages = module(x[ends[0]], y, w)
    return torch.zeros(len(x), messages.shape[1], device=x.device, dtype=x.dtype).index_add(
        0, ends[1], messages
    )


def derivatives(f, inputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Value, gradients, and gradients of a random functional of the gradients (for g, too)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    leaves = [t.detach().requires_grad_(True) for t in inputs]
    value = f(*leaves)
    like = lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)  # noqa: E731
    g = like(value).requires_grad_(True)
    first = torch.autograd.grad(value, leaves, g, create_graph=True)
    functional = sum((a * like(a)).sum() for a in first)
    second = torch.autograd.grad(functional, [g, *leaves])
    return [value, *first, *second]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, norm-wise."""
    assert found.shape == exact.shape
    assert bool(torch.isfinite(found).all())
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@pytest.mark.parametrize(("nodes", "edges"), [(40, 300), (6, 400)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", list(CASES))
def test_values_and_derivatives(case: str, dtype: torch.dtype, nodes: int, edges: int) -> None:
    """Everything within rounding of float64 stock e3nn on the same inputs, by the cuda backend.

    Of six nodes the edges are shared by blocks, forward and backward.
    """
    module = product(case, dtype)
    exact_module = product(case, torch.float64)
    x, y, w, ends = operands(module, nodes, edges, dtype)
    exact = derivatives(
        lambda *t: unfused(exact_module, *t, ends), [t.double() for t in (x, y, w)], 3
    )
    with e3nn_accel.enabled(strict=True):
        found = derivatives(lambda *t: module(*t, ends), [x, y, w], 3)
        rows = e3nn_accel.explain(module).rows
    assert {row.backend for row in rows if row.operation == "convolution"} == {"cuda"}
    errors = [error(a, b) for a, b in zip(found, exact, strict=True)]
    forward, gradient = TOLERANCE[dtype]
    assert errors[0] <= forward, errors
    assert max(errors[1:]) <= gradient, errors


@pytest.mark.parametrize(("nodes", "edges"), [(7, 0), (1, 5), (3, 20000), (1000, 10)])
def test_odd_graphs(nodes: int, edges: int) -> None:
    """No edges, one node, huge nodes, mostly isolated nodes."""
    module = product("mace layer 2", torch.float64)
    x, y, w, ends = operands(module, nodes, edges, torch.float64)
    exact = derivatives(lambda *t: unfused(module, *t, ends), [x, y, w], 5)
    with e3nn_accel.enabled(strict=True):
        found = derivatives(lambda *t: module(*t, ends), [x, y, w], 5)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nodes", [500, 20])
def test_bit_reproducible(nodes: int) -> None:
    """Two runs give the same bits, values and gradients; where blocks share the edges of a node, too."""
    module = product("mace layer 2", torch.float32)
    x, y, w, ends = operands(module, nodes, 20000, torch.float32)
    with e3nn_accel.enabled(strict=True):
        runs = [derivatives(lambda *t: module(*t, ends), [x, y, w], 7) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("operand", [0, 1, 2])
def test_only_the_gradient_that_is_asked_for(operand: int) -> None:
    """Each operand's gradient alone equals the same gradient among all."""
    module = product("mace layer 2", torch.float64)
    x, y, w, ends = operands(module, 30, 200, torch.float64)
    with e3nn_accel.enabled(strict=True):
        inputs = [t.clone().requires_grad_(True) for t in (x, y, w)]
        both = torch.autograd.grad(module(*inputs, ends).pow(2).sum(), inputs)
        alone = [t.clone().requires_grad_(n == operand) for n, t in enumerate((x, y, w))]
        (one,) = torch.autograd.grad(module(*alone, ends).pow(2).sum(), alone[operand])
    assert torch.equal(one, both[operand])


def test_captured_in_a_cuda_graph() -> None:
    """A replay equals the eager call on new contents of the same tensors."""
    module = product("mace layer 2", torch.float32)
    x, y, w, ends = operands(module, 200, 5000, torch.float32)
    with e3nn_accel.enabled(strict=True):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):
                module(x, y, w, ends)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            out = module(x, y, w, ends)
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        with torch.no_grad():
            eager = module(x, y, w, ends)
    assert torch.equal(out, eager)


@pytest.mark.parametrize("staged", [True, False])
def test_offsets_beyond_2_to_the_31(staged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last edges of 1.75 million, whose weights start beyond 2^31 numbers, against stock e3nn."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("wants 40 GiB of free memory")
    if not staged:
        monkeypatch.setattr(convolution_kernels, "ALIGNMENT", 1 << 62)
    module, exact = product("mace layer 2", torch.float32), product("mace layer 2", torch.float64)
    nodes, edges, last = 50_000, 1_750_000, 40
    assert edges * module.weight_numel > 2**31
    x = torch.randn(nodes, module.irreps_in1.dim, device="cuda", requires_grad=True)
    y = torch.randn(edges, module.irreps_in2.dim, device="cuda", requires_grad=True)
    w = torch.randn(edges, module.weight_numel, device="cuda", requires_grad=True)
    ends = torch.randint(0, nodes - 1, (2, edges), device="cuda")
    ends[:, -last:] = nodes - 1  # a node with these edges alone
    with e3nn_accel.enabled(strict=True):
        out = module(x, y, w, ends)
        found = torch.autograd.grad(out[-1].sin().sum(), (x, y, w))
    ours = [out[-1], found[0][-1], found[1][-last:], found[2][-last:]]
    leaves = [t.detach()[-n:].double().requires_grad_() for t, n in ((x, 1), (y, last), (w, last))]
    sent = torch.zeros((2, last), dtype=torch.int64, device="cuda")
    value = unfused(exact, *leaves, sent)[0]
    expected = torch.autograd.grad(value.sin().sum(), leaves)
    for a, b in zip(ours, [value, expected[0][0], *expected[1:]], strict=True):
        assert error(a, b) <= 5e-6


def test_several_groups_are_captured_in_a_cuda_graph() -> None:
    """A replayed backward pass equals the eager one where it is made of several kernels."""
    module = product("many paths", torch.float32)
    x, y, w, ends = operands(module, 60, 700, torch.float32)
    x.requires_grad_()
    y.requires_grad_()
    with e3nn_accel.enabled(strict=True):

        def gradients() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(module(x, y, w, ends).sum(), (x, y))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                eager = gradients()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients()
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
