"""Linears of rows that were there before, by one kernel, with one look at the device and at the stream."""

from __future__ import annotations

from collections.abc import Callable

import torch

from e3nn_accel.backends.cuda.indexed_linear_layout import SortedRows
from e3nn_accel.launch import COPY_BYTES, Dimensions, Kernel, aligned
from e3nn_accel.new_memory import new_memory_of

Run = Callable[[torch.Tensor, torch.Tensor, SortedRows], torch.Tensor]
"""Of rows, of weights, and of how the rows are sorted."""
NOT_SORTED = (0, 0, 0)


def addresses(by: SortedRows) -> tuple[int, int, int]:
    """Of scalars, order and starts of classes, for a launch of rows that are sorted."""
    attrs, order, first = by
    assert attrs is not None
    assert order is not None
    assert first is not None
    return attrs.data_ptr(), order.data_ptr(), first.data_ptr()


def run_of_kernel(
    kernel: Kernel,
    grid: Dimensions,
    block: Dimensions,
    shared: int,
    shape: tuple[int, int],
    like: torch.Tensor,
    run: Run,
) -> Run:
    """``run``, to which calls are left while another device is current, or where there is nothing to launch.

    Args:
        kernel: Of rows; it writes all of the result.
        grid: Of its launch.
        block: Likewise.
        shared: Likewise.
        shape: Of the result.
        like: Rows, whose number, dtype and device are those of all calls, each tensor in one piece.
        run: What does the same.
    """
    new_memory = new_memory_of(like.device)
    if new_memory is None or 0 in grid:
        return run
    index, current_device, stream_of = kernel.index, kernel.current_device, kernel.stream_of
    launch, packed = kernel.prepared(grid, block, shared), kernel.arguments
    rows, strides, dtype = like.shape[0], (shape[1], 1), like.dtype

    def run_at_once(x: torch.Tensor, w: torch.Tensor, by: SortedRows) -> torch.Tensor:
        if current_device() != index:
            return run(x, w, by)
        begin, weights = x.data_ptr(), w.data_ptr()
        if (begin | weights) % COPY_BYTES:
            x, w = aligned(x), aligned(w)
            begin, weights = x.data_ptr(), w.data_ptr()
        out = new_memory(shape, strides, dtype)
        pack, arguments = packed.own
        sorting = NOT_SORTED if by[2] is None else addresses(by)
        pack(begin, *sorting, weights, rows, out.data_ptr())
        stream = stream_of(index)
        try:
            launch(stream, arguments, 0)
        except Exception as error:
            kernel.with_room_made(error, launch, stream, arguments)
        return out

    return run_at_once
