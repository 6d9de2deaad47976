"""A device whose memory is full, met by the driver: room is made once, and then it is torch's own error.

Loading code and launching kernels with much local memory take memory outside torch's allocator, which
keeps what tensors have freed. Programs expect `torch.cuda.OutOfMemoryError` and nothing else: they
halve their batch, or free something and call again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)
Result = TypeVar("Result")
OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY of the driver and cudaErrorMemoryAllocation of the run-time library."""


def is_full(error: Exception) -> bool:
    """Whether CuPy raised this because the device has no memory left."""
    return getattr(error, "status", None) == OUT_OF_MEMORY


def with_memory(attempt: Callable[[], Result], index: int) -> Result:
    """What ``attempt`` returns, tried again with what torch's allocator can spare.

    Args:
        attempt: Calls the driver; may be called twice.
        index: Of the device.

    Raises:
        torch.cuda.OutOfMemoryError: There is no room even then.
    """
    try:
        return attempt()
    except Exception as error:
        if not is_full(error):
            raise
        return _again(attempt, index, error)


def _again(attempt: Callable[[], Result], index: int, error: Exception) -> Result:
    if not torch.cuda.is_current_stream_capturing():  # within a capture nothing can be freed
        log.info("device %d is full: torch's allocator gives back what it keeps", index)
        torch.cuda.empty_cache()
        try:
            return attempt()
        except Exception as second:
            if not is_full(second):
                raise
            error = second
    raise torch.cuda.OutOfMemoryError(
        f"CUDA out of memory. A kernel of e3nn_accel could not be loaded or launched on GPU {index}"
    ) from error
