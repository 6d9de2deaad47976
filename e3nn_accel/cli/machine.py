"""What a figure is measured on."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from e3nn_accel.cli import CommandError


@dataclass(frozen=True)
class Machine:
    """The machine and the versions; part of every heading and JSON document.

    Attributes:
        cpu: The processor's name.
        cores: Logical cores that this process may use.
        threads: torch's threads.
        gpu: Name of the CUDA device, or None: there is none, or figures aren't of it.
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


def this_machine(device: str | None = None) -> Machine:
    """Describe where this process runs.

    Args:
        device: Where the figures are measured; None: on a GPU if there is one.
    """
    import torch

    from e3nn_accel._version import __version__
    from e3nn_accel.compat import version_of

    names = ("e3nn_accel", "torch", "e3nn", "mace-torch", "numpy", "pluggy", "rich", "matplotlib")
    cupy = [name for name in ("cupy", "cupy-cuda12x", "cupy-cuda13x") if version_of(name)]
    versions = {name: version_of(name) for name in (*names, *cupy)}
    # torch says which build it is, "+cu121", which the name it is installed by may leave out
    versions |= {"e3nn_accel": __version__, "torch": str(torch.__version__)}
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        gpu=_gpu(device),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: version for name, version in versions.items() if version},
    )


@contextlib.contextmanager
def on(device: str | None) -> Iterator[None]:
    """Within it a CUDA device is torch's current one; what doesn't fit on it ends the command in one line."""
    import torch

    on_gpu = device is not None and device.startswith("cuda")
    try:
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise CommandError(str(error).partition("\n")[0], code=1) from error


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Within it torch has so many."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _gpu(device: str | None) -> str | None:
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"
