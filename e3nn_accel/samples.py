"""A copy of a module with random parameters, and a few random rows for one of its operations.

What the self-check compares a plan with stock e3nn on. Small, and the same each time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

ROWS, EDGES, SEED = 4, 7, 20240229


def copy_of(module: Any) -> Any:
    """A module with parameters and buffers of its own, which shares whatever else hangs on it.

    Not `copy.deepcopy`: that fails for MACE's EmptyParam and for attributes like locks, and traces
    e3nn's generated code anew, for which torch.fx patches the calls of all modules meanwhile.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return copy.deepcopy(module)
    twin = object.__new__(type(module))
    fields = vars(module)
    own = {
        "_parameters": lambda p: torch.nn.Parameter(p.detach().clone()),
        "_buffers": lambda b: b.detach().clone(),
        "_modules": copy_of,
    }
    vars(twin).update(fields)
    for name, copied in own.items():
        kept = {
            key: None if value is None else copied(value) for key, value in fields[name].items()
        }
        vars(twin)[name] = type(fields[name])(kept)
    return twin


def _generator() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(SEED)


def _randn(
    shape: Sequence[int], like: torch.Generator, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=like, dtype=torch.float64, device="cpu").to(
        device, dtype
    )


def randomised(module: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The module itself, its parameters random and wanting gradients."""
    generator = _generator()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
        parameter.data.copy_(_randn(parameter.shape, generator, parameter.dtype, parameter.device))
    return module.to(device=device, dtype=dtype)


def random_inputs(
    module: Any, operation: str, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Inputs of the operation: unsorted edges, an isolated node, mixed species."""
    generator = _generator()

    def draw(*shape: int) -> torch.Tensor:
        return _randn(shape, generator, dtype, device).requires_grad_(True)

    if operation == "linear":
        columns = (
            tuple(module.weight.shape[:1])
            if module.internal_weights and module.weight.dim() > 1
            else ()
        )
        return (draw(ROWS, *columns, module.irreps_in.dim), *_external_linear(module, draw))
    if operation == "contraction":
        species, _, channels = module.contractions[0].weights_max.shape
        picked = torch.randint(species, (ROWS,), generator=generator, device="cpu")
        hot = torch.nn.functional.one_hot(picked, species).to(device, dtype)
        return draw(ROWS, channels, module.contractions[0].coupling_irreps.dim), hot
    if operation == "radial_mlp":
        return (draw(ROWS, module.hs[0]),)
    if operation == "spherical_harmonics":
        return (draw(ROWS, 3),)
    if operation == "reshape_irreps":
        return (draw(ROWS, module.irreps.dim),)
    if operation == "radial_embedding":  # within the cutoff and beyond it
        ratio = torch.rand((ROWS, 1), generator=generator, dtype=torch.float64, device="cpu") + 0.2
        return ((module.cutoff_fn.r_max.detach() * ratio.to(device, dtype)).requires_grad_(True),)
    rows = EDGES if operation == "convolution" else ROWS
    weight = (
        ()
        if module.internal_weights
        else (draw(*(() if module.shared_weights else (rows,)), module.weight_numel),)
    )
    y = draw(rows, module.irreps_in2.dim)
    if operation == "convolution":
        edges = torch.tensor(
            [[0, 1, 2, 3, 0, 1, 2], [2, 0, 2, 1, 0, 2, 0]], device=device
        )  # nothing reaches node 3
        weight = weight or (module.weight,)
        return draw(ROWS, module.irreps_in1.dim), y, *weight, edges
    if operation == "tensor_product" and _only_scalars(module.irreps_in2):
        picked = torch.randint(module.irreps_in2.dim, (rows,), generator=generator, device="cpu")
        y = torch.nn.functional.one_hot(picked, module.irreps_in2.dim).to(device, dtype)
    return draw(rows, module.irreps_in1.dim), y, *weight


def _only_scalars(irreps: Any) -> bool:
    return irreps.dim > 1 and all(ir.l == 0 for _, ir in irreps)


def _external_linear(module: Any, draw: Any) -> tuple[torch.Tensor, ...]:
    if module.internal_weights:
        return ()
    rows = () if module.shared_weights else (ROWS,)
    return draw(*rows, module.weight_numel), draw(1, module.bias_numel)


def operands(
    module: Any, operation: str, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """What a plan takes for these inputs of the module: its weights with them."""
    if operation == "linear":
        return inputs if len(inputs) == 3 else (inputs[0], module.weight, module.bias)
    if operation == "contraction":
        from e3nn_accel.patches.symmetric_contraction import weights_of

        return (
            *inputs,
            *(weight for contraction in module.contractions for weight in weights_of(contraction)),
        )
    if operation == "radial_mlp":
        from e3nn_accel.patches.radial_mlp import weights_of as weights_of_layers

        return (*inputs, *weights_of_layers(module))
    if operation == "radial_embedding":
        bessel, cutoff = module.bessel_fn, module.cutoff_fn
        weights = bessel.bessel_weights.detach()
        return *inputs, weights, bessel.prefactor, cutoff.r_max, cutoff.p
    if operation == "tensor_product":
        x, y = inputs[:2]
        y = x if type(module).__name__ == "TensorSquare" else y
        return (x, y, inputs[2] if len(inputs) > 2 else module.weight)
    return inputs


def direction(like: torch.Tensor) -> torch.Tensor:
    """A random gradient of a result."""
    return _randn(like.shape, _generator(), like.dtype, like.device)
