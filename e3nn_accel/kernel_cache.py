"""Compiled kernels on disk, so that a kernel is compiled once a machine and not once a process.

One file an entry, written aside and moved into place: readers see all of it or nothing, and of
several processes that compile the same kernel the last one's file stays. They don't wait for each
other: a lock on a network file system costs more trouble than the second or two of compilation
that the ranks of a cold start spend side by side.

Nothing here raises for want of a usable disk. Where entries can't be kept, that is logged once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from e3nn_accel.nvrtc import Resources

log = logging.getLogger(__name__)

MAGIC = b"e3nn_accel kernel 1\n"
"""Start of every file; the number changes with the format."""

_SUFFIX, _PART = ".kernel", ".part"
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Binary:
    """A compiled program.

    Attributes:
        name: The program's.
        key: Hash of all that it was compiled from and with.
        target: "sm_90" for machine code, "compute_90" for PTX, which the driver compiles.
        compiler: Version of NVRTC.
        source: What was compiled, as one file.
        log: What NVRTC said.
        resources: By kernel; empty for PTX.
        image: The cubin or PTX.
        seconds: How long NVRTC took.
        created: Seconds since 1970.
    """

    name: str
    key: str
    target: str
    compiler: str
    source: str = field(repr=False)
    log: str = field(repr=False)
    resources: dict[str, Resources] = field(repr=False)
    image: bytes = field(repr=False)
    seconds: float = 0.0
    created: float = field(default_factory=time.time)

    @property
    def stem(self) -> str:
        """The start of the names of its files."""
        return file_stem(self.name, self.target, self.key)


def file_stem(name: str, target: str, key: str) -> str:
    """The start of the names of a program's files, in the cache and in dumps."""
    return f"{re.sub(r'[^A-Za-z0-9_.+-]', '_', name)[:80]}.{target}.{key[:16]}"


class BrokenEntry(NamedTuple):
    """A file of the cache that can't be used, and why."""

    path: Path
    reason: str


class KernelCache:
    """The entries of one folder.

    Attributes:
        folder: Made when the first entry is written.
        problem: Why entries can't be kept or read, once that was found; else empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problem = ""

    def read(self, name: str, target: str, key: str) -> Binary | None:
        """The entry of a program; None where there is none or only a damaged one."""
        path = self.folder / f"{file_stem(name, target, key)}{_SUFFIX}"
        try:
            binary = _decode(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._tell("read", error)
            return None
        except ValueError as error:
            log.info("%s is compiled anew: %s", path, error)
            return None
        return binary if binary.key == key else None

    def write(self, binary: Binary) -> None:
        """Keep an entry if that is possible; one of the same key is replaced."""
        part: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, part = tempfile.mkstemp(dir=self.folder, prefix=binary.stem, suffix=_PART)
            with os.fdopen(handle, "wb") as file:
                file.write(_encode(binary))
            os.replace(part, self.folder / f"{binary.stem}{_SUFFIX}")
            part = None
        except OSError as error:
            self._tell("keep", error)
        finally:  # also when the user interrupts
            if part is not None:
                with contextlib.suppress(OSError):
                    os.unlink(part)

    def entries(self) -> Iterator[Binary | BrokenEntry]:
        """Every entry, by name."""
        for path in self._paths(f"*{_SUFFIX}"):
            try:
                yield _decode(path.read_bytes())
            except (OSError, ValueError) as error:
                yield BrokenEntry(path, str(error))

    def clear(self) -> int:
        """Delete the entries, and nothing else of the folder.

        Returns:
            How many there were.

        Raises:
            OSError: One can't be deleted.
        """
        paths = self._paths(f"*{_SUFFIX}")
        for path in [*paths, *self._paths(f"*{_PART}")]:  # of processes that were killed
            path.unlink(missing_ok=True)
        return len(paths)

    def _paths(self, pattern: str) -> list[Path]:
        try:
            return sorted(self.folder.glob(pattern))
        except OSError as error:
            self._tell("read", error)
            return []

    def _tell(self, action: str, error: OSError) -> None:
        if self.problem:
            return
        reason = error.strerror or str(error)
        self.problem = f"can't {action} compiled kernels in {self.folder}: {reason}"
        log.warning(
            "%s; every process compiles its own (E3NN_ACCEL_CACHE_DIR names another folder)",
            self.problem,
        )


def cache_folder(chosen: str | None) -> Path | None:
    """Where kernels are kept.

    Args:
        chosen: `Config.cache_dir`; None: the usual place of this system.

    Returns:
        An absolute path; None for a user without a home, who would get a folder named "~" here.
    """
    import platformdirs

    if chosen is not None:
        return Path(chosen).expanduser().absolute()
    folder = platformdirs.user_cache_path("e3nn_accel", appauthor=False) / "kernels"
    if folder.is_absolute():
        return folder
    log.warning("there is no home folder to keep compiled kernels in (see E3NN_ACCEL_CACHE_DIR)")
    return None


def _encode(binary: Binary) -> bytes:
    source = zlib.compress(binary.source.encode())
    facts = {
        "name": binary.name,
        "key": binary.key,
        "target": binary.target,
        "compiler": binary.compiler,
        "log": binary.log,
        "resources": {name: asdict(value) for name, value in binary.resources.items()},
        "seconds": binary.seconds,
        "created": binary.created,
        "source bytes": len(source),
    }
    body = json.dumps(facts).encode() + b"\n" + source + binary.image
    return MAGIC + hashlib.sha256(body).digest() + body


def _decode(content: bytes) -> Binary:
    """Read a file of the cache.

    Raises:
        ValueError: It is damaged, or of another format.
    """
    if not content.startswith(MAGIC):
        raise ValueError("it is of another format")
    digest, body = content[len(MAGIC) :][:_DIGEST], content[len(MAGIC) + _DIGEST :]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("it is damaged")
    line, _, rest = body.partition(b"\n")
    facts = json.loads(line)
    size = facts.pop("source bytes")
    resources = {name: Resources(**value) for name, value in facts.pop("resources").items()}
    source = zlib.decompress(rest[:size]).decode()
    return Binary(source=source, resources=resources, image=rest[size:], **facts)
