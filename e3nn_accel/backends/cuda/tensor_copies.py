"""Tensors of any types copied to others in one launch, where torch takes one for each type and each large tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

import torch

from e3nn_accel.backends.cuda.entries import Entries
from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config
from e3nn_accel.launch import Dimensions, Kernel

SLOTS = 24
"""Tensors of a launch."""
THREADS, PIECE = 256, 8192
BLOCK = (THREADS, 1, 1)
_address, _bytes = torch.Tensor.data_ptr, attrgetter("nbytes")


class TensorCopies:
    """What copies tensors on a device; see `CopiesTensors`."""

    most = SLOTS

    def __init__(self, config: Config) -> None:
        names = [[f"{name}{n}" for n in range(SLOTS)] for name in ("from", "to", "bytes")]
        sizes = {
            "SLOTS": SLOTS,
            "THREADS": THREADS,
            "PIECE": PIECE,
            "PARAMETERS": ", ".join(f"long long {name}" for group in names for name in group),
            **{
                of: ", ".join(group)
                for of, group in zip(("FROM", "TO", "BYTES"), names, strict=True)
            },
        }
        self.program = KernelProgram(
            "copy_tensors",
            "copy_tensors.cu",
            ("copy_tensors",),
            "".join(f"#define {name} {value}\n" for name, value in sizes.items()),
            description=f"up to {SLOTS} tensors copied",
        )
        self._entries = Entries(self.program, {"copy_tensors": "q" * (3 * SLOTS)}, config)

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Each source to its target of the same dtype and shape; all are contiguous and on one device."""
        kernel, grid, rest = self._launch(targets)
        kernel(grid, BLOCK, *map(_address, sources), *rest)

    def copies_to(
        self, targets: Sequence[torch.Tensor]
    ) -> Callable[[Sequence[torch.Tensor]], None]:
        """What copies sources to these, which stay where they are."""
        kernel, grid, rest = self._launch(targets)
        launch = kernel.again(grid, BLOCK, len(targets), *rest)

        def copy(sources: Sequence[torch.Tensor]) -> None:
            launch(*map(_address, sources))

        return copy if grid[0] else lambda sources: None

    def _launch(self, targets: Sequence[torch.Tensor]) -> tuple[Kernel, Dimensions, list[int]]:
        """The kernel, its grid, and all arguments after the sources' addresses."""
        kernel = self._entries.on(targets[0].device)["copy_tensors"]
        sizes, none = list(map(_bytes, targets)), [0] * (SLOTS - len(targets))
        grid = sum([-(-size // PIECE) for size in sizes]), 1, 1
        return kernel, grid, [*none, *map(_address, targets), *none, *sizes, *none]
