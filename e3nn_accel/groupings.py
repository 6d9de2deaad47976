"""Edges grouped by receiver, and nodes by species: found once, shared by the layers of one call.

A grouping belongs to the content of an index tensor. It is looked up by the tensor object and its
version counter, and on the CPU the content is compared with a private copy before it is used again:
a numpy array may share the tensor's memory and change it unseen. On a GPU that comparison would wait
for the device, and the version counter alone decides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from e3nn_accel.branches import Early, begun
from e3nn_accel.compat import version_counter
from e3nn_accel.tensor_keys import OfTensors

Grouping = TypeVar("Grouping")


@dataclass(frozen=True)
class Neighbours:
    """Edges in compressed rows of their receivers and of their senders, for kernels.

    Built on the device without waiting for it. Indices are int32: a tensor of edges has fewer than
    2^31 rows, offsets into it are computed in 64 bits.

    Attributes:
        nodes: Number of nodes.
        senders: [edges], the sender of each edge.
        by_receiver: [edges], edges in the order of their receivers, stable.
        first_of_receiver: [nodes + 1], where each receiver's edges start in it.
        by_sender, first_of_sender: The same for senders.
    """

    nodes: int
    senders: torch.Tensor
    by_receiver: torch.Tensor
    first_of_receiver: torch.Tensor
    by_sender: torch.Tensor
    first_of_sender: torch.Tensor


@dataclass(frozen=True)
class NodesBySpecies:
    """Rows of node_attrs grouped by their single non-zero, for kernels; rows with another number apart.

    Built on the device without waiting for it. Indices are int32, as of `Neighbours`.

    Attributes:
        attrs: [nodes, kinds], or None where every node is a species of its own.
        kinds: Species.
        species: [nodes], the column of a row's single non-zero; ``kinds`` for any other row.
        order: [nodes], nodes in the order of ``species``, stable.
        first: [kinds + 2], where each species starts in it, the last being ``kinds``.
    """

    attrs: torch.Tensor | None
    kinds: int
    species: torch.Tensor
    order: torch.Tensor
    first: torch.Tensor

    @classmethod
    def each_its_own(cls, nodes: int, device: torch.device) -> NodesBySpecies:
        """As many species as nodes."""
        numbers = torch.arange(nodes + 2, device=device, dtype=torch.int32)
        return cls(None, nodes, numbers[:nodes], numbers[:nodes], numbers.clamp(max=nodes))


FindsNeighbours = Callable[[torch.Tensor, int], Neighbours]
finders: dict[str, FindsNeighbours] = {}
"""By type of device, where something is faster than torch's sorts; a backend puts it here."""


class SumsGroups(Protocol):
    """What sums rows by groups."""

    def takes(self, rows: torch.Tensor) -> bool:
        """Whether `sum` does: by dtype and columns."""
        ...

    def sum(self, rows: torch.Tensor, order: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """[groups, ..] of ``rows`` [rows, ..]; rows ``order[first[n]:first[n + 1]]`` belong to group n."""
        ...


adders: dict[str, SumsGroups] = {}
"""By type of device, where something is faster than torch's operations; a backend puts it here."""


def nodes_by_species(
    attrs: torch.Tensor, find: Callable[[torch.Tensor], NodesBySpecies]
) -> NodesBySpecies:
    """Group rows of ``attrs`` [.., species] by their single non-zero; ``find`` does what `in_torch` does."""
    return shared(attrs, "nodes by species", find)


def neighbours_of(
    edge_index: torch.Tensor, nodes: int, find: FindsNeighbours | None = None
) -> Neighbours:
    """Both orders of the edges of ``edge_index`` [2, edges] (senders, receivers).

    ``find`` finds them; by default what `finders` has for the device, or `find_neighbours`.
    """
    return shared(edge_index, *_neighbours(edge_index, nodes, find))


def neighbours_begun(edge_index: torch.Tensor, nodes: int) -> Early[Neighbours]:
    """The same, which in a capture isn't waited for yet."""
    version = version_counter(edge_index)
    if version is None or not captured(edge_index):
        return Early(neighbours_of(edge_index, nodes))
    return _found_in_capture(edge_index, version, *_neighbours(edge_index, nodes))


def _neighbours(
    edge_index: torch.Tensor, nodes: int, find: FindsNeighbours | None = None
) -> tuple[str, Callable[[torch.Tensor], Neighbours]]:
    """What they are called, and what finds them."""
    by = find or finders.get(edge_index.device.type, find_neighbours)
    return f"neighbours {nodes}", lambda index: by(index, nodes)


def in_torch(attrs: torch.Tensor) -> NodesBySpecies:
    """Rows of ``attrs`` [.., species] by their single non-zero, of any number of species."""
    kinds = attrs.shape[-1]
    attrs = attrs.reshape(-1, kinds)
    single = torch.count_nonzero(attrs, 1) == 1
    # filled by a number, which a kernel takes as it is: `torch.where` would copy it, and wait
    species = attrs.abs().argmax(1).masked_fill(~single, kinds)
    ordered, order = torch.sort(species, stable=True)
    first = torch.searchsorted(ordered, torch.arange(kinds + 2, device=attrs.device))
    # a copy: the grouping is kept as long as its key is
    own = attrs.clone(memory_format=torch.contiguous_format)
    return NodesBySpecies(own, kinds, species.int(), order.int(), first.int())


def find_neighbours(edge_index: torch.Tensor, nodes: int) -> Neighbours:
    """Both orders in torch operations."""
    edge_index = torch.where(edge_index < 0, edge_index + nodes, edge_index)  # as indexing counts
    # radix sorts take time by the width of their keys; what no node is stays above all nodes
    narrow = torch.int16 if nodes < 1 << 15 else torch.int32
    keys = edge_index.clamp(max=nodes).to(narrow)
    starts = torch.arange(nodes + 1, device=edge_index.device, dtype=narrow)
    rows = []
    for ends in (keys[1], keys[0]):
        ordered, order = torch.sort(ends, stable=True)
        rows += [order.int(), torch.searchsorted(ordered, starts, out_int32=True)]
    return Neighbours(nodes, edge_index[0].int(), *rows)


Kept = tuple[int, torch.Tensor | None, Any]
"""The version counter, a private copy (on the CPU), and the grouping."""

_cache: OfTensors[dict[str, Kept]] = OfTensors()
_capture = threading.local()


def shared(tensor: torch.Tensor, kind: str, find: Callable[[torch.Tensor], Grouping]) -> Grouping:
    """What ``find`` makes of a tensor, found once for as long as the tensor lives and holds the same.

    Args:
        tensor: What the grouping is of.
        kind: What it is, apart from others of the same tensor.
        find: Called with the tensor detached; must keep no view of it.
    """
    version = version_counter(tensor)
    if version is None:
        return find(tensor)
    if captured(tensor):
        return _found_in_capture(tensor, version, kind, find).get()
    kept = _cache.get(tensor)
    if kept is None:
        _cache.put(tensor, kept := {})
    found = kept.get(kind)
    if (
        found is not None
        and found[0] == version
        and (found[1] is None or torch.equal(found[1], tensor))
    ):
        grouping: Grouping = found[2]
        return grouping
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # a later call may want gradients
            found = kept[kind] = _find_in(tensor, version, find)
    else:
        found = kept[kind] = _find_in(tensor, version, find)
    grouping = found[2]
    return grouping


@contextmanager
def one_capture() -> Iterator[None]:
    """Around the capture of one CUDA graph: what its operations find is found once, in the graph."""
    before, _capture.found = getattr(_capture, "found", None), {}
    try:
        yield
    finally:
        _capture.found = before


def _found_in_capture(
    tensor: torch.Tensor, version: int, kind: str, find: Callable[[torch.Tensor], Grouping]
) -> Early[Grouping]:
    """Each replay finds it anew, from what the tensor holds then; before the first it is nowhere.

    So it serves other operations of the same capture alone, and only where one begins and ends is known.
    """
    found: dict[Any, Any] | None = getattr(_capture, "found", None)
    key = (id(tensor), version, kind)
    if found is not None and key in found:
        known: Early[Grouping] = found[key][1]
        return known
    with torch.no_grad():
        grouping = begun(lambda: find(tensor.detach()), (tensor,))
    if found is not None:
        found[key] = tensor, grouping  # the tensor, too: another could have its number
    return grouping


def captured(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can wait for what the tensor holds."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _find_in(tensor: torch.Tensor, version: int, find: Callable[[torch.Tensor], Any]) -> Kept:
    plain = tensor.detach() if tensor.requires_grad else tensor
    return version, None if plain.is_cuda else plain.clone(), find(plain)
