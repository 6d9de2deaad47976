"""What a MACE model computes for one structure: energy, forces, stress, gradients of parameters.

Results are float64 and on the CPU whatever the model's dtype and device, so that differences are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from e3nn_accel.structures import Batch, cast, default_dtype

Gradients = dict[str, torch.Tensor]
"""By parameter."""


@dataclass(frozen=True)
class Quantities:
    """One model on one structure.

    Attributes:
        energy: Total energy, eV/atom.
        interaction: The part that isn't a sum of isolated atoms, eV/atom: the only one that the
            interactions between atoms, and so their rounding, have a share in.
        scale: Mean size of the atoms' interaction energies, eV/atom; they may cancel in the sum.
        forces: [atoms, 3], eV/A.
        stress: [3, 3], eV/A^3, or None for a structure without a cell.
        gradients: Of `loss` by every parameter that has one, if asked for.
    """

    energy: float
    interaction: float
    scale: float
    forces: torch.Tensor
    stress: torch.Tensor | None
    gradients: Gradients = field(default_factory=dict)


def compute(model: Any, batch: Batch, stress: bool) -> Quantities:
    """Energy, forces and stress, as in molecular dynamics: with frozen parameters."""
    model.requires_grad_(False)
    dtype, device = dtype_of(model), device_of(model)
    data = cast(batch, dtype, device)
    with default_dtype(dtype):
        out = model(data, compute_force=True, compute_stress=stress)
        alone = isolated_energies(model, cast(batch, dtype, device))
    atoms = len(out["forces"])
    return Quantities(
        energy=float(out["energy"].detach().double().sum()) / atoms,
        interaction=float(interaction_energy(out).detach().double().sum()) / atoms,
        scale=float((out["node_energy"].detach().double() - alone).abs().mean()),
        forces=out["forces"].detach().double().cpu(),
        stress=out["stress"].detach().double()[0].cpu() if stress else None,
    )


def gradients(model: Any, batch: Batch, sizes: Quantities) -> Gradients:
    """Gradients of `loss` by every parameter; of one without, zeros.

    Args:
        model: In any dtype.
        batch: Of one structure.
        sizes: Reference results, which say how large each term of the loss is.
    """
    found = training_step(model, batch, sizes)
    return {
        name: torch.zeros_like(parameter, dtype=torch.float64, device="cpu")
        if grad is None
        else grad.detach().double().cpu()
        for (name, parameter), grad in zip(model.named_parameters(), found, strict=True)
    }


def training_step(model: Any, batch: Batch, sizes: Quantities) -> Sequence[torch.Tensor | None]:
    """Gradients of `loss` by the parameters in their order, as in training: through the forces."""
    model.requires_grad_(True)
    dtype = dtype_of(model)
    with default_dtype(dtype):
        out = model(
            cast(batch, dtype, device_of(model)),
            training=True,
            compute_force=True,
            compute_stress=sizes.stress is not None,
        )
        found: Sequence[torch.Tensor | None] = torch.autograd.grad(
            loss(out, sizes), list(model.parameters()), allow_unused=True
        )
    model.requires_grad_(False)
    return found


def loss(out: dict[str, Any], sizes: Quantities) -> torch.Tensor:
    """Squares of interaction energy, forces and stress, each over its size: none hides another."""
    atoms = len(sizes.forces)
    terms = [(interaction_energy(out) / atoms, sizes.scale), (out["forces"], _norm(sizes.forces))]
    if sizes.stress is not None:
        terms.append((out["stress"], _norm(sizes.stress)))
    total: torch.Tensor = out["forces"].new_zeros(())
    for term, size in terms:
        total = total + (term / max(size, 1e-6)).square().sum()
    return total


def interaction_energy(out: dict[str, Any]) -> torch.Tensor:
    """The energy without the isolated atoms' part, which some models list, others leave out."""
    found: torch.Tensor | None = out.get("interaction_energy")
    return out["contributions"][..., 1:].sum(-1) if found is None else found


def isolated_energies(model: Any, batch: Batch) -> torch.Tensor:
    """[atoms], the isolated atoms' energies in the batch's head, float64."""
    atoms = len(batch["positions"])
    energies: torch.Tensor = model.atomic_energies_fn(batch["node_attrs"])
    return (
        energies[torch.arange(atoms, device=energies.device), batch["head"][batch["batch"]]]
        .detach()
        .double()
    )


def dtype_of(model: torch.nn.Module) -> torch.dtype:
    """The dtype of the model's parameters."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the model's parameters."""
    return next(model.parameters()).device


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
