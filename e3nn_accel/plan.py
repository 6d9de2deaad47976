"""How a descriptor will be computed: a backend answers with a `Plan`, or with a `Refusal` and its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from e3nn_accel.config import Config, Precision
from e3nn_accel.descriptor import Descriptor

if TYPE_CHECKING:
    from e3nn_accel.compile import KernelProgram

Tensors = tuple[torch.Tensor, ...]
Gradients = Callable[[torch.Tensor, Tensors, tuple[bool, ...]], Tensors | None]


@dataclass(frozen=True)
class PlanContext:
    """What a plan may depend on besides the descriptor; never the number of nodes or edges.

    Attributes:
        dtype: Of all operands.
        device: Where they are.
        config: What the user asked for.
        architecture: The compute capability to plan for, as 90 for 9.0, where the device isn't here;
            None: the device's own.
    """

    dtype: torch.dtype
    device: torch.device
    config: Config
    architecture: int | None = None


class Ordinary(NamedTuple):
    """What a plan does with operands as they mostly are, about which it asks nothing.

    Attributes:
        dims: Of the first operands, [rows, ..] each; the others are weights.
        run: As `Plan.run`, of operands that are like some that it took before but for the number of rows, which
            is the same in each of the first. All are contiguous, and nothing is to be differentiated.
    """

    dims: tuple[int, ...]
    run: Callable[..., torch.Tensor]

    def takes(self, operands: Tensors) -> bool:
        """Whether operands that the plan took are such; that nothing is to be differentiated, the caller sees to."""
        rows = operands[: len(self.dims)]
        return (
            all(t.is_contiguous() for t in operands)
            and tuple(t.dim() for t in rows) == self.dims
            and len({t.shape[0] for t in rows}) == 1
        )


@dataclass(frozen=True)
class Plan:
    """A way to compute one descriptor in one dtype on one device.

    Attributes:
        backend: Name of the backend that made it.
        descriptor: What it computes.
        strategy: A few words for ``explain``.
        run: Takes the operands of the descriptor's kind and returns what stock e3nn returns:
            linear (x, weight, bias); tensor product (x, y, weight);
            convolution (node_feats, edge_attrs, weight, edge_index);
            contraction (x, node_attrs, W_1, .., W_corr of the first output, W_1, .. of the second, ..);
            radial MLP (x, W_1, .., W_layers);
            spherical harmonics (vectors); radial embedding (lengths, weights, prefactor, r_max, p), the
            embedding alone.
        gradients: Takes (gradient of the result, operands, which of them are wanted) and returns the
            wanted gradients in order, differentiable like `run`; without it, or where it returns
            None, they are found by running forward again.
        rounded_to: What operands are rounded to before they are multiplied, if that is coarser than their dtype,
            as the user asked; the self-check allows for it, and the strategy should name it.
        programs: The CUDA programs that `run` launches; known without a device, compiled by the first run.
        fewest_rows: Of a tensor product: calls of fewer rows stock e3nn has by choice, as no plan is much faster.
        ordinary: A quicker way to most calls; without it all are looked at.
    """

    backend: str
    descriptor: Descriptor
    strategy: str
    run: Callable[..., torch.Tensor] = field(compare=False, repr=False)
    programs: tuple[KernelProgram, ...] = field(default=(), compare=False, repr=False)
    gradients: Gradients | None = field(default=None, compare=False, repr=False)
    rounded_to: Precision | None = None
    fewest_rows: int = 0
    ordinary: Ordinary | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Refusal:
    """Why a backend, or e3nn_accel as a whole, leaves a call to stock e3nn."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here at all, and why not."""

    ok: bool
    reason: str = ""


class Backend(Protocol):
    """What the hook ``e3nn_accel_backends`` yields.

    Attributes:
        name: Short and unique; what ``backend=`` and E3NN_ACCEL_BACKEND name.
        priority: Among the backends that can plan, the highest is taken.

    A backend with an attribute ``device_type`` ("cuda", say) is asked for tensors on such devices
    alone, and not even whether it is available otherwise.
    """

    name: str
    priority: int

    def available(self) -> Availability:
        """Whether it can run in this process; asked once, never at import."""
        ...

    def plan(self, descriptor: Descriptor, context: PlanContext) -> Plan | Refusal:
        """Plan, or say why not. Must not raise; if it does, that is the reason."""
        ...
