"""Sizes that a captured graph is padded to, and the dummy graph that fills them up.

Dummy nodes are a graph of their own, the last of the batch: nothing of theirs is added to anything
real. Dummy edges join dummy nodes over more than the cutoff, so what a model makes of their length is
zero; they are spread over several nodes, lest one receiver keep its block of threads busy when the
others are done. Under stress MACE recomputes shifts from unit_shifts and cell, and divides by the
volume: the dummy's cell is a cube, its unit_shifts and shifts agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, log2
from typing import Any

import torch

NODE_STEP, EDGE_STEP, GRAPH_STEP = 8, 64, 1
FINENESS = 64
"""Sizes grow in steps of a 64th to a 32nd of themselves, as does the time of a replay with what is padded."""
ENDS = 32
"""Of so many nodes one more is reserved for the ends of dummy edges."""
WASTE = 1.25
"""A captured size takes a call if it isn't larger than this many times the size made for the call, or by two steps."""
FEWEST_RESERVED = 4
"""Ends of dummy edges at least: two of a small system would have twice an atom's edges, and others wait for them."""
LONGEST_BOND = 6.0
"""Above twice the largest covalent radius, at which MACE's repulsion of pairs (ZBL) ends."""


@dataclass(frozen=True)
class Size:
    """Of a batch of structures."""

    nodes: int
    edges: int
    graphs: int

    def __str__(self) -> str:
        return f"{self.nodes} atoms, {self.edges} edges, {self.graphs} structures"


@dataclass(frozen=True)
class Capacity:
    """Of a captured graph, dummies included.

    Attributes:
        reserved: The last so many nodes are always dummies: the dummy edges' ends.
    """

    nodes: int
    edges: int
    graphs: int
    reserved: int

    @classmethod
    def of(cls, size: Size) -> Capacity:
        """With room for the edges that come and go while atoms move."""
        reserved = max(FEWEST_RESERVED, size.nodes // ENDS)
        return cls(
            nodes=_rounded(size.nodes + reserved, NODE_STEP),
            edges=_rounded(size.edges + _headroom(size.edges), EDGE_STEP),
            graphs=_rounded(size.graphs + 1, GRAPH_STEP),
            reserved=reserved,
        )

    def takes(self, size: Size) -> bool:
        """Whether a batch fits, without too much of what is computed being dummies."""
        fits = (
            size.nodes <= self.nodes - self.reserved
            and size.edges <= self.edges
            and size.graphs < self.graphs
        )
        if not fits:
            return False
        made = _made_for(size)
        return (
            self.nodes <= max(WASTE * made.nodes, made.nodes + 2 * NODE_STEP)
            and self.edges <= max(WASTE * made.edges, made.edges + 2 * EDGE_STEP)
            and self.graphs <= 2 * made.graphs
        )

    def __str__(self) -> str:
        return f"{self.nodes} atoms, {self.edges} edges, {self.graphs} structures"


@lru_cache(maxsize=1024)
def _made_for(size: Size) -> Capacity:
    """Asked at every call: in molecular dynamics the same few sizes come back."""
    return Capacity.of(size)


def _headroom(edges: int) -> int:
    """For edges that come and go: of few a larger share, as they fluctuate."""
    return edges // FINENESS + isqrt(edges) + 1


def _rounded(number: int, least: int) -> int:
    """Up to a multiple of a power of two that is about a 64th of it, or of ``least``."""
    step = max(least, 1 << max(0, int(log2(max(number, 1) / FINENESS)))) if number else least
    return -(-number // step) * step


@dataclass(frozen=True)
class Axis:
    """Along which dimension an input grows, and with what.

    Attributes:
        of: "nodes", "edges" or "graphs".
        each: Rows for each of them.
        extra: Rows besides.
        dim: The dimension.
    """

    of: str
    each: int = 1
    extra: int = 0
    dim: int = 0

    def length(self, size: Size | Capacity) -> int:
        """Rows of a batch of this size."""
        return int(getattr(size, self.of)) * self.each + self.extra


NODES, EDGES, GRAPHS = Axis("nodes"), Axis("edges"), Axis("graphs")
AXES: Mapping[str, Axis] = {
    "positions": NODES,
    "node_attrs": NODES,
    "batch": NODES,
    "edge_index": Axis("edges", dim=1),
    "shifts": EDGES,
    "unit_shifts": EDGES,
    "cell": Axis("graphs", each=3),
    "ptr": Axis("graphs", extra=1),
    "head": GRAPHS,
}
"""What MACE's forward reads of a batch; some models have further features (`feature_axes`)."""


def feature_axes(model: Any) -> dict[str, Axis]:
    """The axes of a model's further inputs: total charge or spin, say."""
    specs: Mapping[str, Any] = getattr(model, "embedding_specs", None) or {}
    return {name: GRAPHS if spec["per"] == "graph" else NODES for name, spec in specs.items()}


def feature_offsets(model: Any) -> dict[str, int]:
    """The value of each further input that a model takes for its class 0: valid whatever its classes."""
    specs: Mapping[str, Any] = getattr(model, "embedding_specs", None) or {}
    return {name: -int(spec.get("offset", 0)) for name, spec in specs.items()}


def dummies(
    like: Mapping[str, torch.Tensor],
    axes: Mapping[str, Axis],
    capacity: Capacity,
    cutoff: float,
    offsets: Mapping[str, int],
) -> dict[str, torch.Tensor]:
    """Inputs of nothing but dummies, of the dtypes, devices and further dimensions of ``like``.

    Each row holds what it has to while it is a dummy, whichever other rows are real.
    """
    found = {}
    for name, tensor in like.items():
        shape = list(tensor.shape)
        shape[axes[name].dim] = axes[name].length(capacity)
        found[name] = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    found["node_attrs"][:, 0] = 1
    found["batch"].fill_(capacity.graphs - 1)
    found["ptr"].fill_(capacity.nodes)
    edge = torch.arange(capacity.edges, device=found["edge_index"].device)
    first = capacity.nodes - capacity.reserved
    found["edge_index"][0] = first + (edge + 1) % capacity.reserved
    found["edge_index"][1] = first + edge % capacity.reserved
    length = max(2 * cutoff, LONGEST_BOND)
    for name, value in (("shifts", length), ("unit_shifts", 1)):
        if name in found:
            found[name][:, 0] = value
    cube = length * torch.eye(3, dtype=found["cell"].dtype, device=found["cell"].device)
    found["cell"].view(-1, 3, 3).copy_(cube.expand(capacity.graphs, 3, 3))
    for name, value in offsets.items():
        if name in found:
            found[name].fill_(value)
    return found
