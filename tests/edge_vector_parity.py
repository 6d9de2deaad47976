"""Vectors and lengths of edges by kernels against MACE's own function in float64, with all derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comparison import draw, poisoned_memory
from graphs import GRAPHS, random_edges

from e3nn_accel.backends.cuda.edge_vectors import EdgeVectors
from e3nn_accel.config import Config
from e3nn_accel.groupings import find_neighbours
from e3nn_accel.ops.edge_vectors import Edges, edge_vectors

Graph = tuple[int, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
CASES: dict[str, Graph] = {
    **GRAPHS,
    "several blocks": (70, random_edges(70, 900)),
    "counted from the end": (6, random_edges(6, 40) - 3),
    "other strides": (7, random_edges(7, 30).T.contiguous().T),
    "every second": (7, random_edges(7, 30)[:, ::2]),
}
OPERANDS = ("positions", "shifts", "dv", "dl")
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-4}


def stock(positions: torch.Tensor, shifts: torch.Tensor, edge_index: torch.Tensor) -> Pair:
    """As MACE has it."""
    vectors = positions[edge_index[1]] - positions[edge_index[0]] + shifts
    return vectors, torch.linalg.norm(vectors, dim=-1, keepdim=True)


def ours(positions: torch.Tensor, shifts: torch.Tensor, edge_index: torch.Tensor) -> Pair:
    """By kernels."""
    neighbours = find_neighbours(edge_index, positions.shape[0])
    of = Edges(edge_index, lambda: neighbours, EdgeVectors(Config()))
    return edge_vectors(positions, shifts, of)


def drawn(
    case: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Positions, shifts, and gradients of both results."""
    nodes, edge_index = CASES[case]
    edges = edge_index.shape[1]
    shapes = (nodes, 3), (edges, 3), (edges, 3), (edges, 1)
    positions, shifts, dv, dl = (draw(shape, n, dtype) for n, shape in enumerate(shapes))
    found = [t.to(device).requires_grad_() for t in (positions, shifts, dv, dl)]
    return found, edge_index.to(device)


def derivatives(
    function: Callable[..., Pair],
    operands: list[torch.Tensor],
    edge_index: torch.Tensor,
    which: str,
) -> dict[str, torch.Tensor]:
    """Values, first, second and third derivatives of what ``which`` names: vectors, lengths or both."""
    positions, shifts, dv, dl = operands
    vectors, lengths = function(positions, shifts, edge_index)
    outs = {"vectors": vectors, "lengths": lengths}
    grads = {"vectors": dv, "lengths": dl}
    names = list(outs) if which == "both" else [which]
    first = torch.autograd.grad(
        [outs[n] for n in names], (positions, shifts), [grads[n] for n in names], create_graph=True
    )
    found = {**outs, **dict(zip(("d positions", "d shifts"), first, strict=True))}
    total = sum(
        (f.sin() * draw(tuple(f.shape), 9 + n, f.dtype).to(f.device)).sum()
        for n, f in enumerate(first)
    )
    second = torch.autograd.grad(total, operands, create_graph=True, allow_unused=True)
    found |= {f"dd {name}": t for name, t in zip(OPERANDS, second, strict=True) if t is not None}
    used = [t for t in second if t is not None and t.requires_grad]
    third = torch.autograd.grad(
        sum((t.cos().sum() for t in used), positions.sum()), operands, allow_unused=True
    )
    return found | {
        f"ddd {name}": t for name, t in zip(OPERANDS, third, strict=True) if t is not None
    }


def check(case: str, which: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Everything, against float64; then the gradient by positions alone, as forces ask for it."""
    operands, edge_index = drawn(case, dtype, device)
    exact = [t.detach().double().requires_grad_() for t in operands]
    expected = derivatives(stock, exact, edge_index, which)
    with poisoned_memory():
        found = derivatives(ours, operands, edge_index, which)
        vectors, lengths = ours(operands[0], operands[1].detach(), edge_index)
        of = {"vectors": [vectors], "lengths": [lengths], "both": [vectors, lengths]}[which]
        above = {"vectors": operands[2:3], "lengths": operands[3:], "both": operands[2:]}[which]
        (alone,) = torch.autograd.grad(of, operands[0], [g.detach() for g in above])
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        got = found[name]
        assert got.dtype == dtype
        if wanted.numel():
            error = float((got.double() - wanted).detach().abs().max())
            size = max(1.0, float(wanted.detach().abs().max()))
            assert error <= LIMIT[dtype] * size, (name, error, size)
    assert torch.equal(alone, found["d positions"])
