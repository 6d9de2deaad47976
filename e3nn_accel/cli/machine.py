"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """The machine and the versions; part of every heading and JSON document.

    Attributes:
        cpu: The processor's name.
        cores: Logical cores that this process may use.
        threads: torch's threads.
        gpu: The CUDA device's name, or None.
        system: Operating system and architecture.
        python: Version.
        versions: Of the installed distributions that matter.
    """

    cpu: str
    cores: int
    threads: int
    gpu: str | None
    system: str
    python: str
    versions: dict[str, str]

    @property
    def heading(self) -> str:
        """One line for people."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.gpu or self.cpu}, {self.threads} of {self.cores} cores; {versions}"


def this_machine() -> Machine:
    """Describe where this process runs."""
    import torch

    from e3nn_accel._version import __version__
    from e3nn_accel.compat import version_of

    names = ("e3nn_accel", "torch", "e3nn", "mace-torch", "numpy", "pluggy", "rich", "matplotlib")
    cupy = [name for name in ("cupy", "cupy-cuda12x", "cupy-cuda13x") if version_of(name)]
    versions = {name: version_of(name) for name in (*names, *cupy)} | {"e3nn_accel": __version__}
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: version for name, version in versions.items() if version},
    )


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"
