"""The hooks of e3nn_accel, with their typed results.

A plugin is a module (or object) with functions marked by `e3nn_accel.hookimpl`, named in the
entry-point group ``e3nn_accel``. The built-ins (`e3nn_accel.builtins`) register through the same
manager. Hooks run when enabling, describing and planning, never on the path of an ordinary call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pluggy
import torch

from e3nn_accel.compat import WRITTEN_FOR
from e3nn_accel.descriptor import Descriptor
from e3nn_accel.plan import Backend

if TYPE_CHECKING:
    from e3nn_accel.compile import KernelProgram

PROJECT = "e3nn_accel"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Operation = Literal[
    "linear",
    "tensor_product",
    "convolution",
    "contraction",
    "radial_mlp",
    "spherical_harmonics",
    "radial_embedding",
    "reshape_irreps",
]


class Call(NamedTuple):
    """A call as a plan takes it: which operation, and its operands in the order `Plan.run` wants them."""

    operation: str
    operands: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Target:
    """A class whose calls are intercepted.

    Attributes:
        path: "module:Class"; the module is never imported for it, only waited for.
        bind: Turns the arguments of ``forward`` into a `Call`, or answers why they can't be one
            (stock e3nn then takes the call and raises its own errors). An exception means the same.
        operation: What a plain call of the class is; ``explain`` plans it before there was a call.
        distribution: The distribution that ships the class.
        traceable: Whether torch.compile can trace `bind`; where it can't, compiled code has stock e3nn.
        wrap: Makes of a plan's tensor what the class returns, where that is something else.
        backend: The one backend whose plans are faster than stock e3nn, if they aren't everywhere. Where
            it can't be used, stock has the calls by choice (`e3nn_accel.by_choice`), at next to no cost.
        operands: Those of the `Call` that `bind` makes of the same positional arguments, if it makes one of
            `operation`; found as quickly as can be, not looked at, and an exception means that these aren't
            ordinary. With it, calls like one before aren't bound (`e3nn_accel.ordinary`).
        versions: The versions this was written for, as a PEP 440 specifier; others are reported by
            ``doctor``, not refused: the self-check decides.
    """

    path: str
    bind: Callable[..., Call | str]
    operation: str
    distribution: str = "e3nn"
    versions: str = WRITTEN_FOR["e3nn"]
    traceable: bool = False
    wrap: Callable[[torch.Tensor], Any] | None = None
    backend: str = ""
    operands: Callable[..., tuple[torch.Tensor, ...]] | None = None


@dataclass(frozen=True)
class Event:
    """Something that happened away from the hot path.

    Attributes:
        kind: "seen", "planned", "refused", "compiled" or "self-check failed".
        subject: The descriptor, class name or kernel it is about.
        detail: The strategy, or the reason.
    """

    kind: Literal["seen", "planned", "refused", "compiled", "self-check failed"]
    subject: str
    detail: str = ""


@dataclass(frozen=True)
class HealthCheck:
    """One line of ``e3nn-accel doctor``.

    Attributes:
        name: What is checked.
        run: Returns (status, what was found).
        advice: One line that says what to do where it isn't "ok".
    """

    name: str
    run: Callable[[], tuple[Literal["ok", "warn", "fail"], str]]
    advice: str


@dataclass(frozen=True)
class KernelSource:
    """CUDA source in place of a program's file.

    Attributes:
        code: The translation unit: it defines the program's ``entries`` with the parameters that they have,
            and may include "plan.cuh", the plan's constants, and the headers of ``e3nn_accel/kernels``.
        options: Further NVRTC options.
    """

    code: str
    options: tuple[str, ...] = ()


@hookspec
def e3nn_accel_targets() -> Iterable[Target]:  # type: ignore[empty-body]
    """Yield the classes to intercept.

    Example:
        >>> from e3nn_accel import hookimpl
        >>> from e3nn_accel.hookspecs import Call, Target
        >>> def bind(module, x):
        ...     return Call("linear", (x, module.weight, module.bias))
        >>> class Plugin:
        ...     @hookimpl
        ...     def e3nn_accel_targets(self):
        ...         yield Target("my_package.layers:MyLinear", bind, "linear", "my-package", ">=1")
    """


@hookspec(firstresult=True)
def e3nn_accel_describe(module: torch.nn.Module, operation: str) -> Descriptor | None:
    """Say what ``module`` computes when called as ``operation``, or None for modules of other plugins.

    Example:
        >>> from e3nn_accel import hookimpl
        >>> from e3nn_accel.descriptor import LinearDescriptor, LinearPath
        >>> from e3nn_accel.irreps import MulIr
        >>> class Plugin:
        ...     @hookimpl
        ...     def e3nn_accel_describe(self, module, operation):
        ...         if type(module).__name__ != "MyLinear":
        ...             return None
        ...         scalars = (MulIr(8, 0, 1),)
        ...         path = LinearPath(0, 0, (8, 8), 8**-0.5)
        ...         return LinearDescriptor(scalars, scalars, (path,), None, None, True, True)
    """


@hookspec
def e3nn_accel_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Yield backends; the best plan among them wins, every refusal keeps its reason.

    Example:
        >>> from e3nn_accel import hookimpl
        >>> from e3nn_accel.plan import Availability, Refusal
        >>> class Nothing:
        ...     name, priority = "nothing", -1
        ...     def available(self):
        ...         return Availability(True)
        ...     def plan(self, descriptor, context):
        ...         return Refusal(self.name, "plans nothing")
        >>> class Plugin:
        ...     @hookimpl
        ...     def e3nn_accel_backends(self):
        ...         yield Nothing()
    """


@hookspec(firstresult=True)
def e3nn_accel_kernel_source(program: KernelProgram) -> KernelSource | None:
    """Replace the CUDA source of a program before it is compiled, or None to leave it.

    What it computes is compared with stock e3nn like every plan's first result.

    Example:
        >>> from e3nn_accel import hookimpl
        >>> from e3nn_accel.hookspecs import KernelSource
        >>> class Plugin:
        ...     @hookimpl
        ...     def e3nn_accel_kernel_source(self, program):
        ...         if program.file != "sum_rows.cu":
        ...             return None
        ...         return KernelSource('extern "C" __global__ void sum_rows() {}')
    """


@hookspec
def e3nn_accel_event(event: Event) -> None:
    """Hear of modules seen, plans made and refused, kernels compiled, self-checks failed.

    Example:
        >>> from e3nn_accel import hookimpl
        >>> class Plugin:
        ...     def __init__(self):
        ...         self.refusals = []
        ...     @hookimpl
        ...     def e3nn_accel_event(self, event):
        ...         if event.kind == "refused":
        ...             self.refusals.append(event.detail)
    """


@hookspec
def e3nn_accel_health_checks() -> Iterable[HealthCheck]:  # type: ignore[empty-body]
    """Yield lines of ``e3nn-accel doctor``.

    Example:
        >>> from e3nn_accel import hookimpl
        >>> from e3nn_accel.hookspecs import HealthCheck
        >>> class Plugin:
        ...     @hookimpl
        ...     def e3nn_accel_health_checks(self):
        ...         yield HealthCheck("disk", lambda: ("ok", "plenty"), "free some space")
    """


def all_specs() -> dict[str, Any]:
    """Every hook specification of this module, by name."""
    return {name: spec for name, spec in globals().items() if name.startswith("e3nn_accel_")}
