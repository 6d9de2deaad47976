"""How the convolution's kernels are laid out over threads, registers and shared memory.

Chosen from the tables of a plan alone, never from the graph. Fitted on an H100 by
``tests/gpu/tune_convolution.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from e3nn_accel.descriptor import TensorProductDescriptor
from e3nn_accel.irreps import dim_of

if TYPE_CHECKING:
    from e3nn_accel.backends.cuda.convolution_plan import Group

Kind = Literal["forward", "backward", "double", "gather"]
REGISTER_FILE = 65536
STATIC_SHARED = 46 * 1024
"""Bytes of shared memory that a kernel may declare on every architecture, less some for the compiler."""
STAGED_SHARED = {90: 228 * 1024, 100: 228 * 1024, 103: 228 * 1024}
"""Bytes of shared memory of a multiprocessor, by compute capability, where rows are moved by bulk copies.

12.0 has bulk copies, too, and less than half the memory: there the ring would cost more blocks than it gains.
"""
EDGES_A_SHARE = 4
"""Edges of a block on average, at least, where several share a receiver: each has to build what they share."""
MOST_SHARES = 16
MOST_SUMS, BLOCKS_SHARING = 4, 5
"""The same forward, where what blocks share is added up by a further launch; and of a multiprocessor about so many."""
BLOCK_RESERVE = 1024
"""Bytes of it that the system takes for each block."""


@dataclass(frozen=True)
class Schedule:
    """How one kernel is laid out.

    Attributes:
        threads: Channels a block.
        chunks: Blocks that share a node.
        edges: Edges a batch.
        blocks: Blocks that should fit one multiprocessor; bounds the registers of a thread.
        slots: Edges whose rows are in shared memory or on their way there; 0: rows go through
            registers.
        shared: Bytes of dynamic shared memory.
    """

    threads: int
    chunks: int
    edges: int
    blocks: int
    slots: int = 0
    shared: int = 0


def schedule(group: Group, kind: Kind, real_bytes: int) -> Schedule:
    """Threads, batch and occupancy of a kernel whose rows go through registers.

    The register estimate was fitted on MACE's layers 1 and 2 (16 and 40 outputs a channel) and on 71
    outputs: with as many blocks as it allows each kernel ran fastest, with more it spilled.
    """
    threads, chunks = _threads(group)
    words = real_bytes // 4
    prefetched = 2 * (len(group.terms) + len(group.inputs))
    registers = words * (len(group.outputs) + prefetched + _sums(group, kind))
    registers += 16 if kind in ("forward", "gather") else 30
    each = _bytes_an_edge(group, kind, real_bytes, threads // 32) + 8
    edges = next((n for n in (32, 16, 8, 4, 2) if n * each <= STATIC_SHARED), 1)
    return Schedule(threads, chunks, edges, _resident(threads, registers))


def staged_schedule(
    d: TensorProductDescriptor, groups: list[Group], kind: Kind, real_bytes: int, architecture: int
) -> Schedule | None:
    """Layout of a kernel whose rows are copied to shared memory; None where rows go through registers.

    Two blocks with four slots each are the least that hides the way of a row; with less, kernels
    that keep the next row in registers were faster. Slots beyond six gained nothing.
    """
    shared = STAGED_SHARED.get(architecture, 0)
    if not shared or not _moves_whole_rows(d, groups, real_bytes):
        return None
    (group,) = groups
    threads, _ = _threads(group)
    words = real_bytes // 4
    registers = words * (len(group.outputs) + len(group.inputs) + 2 * 4 + _sums(group, kind))
    registers += 24 if kind == "forward" else 32
    for edges in (32, 16, 8):
        size = _staged_bytes(d, group, kind, real_bytes, edges, 4)
        blocks = min(_resident(threads, registers), shared // (size + BLOCK_RESERVE))
        if blocks >= 2:
            break
    else:
        return None
    sizes = {n: _staged_bytes(d, group, kind, real_bytes, edges, n) for n in (6, 5, 4)}
    slots = next(n for n, size in sizes.items() if blocks * (size + BLOCK_RESERVE) <= shared)
    return Schedule(threads, 1, edges, blocks, slots, sizes[slots])


def shares(layout: Schedule, nodes: int, edges: int, multiprocessors: int) -> int:
    """Blocks for each receiver and chunk of a kernel whose results are an edge's each.

    One where receivers alone fill the device; never so many that a block has less than `EDGES_A_SHARE`.
    """
    wanted = multiprocessors * layout.blocks // max(nodes * layout.chunks, 1)
    return max(1, min(wanted, edges // max(nodes * EDGES_A_SHARE, 1), MOST_SHARES))


def sums_of_shares(chunks: int, nodes: int, multiprocessors: int) -> int:
    """The same of the forward kernel: a power of two, whatever the layout and however many edges there are.

    It is the order of a receiver's sum. So most graphs have that of the padded one that is replayed for them
    (`graphs.padding`), and their results are the same to the bit.
    """
    wanted = BLOCKS_SHARING * multiprocessors // (nodes * chunks) if nodes else 1
    return 1 << (max(1, min(wanted, MOST_SUMS)).bit_length() - 1)


def _moves_whole_rows(d: TensorProductDescriptor, groups: list[Group], real_bytes: int) -> bool:
    """One group that uses its rows whole, in pieces of 16 bytes, with a thread for each channel."""
    if len(groups) != 1:
        return False
    (group,) = groups
    rows = dim_of(d.irreps_in1), d.weight_numel
    used = (
        sum(mul for _, _, mul in group.inputs),
        sum(term.mul for term in group.terms if term.weight >= 0),
    )
    return (
        all(row > 0 and row * real_bytes % 16 == 0 for row in rows)
        and used == rows
        and group.second == list(range(dim_of(d.irreps_in2)))
        and _threads(group)[1] == 1
    )


def _staged_bytes(
    d: TensorProductDescriptor, group: Group, kind: Kind, real_bytes: int, edges: int, slots: int
) -> int:
    """Shared memory of a block, as ``struct Stage`` of convolution_staged.cuh lays it out, or a little more."""
    rows = (dim_of(d.irreps_in1) + d.weight_numel) * (2 if kind == "double" else 1)
    slot = -(-rows * real_bytes // 128) * 128
    each = _bytes_an_edge(group, kind, real_bytes, _threads(group)[0] // 32) + 16
    return slots * (slot + 24) + edges * each + 512


def padded(components: int) -> int:
    """The power of two, at most 32, that a warp's reduction works on."""
    return 1 << max(components - 1, 0).bit_length()


def _threads(group: Group) -> tuple[int, int]:
    """Threads of a block, and blocks that share a node."""
    widest = max(term.mul for term in group.terms)
    threads = min(128, -(-widest // 32) * 32)
    return threads, -(-widest // threads)


def _sums(group: Group, kind: Kind) -> int:
    """Numbers a thread keeps besides operands and outputs."""
    if kind in ("forward", "gather"):
        return 0
    extra = padded(len(group.second)) + len(group.inputs)
    return extra + (len(group.outputs) if kind == "double" else 0)


def _resident(threads: int, registers: int) -> int:
    return max(1, min(REGISTER_FILE // (threads * registers), 2048 // threads, 16))


def _bytes_an_edge(group: Group, kind: Kind, real_bytes: int, warps: int) -> int:
    rows = len(group.second) + -(-len(group.entries) // 4) * 4
    rows *= 2 if kind == "double" else 1
    if kind in ("backward", "double"):
        rows += warps * padded(len(group.second))
    return rows * real_bytes
