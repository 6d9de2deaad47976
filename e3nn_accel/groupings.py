"""Edges grouped by receiver, and nodes by species: found once, shared by the layers of one call.

A grouping belongs to the content of an index tensor. It is looked up by the tensor object and its
version counter, and on the CPU the content is compared with a private copy before it is used again:
a numpy array may share the tensor's memory and change it unseen. On a GPU that comparison would wait
for the device, and the version counter alone decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from e3nn_accel.compat import version_counter

Grouping = TypeVar("Grouping")
Groups = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Species:
    """Rows sorted by the column of their single non-zero.

    Attributes:
        order: [rows], the rows in sorted order.
        inverse: [rows], where each row went.
        is_sorted: The rows came sorted; nothing need move.
        values: [rows], the non-zeros in sorted order, or None where all are one.
        column: [rows], the species of each row in the caller's order.
        bounds: (species, first row, last row + 1) in sorted order.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    is_sorted: bool
    values: torch.Tensor | None
    column: torch.Tensor
    bounds: Groups

    def groups(self, rows_each: int) -> Groups:
        """The same where each row became ``rows_each`` rows."""
        return tuple(
            (kind, first * rows_each, last * rows_each) for kind, first, last in self.bounds
        )


@dataclass(frozen=True)
class Blocks:
    """Edges of each receiver in blocks of a fixed number of slots, the last block padded.

    Sums over a receiver's edges become batched matrix products over blocks, and only the few
    blocks are scattered.

    Attributes:
        width: Slots a block.
        source: [blocks * width], the edge in each slot; the number of edges marks an empty slot.
        slot: [edges], the slot of each edge.
        sender: [blocks * width], the sender of each slot's edge; in empty slots that of the block's
            first edge, so that what isn't finite there reaches no receiver that it doesn't reach anyway.
        receiver: [blocks], the receiver of each block.
    """

    width: int
    source: torch.Tensor
    slot: torch.Tensor
    sender: torch.Tensor
    receiver: torch.Tensor


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


def species_of(attrs: torch.Tensor) -> Species | None:
    """Group rows [.., species] by their single non-zero.

    None where a row has another number of them, and while a CUDA graph is captured, which can't wait to know.
    """
    if _captured(attrs):
        return None
    return _shared(attrs, "species", _find_species)


def nodes_by_species(
    attrs: torch.Tensor, find: Callable[[torch.Tensor], NodesBySpecies]
) -> NodesBySpecies:
    """Group rows of ``attrs`` [.., species] by their single non-zero; ``find`` does what `in_torch` does."""
    return _shared(attrs, "nodes by species", find)


def blocks_of(edge_index: torch.Tensor, nodes: int) -> Blocks:
    """Group the edges of ``edge_index`` [2, edges] (senders, receivers) by receiver.

    Raises:
        IndexError: A receiver or sender that isn't one of the ``nodes`` (senders may count from the end).
        RuntimeError: A CUDA graph is being captured, in which nothing can depend on the number of blocks.
    """
    if _captured(edge_index):
        raise RuntimeError("convolutions in torch operations wait for the device: they need CuPy")
    return _shared(edge_index, f"blocks {nodes}", lambda index: _find_blocks(index, nodes))


def neighbours_of(edge_index: torch.Tensor, nodes: int) -> Neighbours:
    """Both orders of the edges of ``edge_index`` [2, edges] (senders, receivers)."""
    return _shared(edge_index, f"neighbours {nodes}", lambda index: _find_neighbours(index, nodes))


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


def _find_neighbours(edge_index: torch.Tensor, nodes: int) -> Neighbours:
    edge_index = torch.where(edge_index < 0, edge_index + nodes, edge_index)  # as indexing counts
    starts = torch.arange(nodes + 1, device=edge_index.device)
    rows = []
    for ends in (edge_index[1], edge_index[0]):
        ordered, order = torch.sort(ends, stable=True)
        rows += [order.int(), torch.searchsorted(ordered, starts).int()]
    return Neighbours(nodes, edge_index[0].int(), *rows)


def _find_species(attrs: torch.Tensor) -> Species | None:
    attrs = attrs.reshape(-1, attrs.shape[-1])
    rows = len(attrs)
    if not rows:
        nowhere = torch.zeros(0, dtype=torch.int64, device=attrs.device)
        return Species(nowhere, nowhere, True, None, nowhere, ())
    # as many non-zeros as rows and one in each row: found by size, whatever its sign
    values, columns = attrs.max(1)
    if int(torch.count_nonzero(attrs)) != rows:
        return None
    ones = bool((values == 1).all())
    if not ones:
        columns = attrs.abs().argmax(1)
        values = attrs.gather(1, columns.unsqueeze(1)).squeeze(1)
        if not bool((values != 0).all()):
            return None
    by_species, order = torch.sort(columns, stable=True)
    is_sorted = torch.equal(by_species, columns)
    inverse = (
        order
        if is_sorted
        else torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device))
    )
    kinds, counts = torch.unique_consecutive(by_species, return_counts=True)
    bounds, first = [], 0
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        bounds.append((kind, first, first + count))
        first += count
    return Species(
        order, inverse, is_sorted, None if ones else values[order], columns, tuple(bounds)
    )


def _find_blocks(edge_index: torch.Tensor, nodes: int) -> Blocks:
    senders, receivers = edge_index[0], edge_index[1]
    edges, device = len(receivers), receivers.device
    if edges and (
        int(receivers.min()) < 0 or int(senders.min()) < -nodes or int(edge_index.max()) >= nodes
    ):
        raise IndexError(
            f"edge_index must lie in [0, {nodes}), got {int(edge_index.min())} to {int(edge_index.max())}"
        )
    senders = torch.where(
        senders < 0, senders + nodes, senders
    )  # indexing counts these from the end
    order = torch.argsort(receivers, stable=True)
    degree = torch.bincount(receivers, minlength=nodes)
    width = _width(edges / max(int((degree > 0).sum()), 1))
    blocks = (degree + width - 1) // width
    first_edge = torch.cumsum(degree, 0) - degree
    first_slot = (torch.cumsum(blocks, 0) - blocks) * width
    by_receiver = receivers[order]
    slots = torch.arange(edges, device=device) + (first_slot - first_edge)[by_receiver]
    source = torch.full((int(blocks.sum()) * width,), edges, dtype=torch.int64, device=device)
    source[slots] = order
    edge = source.view(-1, width)
    edge = torch.where(edge < edges, edge, edge[:, :1])
    sender = senders[edge.flatten()]
    slot = torch.empty(edges, dtype=torch.int64, device=device)
    slot[order] = slots
    return Blocks(
        width,
        source,
        slot,
        sender,
        torch.repeat_interleave(torch.arange(nodes, device=device), blocks),
    )


def _width(mean_degree: float) -> int:
    """Slots a block: wide enough to feed a matrix product, narrow enough to waste few slots.

    Measured on two cores, 128 channels, 46 edges a node: 8 and 16 are alike, 32 and more lose a third.
    """
    return 4 if mean_degree < 6 else 8 if mean_degree < 20 else 16


_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _shared(tensor: torch.Tensor, kind: str, find: Callable[[torch.Tensor], Grouping]) -> Grouping:
    version = version_counter(tensor)
    if version is None:
        return find(tensor)
    if _captured(tensor):
        # Each replay finds it anew, from what the tensor holds then; before the first it is nowhere.
        with torch.no_grad():
            return find(tensor.detach())
    kept: dict[str, tuple[int, torch.Tensor | None, Any]] = _cache.setdefault(tensor, {})
    found = kept.get(kind)
    if (
        found is not None
        and found[0] == version
        and (found[1] is None or torch.equal(found[1], tensor))
    ):
        grouping: Grouping = found[2]
        return grouping
    with torch.inference_mode(False), torch.no_grad():  # a later call may want gradients
        plain = tensor.detach()
        grouping = find(plain)
        kept[kind] = (version, None if plain.is_cuda else plain.clone(), grouping)
    return grouping


def _captured(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
