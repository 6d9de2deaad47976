"""The plugins that ship with e3nn_accel; they register through the same manager as anyone's."""

from __future__ import annotations

from collections.abc import Iterable

from e3nn_accel.backends.cuda import CudaBackend
from e3nn_accel.backends.torch import TorchBackend
from e3nn_accel.hookspecs import HealthCheck, hookimpl
from e3nn_accel.patches import (
    linear,
    radial_embedding,
    radial_mlp,
    reshape_irreps,
    spherical_harmonics,
    symmetric_contraction,
    tensor_product,
)
from e3nn_accel.plan import Backend


class _TorchPlugin:
    @hookimpl
    def e3nn_accel_backends(self) -> Iterable[Backend]:
        """The torch backend."""
        return [TorchBackend()]


class _CudaPlugin:
    @hookimpl
    def e3nn_accel_backends(self) -> Iterable[Backend]:
        """The cuda backend; it says itself whether there is a GPU."""
        return [CudaBackend()]


class _HealthPlugin:
    @hookimpl
    def e3nn_accel_health_checks(self) -> Iterable[HealthCheck]:
        """Versions, start file, plugins and backends."""
        from e3nn_accel.health import CHECKS

        return CHECKS


PLUGINS: dict[str, object] = {
    "linear": linear,
    "tensor_product": tensor_product,
    "symmetric_contraction": symmetric_contraction,
    "radial_mlp": radial_mlp,
    "spherical_harmonics": spherical_harmonics,
    "radial_embedding": radial_embedding,
    "reshape_irreps": reshape_irreps,
    "torch": _TorchPlugin(),
    "cuda": _CudaPlugin(),
    "health": _HealthPlugin(),
}
