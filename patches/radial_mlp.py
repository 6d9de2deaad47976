"""``e3nn.nn.FullyConnectedNet``, the radial MLP of MACE and NequIP.

MACE's own ``RadialMLP`` has biases and a LayerNorm between product and activation, which the kernels
have not: it stays with stock.
"""

from __future__ import annotations

from typing import Any

import torch

from e3nn_accel import compat
from e3nn_accel.as_planned import AsPlanned
from e3nn_accel.descriptor import Descriptor, RadialLayer, RadialMlpDescriptor
from e3nn_accel.hookspecs import Call, Target, hookimpl
from e3nn_accel.living import living_module
from e3nn_accel.patches.arguments import mismatch, wrong_last_dimension

LAYER = ("e3nn.nn._fc", "_Layer")
_F = torch.nn.functional
ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "silu": (_F.silu, torch.nn.SiLU),
    "tanh": (torch.tanh, _F.tanh, torch.nn.Tanh),
    "relu": (torch.relu, _F.relu, torch.nn.ReLU),
    "sigmoid": (torch.sigmoid, _F.sigmoid, torch.nn.Sigmoid),
}
"""What kernels know, as functions, or as modules of exactly these classes."""


_as_planned = AsPlanned(
    lambda net: tuple([x for at in net._modules.values() for x in (at.act, at.var_in, at.var_out)])
)


def weights_of(module: Any) -> list[torch.Tensor]:
    """Of each layer, [h_in, h_out]."""
    return [layer.weight for layer in module._modules.values()]


def bind(module: Any, input: torch.Tensor) -> Call | str:
    """The operands of ``FullyConnectedNet.forward``: features and the weight of every layer."""
    unusual = _unusual_while_traced(id(module)) if torch.compiler.is_compiling() else None
    reason = _unusual(module) if unusual is None else unusual
    if reason:
        return reason
    weights = weights_of(module)
    reason = mismatch(input, *weights)
    reason = reason or wrong_last_dimension("the input", input, weights[0].shape[0])
    return reason or Call("radial_mlp", (input, *weights))


@compat.run_while_tracing
def _unusual_while_traced(identity: int) -> str:
    return _unusual(living_module(identity))


def _unusual(module: Any) -> str:
    """Why the layers do something besides e3nn's own forward, or an empty string."""
    layers = module._modules
    for name, layer in layers.items():
        cls = type(layer)
        if (cls.__module__, cls.__name__) != LAYER or "forward" in layer.__dict__:
            return f"{name} is no plain layer of e3nn's but a {cls.__name__}"
        if "weight" not in layer._parameters:
            return f"the weight of {name} is not a parameter"
        for inner in (layer, *layer._modules.values()):
            if compat.module_hooks(inner):
                return f"{name} has hooks, which only stock e3nn runs"
    return _as_planned.change(module) if layers else "it has no layers"


@hookimpl
def e3nn_accel_targets() -> list[Target]:
    """The net as a whole; on a CPU stock's matrix products are as fast as any."""
    path = "e3nn.nn:FullyConnectedNet"
    return [Target(path, bind, "radial_mlp", traceable=True, backend="cuda")]


@hookimpl
def e3nn_accel_describe(module: torch.nn.Module, operation: str) -> Descriptor | None:
    """Describe a net by its layers' numbers, as their forward uses them."""
    from e3nn.nn import FullyConnectedNet

    if operation != "radial_mlp" or not isinstance(module, FullyConnectedNet):
        return None
    reason = _unusual(module)
    if reason:
        raise NotImplementedError(reason)
    _as_planned.keep(module)
    return RadialMlpDescriptor(tuple(_layer(layer) for layer in module._modules.values()))


def _layer(layer: Any) -> RadialLayer:
    width_in, width_out = layer.weight.shape
    if layer.act is None:
        scale = (layer.h_in * layer.var_in / layer.var_out) ** -0.5
        return RadialLayer(width_in, width_out, scale, "identity", 1.0)
    name, constant = _activation(layer.act)
    scale, gain = (layer.h_in * layer.var_in) ** -0.5, constant * layer.var_out**0.5
    return RadialLayer(width_in, width_out, scale, name, gain)


def _activation(act: Any) -> tuple[str, float]:
    """Its name, and the constant by which e3nn normalises it."""
    if type(act).__name__ != "normalize2mom":
        raise NotImplementedError(f"the activation is a {type(act).__name__}, not normalised")
    for name, known in ACTIVATIONS.items():
        if any(act.f is one or type(act.f) is one for one in known):
            return name, 1.0 if act._is_id else float(act.cst)
    shown = getattr(act.f, "__name__", type(act.f).__name__)
    raise NotImplementedError(f"activation {shown}, known are {', '.join(ACTIVATIONS)}")
