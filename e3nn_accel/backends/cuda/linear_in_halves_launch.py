"""Linears by halves of rows that were there before: both launches with one look at the device and at the stream.

A call of these is short enough for the device to wait for the host. So what rows of one number need is found once, and
while the device cuts the weights the host asks for memory for the result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from e3nn_accel.backends.cuda.indexed_linear_known import Run, addresses
from e3nn_accel.backends.cuda.indexed_linear_layout import SortedRows
from e3nn_accel.backends.cuda.linear_in_halves import LinearInHalves
from e3nn_accel.branches import branches_of_streams
from e3nn_accel.launch import COPY_BYTES, Kernel, aligned, multiprocessors
from e3nn_accel.new_memory import new_memory_of

NewMemory = Callable[..., torch.Tensor]
REAL = torch.float32


def run_of_rows(
    halved: LinearInHalves, kernels: tuple[Kernel, ...], rows: int, device: torch.device
) -> Run:
    """What `LinearInHalves.rows` does with so many rows, not none, each tensor in one piece on the kernels' device."""
    blocks, new_memory = halved.blocks(rows, multiprocessors(device)), new_memory_of(device)

    def run(x: torch.Tensor, w: torch.Tensor, by: SortedRows) -> torch.Tensor:
        return halved.rows(kernels, blocks, aligned(x), w, by)

    if new_memory is None or not halved.whole:
        return run
    return _with_one_look(halved, kernels, rows, blocks, new_memory, run)


def _with_one_look(
    halved: LinearInHalves,
    kernels: tuple[Kernel, ...],
    rows: int,
    blocks: int,
    new_memory: NewMemory,
    run: Run,
) -> Run:
    """The same; left to ``run`` while another device is current, or a capture has branches."""
    cutter, product = kernels
    index, current_device, stream_of = product.index, product.current_device, product.stream_of
    cut = cutter.prepared(halved.cutters, halved.cutting)
    multiply = product.prepared((blocks, 1, 1), halved.block, halved.shared, halved.overlapping)
    of_cutter, of_product = cutter.arguments, product.arguments
    room, columns, one = (halved.room_for_halves,), halved.side.out_row, (1,)
    size, strides = (rows, columns), (columns, 1)

    def run_at_once(x: torch.Tensor, w: torch.Tensor, by: SortedRows) -> torch.Tensor:
        if branches_of_streams or current_device() != index:
            return run(x, w, by)
        begin = x.data_ptr()
        if begin % COPY_BYTES:
            x = aligned(x)  # before the weights are cut: rows are read before that has ended
            begin = x.data_ptr()
        first = by[2]
        stream, halves = stream_of(index), new_memory(room, one, REAL)
        in_halves = halves.data_ptr()
        pack, arguments = of_cutter.own
        if first is None:
            pack(w.data_ptr(), in_halves)
        else:
            pack(w.data_ptr(), first.data_ptr(), in_halves)
        try:
            cut(stream, arguments, 0)
        except Exception as error:
            cutter.with_room_made(error, cut, stream, arguments)
        out = new_memory(size, strides, REAL)
        pack, arguments = of_product.own
        if first is None:
            pack(begin, in_halves, rows, out.data_ptr())
        else:
            pack(begin, *addresses(by), in_halves, rows, out.data_ptr())
        try:
            multiply(stream, arguments, 0)
        except Exception as error:
            product.with_room_made(error, multiply, stream, arguments)
        return out

    return run_at_once
