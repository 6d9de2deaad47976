"""Calls that stock e3nn has by choice.

Of targets that one backend alone is faster for, where it can't be used; and, on a CPU, of tensor products so small
that no plan is much faster.

They are no fallbacks: strict mode doesn't complain, and no report counts them. `explain` says in a line which modules
they are, and of products from how many rows on they aren't.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from e3nn_accel.config import Config
    from e3nn_accel.hookspecs import Target
    from e3nn_accel.plan import Plan
    from e3nn_accel.registry import Registry


def reason_for_stock(
    target: Target, config: Config, registry: Registry, device: torch.device
) -> str:
    """Why stock e3nn has the target's calls on this device; an empty string: it hasn't, or not by choice."""
    if not target.backend or config.backend == target.backend:
        return ""
    if config.backend != "auto":
        return f"backend {config.backend} isn't asked, {target.backend} alone is faster than stock"
    backend = registry.backend(target.backend)
    if backend is None:
        return f"there is no backend {target.backend}"
    if getattr(backend, "device_type", device.type) != device.type:
        return f"as fast on the {device.type.upper()} as any plan"
    return registry.available(backend).reason


def has_too_few_rows(plan: Plan, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether stock e3nn has this call of a tensor product, of x [.., in1] and y [.., in2]."""
    rows = x.shape[:-1]
    if y.shape[:-1] != rows:
        try:
            rows = torch.broadcast_shapes(rows, y.shape[:-1])
        except RuntimeError:  # stock e3nn meets them with its own error
            return True
    return rows.numel() < plan.fewest_rows


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The argument whose device decides, if it is a tensor."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    return x if isinstance(x, torch.Tensor) else None


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module's tensors are; the CPU for one that has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
