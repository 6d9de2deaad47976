"""Batches like the last one, known at a glance, and all others: what a reader that saw none before says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from e3nn_accel.graphs.batches import BatchReader
from e3nn_accel.graphs.eligibility import RunsEagerly
from e3nn_accel.graphs.padding import AXES

pytestmark = pytest.mark.once
CPU, FLAGS = torch.device("cpu"), ("compute_force",)
Batch = dict[str, Any]


def batch(nodes: int = 5, edges: int = 12, dtype: torch.dtype = torch.float32) -> Batch:
    """Of one structure, and what MACE doesn't read."""
    whole = torch.long
    return {
        "positions": torch.randn(nodes, 3, dtype=dtype),
        "node_attrs": torch.randn(nodes, 4, dtype=dtype),
        "batch": torch.zeros(nodes, dtype=whole),
        "edge_index": torch.randint(nodes, (2, edges)),
        "shifts": torch.randn(edges, 3, dtype=dtype),
        "unit_shifts": torch.randn(edges, 3, dtype=dtype),
        "cell": torch.randn(3, 3, dtype=dtype),
        "ptr": torch.tensor([0, nodes]),
        "head": torch.zeros(1, dtype=whole),
        "energy": torch.zeros(1),
    }


def said(reader: BatchReader, of: Batch) -> object:
    """What a reader says of a batch, apart from its tensors."""
    try:
        request = reader.read(of, FLAGS, CPU)
    except RunsEagerly as why:
        return str(why)
    assert all(request.inputs[name] is of[name] for name in request.inputs)
    assert request.data is of
    return request.size, request.signature, tuple(request.inputs), dict(request.axes)


def replaced(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[], Batch]:
    """A batch with one tensor another."""

    def changed() -> Batch:
        found = batch()
        return found | {name: change(found[name])}

    return changed


class Subclass(torch.Tensor):
    """Not a plain tensor."""


def in_inference_mode(t: torch.Tensor) -> torch.Tensor:
    """The same, as torch.inference_mode makes it."""
    with torch.inference_mode():
        return t.clone()


OTHERS: dict[str, Callable[[], Batch]] = {
    "fewer edges": lambda: batch(edges=11),
    "more nodes": lambda: batch(nodes=6),
    "float64": lambda: batch(dtype=torch.float64),
    "edges that don't agree": replaced("shifts", lambda t: t[:-1].clone()),
    "one dtype": replaced("shifts", torch.Tensor.double),
    "one more column": replaced("node_attrs", lambda t: torch.randn(len(t), 5)),
    "a cell of each structure": replaced("cell", lambda t: t[None]),
    "positions that want a gradient": replaced("positions", lambda t: t.requires_grad_(True)),
    "a cell that wants one": replaced("cell", lambda t: t.requires_grad_(True)),
    "edges in pieces": replaced("edge_index", lambda t: t.T.contiguous().T),
    "every second edge": replaced("edge_index", lambda t: t.repeat(1, 2)[:, ::2]),
    "a subclass": replaced("shifts", lambda t: t.as_subclass(Subclass)),
    "a parameter": replaced("positions", torch.nn.Parameter),
    "an inference tensor": replaced("shifts", in_inference_mode),
    "sparse": replaced("node_attrs", torch.Tensor.to_sparse),
    "a list": replaced("ptr", torch.Tensor.tolist),
    "no head": lambda: {name: t for name, t in batch().items() if name != "head"},
    "no positions": lambda: {name: t for name, t in batch().items() if name != "positions"},
    "a displacement": lambda: {**batch(), "displacement": torch.zeros(3, 3)},
}


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("name", OTHERS)
def test_another_after_some_that_are_alike(name: str, times: int) -> None:
    """And the first kind after it, and the other again."""
    reader = BatchReader(AXES)
    expected = said(BatchReader(AXES), batch())
    for _ in range(2):
        for make in (batch, OTHERS[name]):
            wanted = expected if make is batch else said(BatchReader(AXES), make())
            for _ in range(times):
                assert said(reader, make()) == wanted


def test_with_a_torch_that_compares_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is looked at."""

    class Other:
        def __init__(self, *tensors: torch.Tensor) -> None: ...

    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Other)
    reader, expected = BatchReader(AXES), said(BatchReader(AXES), batch())
    assert [said(reader, batch()) for _ in range(4)] == [expected] * 4


def test_of_another_device() -> None:
    """Where the positions are, and others not, is no batch, whatever came before."""
    reader = BatchReader(AXES)
    for _ in range(3):
        said(reader, batch())
    moved = replaced("shifts", lambda t: t.to("meta"))
    assert said(reader, moved()) == "shifts is on meta, the positions on cpu"


def test_a_batch_like_the_last_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third on; the same signature each time, which is compared at a glance."""
    reader = BatchReader(AXES)
    first, _ = (reader.read(batch(), FLAGS, CPU) for _ in range(2))
    monkeypatch.delattr(BatchReader, "_found")
    assert reader.read(batch(), FLAGS, CPU).signature is first.signature
