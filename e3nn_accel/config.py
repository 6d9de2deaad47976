"""The one reader of environment variables, and the frozen `Config` that everything else receives."""

from __future__ import annotations

import dataclasses
import difflib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from e3nn_accel.errors import E3nnAccelWarning
from e3nn_accel.variables import VARIABLES, Variable

__all__ = [
    "VARIABLES",
    "Config",
    "GraphMode",
    "LogLevel",
    "NeighboursMode",
    "Precision",
    "Variable",
]

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
GraphMode = Literal["auto", "0", "1"]
Precision = Literal["float32", "tf32", "bf16"]
NeighboursMode = Literal["auto", "0", "1"]


@dataclass(frozen=True)
class Config:
    """How e3nn_accel behaves; immutable, made by `from_env` and `replace`.

    Attributes:
        enabled: Intercept every supported module of the process.
        strict: Raise `AccelError` with every reason where no plan can be made. Modules with hooks or a
            forward of their own, and calls that torch.jit, torch.fx or torch.export trace, stay with stock e3nn.
        verify: Run stock e3nn beside every accelerated call and compare the two.
        backend: "auto", or the name of the one backend that may plan.
        log: Level for the logger ``e3nn_accel``, or None to leave logging alone.
        report: "0", "1" or the path of a JSON file written when the process ends.
        profile: Time every call.
        skip: Globs of classes and module paths that stay on stock e3nn.
        only: If not empty, globs of the classes and module paths that may be accelerated.
        blocked_plugins: Names of plugins that are not loaded.
        self_check: Compare each plan with stock e3nn at its first use.
        deterministic: Equal calls give equal bits; otherwise kernels may use float atomics.
        graph: Whether whole calls of MACE models on a GPU are captured in CUDA graphs: "auto" where parameters
            are frozen, and training calls, "1" (True) also where they aren't, results then detached; "0" (False) never.
        precision: What kernels round float32 operands of matrix products to before they multiply them:
            "float32": nothing that shows; "tf32" and "bf16": faster, and as inexact as `Plan.rounded_to` says.
        neighbours: Whether batches of a MACECalculator reuse the neighbours of the last ones: "auto" once a
            structure is seen to move slowly, "1" (True) from its second call, "0" (False) never.
        cache_dir: Where compiled kernels are kept; None: the user's cache folder.
        dump: A folder for the source and the resources of every kernel that is used, or None.
        sources: For each field that the environment set, the variable it came from.
    """

    enabled: bool = False
    strict: bool = False
    verify: bool = False
    backend: str = "auto"
    log: LogLevel | None = None
    report: str = "0"
    profile: bool = False
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    blocked_plugins: tuple[str, ...] = ()
    self_check: bool = True
    deterministic: bool = True
    graph: GraphMode = "auto"
    precision: Precision = "float32"
    neighbours: NeighboursMode = "auto"
    cache_dir: str | None = None
    dump: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def replace(self, **options: Any) -> Config:
        """A copy with some fields changed.

        Raises:
            TypeError: An option that doesn't exist (the message names the nearest one).
            ValueError: A value that an option doesn't take.
        """
        names = [f.name for f in dataclasses.fields(self)]
        for name in options:
            if name not in names:
                raise TypeError(f"e3nn_accel has no option {name!r}{_nearest(name, names)}")
        for name in ("skip", "only", "blocked_plugins"):
            if name in options:
                given = options[name]
                options[name] = (given,) if isinstance(given, str) else tuple(given)
        for name in ("graph", "neighbours"):
            if name in options:
                options[name] = _mode(name, options[name])
        changed = dataclasses.replace(self, **options)
        if changed.log is not None and changed.log not in get_args(LogLevel):
            raise ValueError(f"log must be one of {get_args(LogLevel)}, got {changed.log!r}")
        if changed.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {get_args(Precision)}, got {changed.precision!r}"
            )
        return changed

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read every ``E3NN_ACCEL*`` variable; unusable values and unknown names warn and change nothing."""
        env = os.environ if environ is None else environ
        _warn_unknown(env)
        options: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for field_name, (variable, parse) in _READERS.items():
            text = env.get(variable, "").strip()
            if not text:
                continue
            try:
                options[field_name] = parse(text)
                sources[field_name] = variable
            except ValueError:
                row = next(v for v in VARIABLES if v.name == variable)
                warnings.warn(
                    f"{variable}={text} is not understood (values: {row.values}); using {row.default}",
                    E3nnAccelWarning,
                    stacklevel=2,
                )
        return cls(**options, sources=sources)


def _flag(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


def _enabled(text: str) -> bool:
    return True if text.lower() in ("strict", "verify") else _flag(text)


def _one_of(*values: str) -> Any:
    def parse(text: str) -> str:
        for value in values:
            if text.lower() == value.lower():
                return value
        raise ValueError(text)

    return parse


def _mode(name: str, given: object) -> str:
    text = str(int(given)) if isinstance(given, bool) else str(given)
    if text not in get_args(GraphMode):
        raise ValueError(f"{name} must be one of {get_args(GraphMode)}, got {given!r}")
    return text


def _globs(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _blocked(text: str) -> tuple[str, ...]:
    names = _globs(text)
    if not all(name.startswith("-") for name in names):
        raise ValueError(text)
    return tuple(name[1:] for name in names)


_READERS: dict[str, tuple[str, Any]] = {
    "enabled": ("E3NN_ACCEL", _enabled),
    "strict": ("E3NN_ACCEL", lambda text: text.lower() == "strict"),
    "verify": ("E3NN_ACCEL", lambda text: text.lower() == "verify"),
    "backend": ("E3NN_ACCEL_BACKEND", str),
    "log": ("E3NN_ACCEL_LOG", _one_of(*get_args(LogLevel))),
    "report": ("E3NN_ACCEL_REPORT", str),
    "profile": ("E3NN_ACCEL_PROFILE", _flag),
    "skip": ("E3NN_ACCEL_SKIP", _globs),
    "only": ("E3NN_ACCEL_ONLY", _globs),
    "blocked_plugins": ("E3NN_ACCEL_PLUGINS", _blocked),
    "self_check": ("E3NN_ACCEL_SELF_CHECK", _flag),
    "deterministic": ("E3NN_ACCEL_DETERMINISTIC", _flag),
    "graph": ("E3NN_ACCEL_GRAPH", _one_of(*get_args(GraphMode))),
    "precision": ("E3NN_ACCEL_PRECISION", _one_of(*get_args(Precision))),
    "neighbours": ("E3NN_ACCEL_NEIGHBOURS", _one_of(*get_args(NeighboursMode))),
    "cache_dir": ("E3NN_ACCEL_CACHE_DIR", str),
    "dump": ("E3NN_ACCEL_DUMP", str),
}


def _nearest(name: str, names: list[str]) -> str:
    match = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def _warn_unknown(env: Mapping[str, str]) -> None:
    known = [v.name for v in VARIABLES]
    for name in env:
        if name.startswith("E3NN_ACCEL") and name not in known:
            warnings.warn(
                f"unknown variable {name}{_nearest(name, known)}", E3nnAccelWarning, stacklevel=3
            )
