"""The kernels of one program, loaded together at their first use on a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config
from e3nn_accel.launch import Kernel, load_all


class Entries:
    """The kernels of a program that has several.

    Attributes:
        program: What is compiled.
    """

    def __init__(
        self, program: KernelProgram, signatures: Mapping[str, str], config: Config
    ) -> None:
        self.program = program
        self._signatures, self._config = signatures, config
        self._kernels: dict[torch.device, dict[str, Kernel]] = {}

    def on(self, device: torch.device) -> dict[str, Kernel]:
        """All of them by name: one may be wanted first while a CUDA graph is being captured."""
        found = self._kernels.get(device)
        if found is None:
            (loaded,) = load_all([self.program], device, self._config)
            found = self._kernels[device] = {
                name: loaded.kernel(name, letters) for name, letters in self._signatures.items()
            }
        return found
