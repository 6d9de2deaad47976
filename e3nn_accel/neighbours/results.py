"""From the results of one model to those of a calculator, as MACECalculator has them: names, dtypes, units.

MACE copies each result into a tensor of its own and waits for the device once for each; here they
come in one transfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

PER_LENGTH = {"energy": 0, "node_energy": 0, "forces": 1, "stress": 3}
"""Results of `MACE` and `ScaleShiftMACE`, in MACE's order: energies by which power of a length."""
_ALONE = "energies of the atoms by themselves"


def results_of(calculator: Any, out: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """What ``calculator.results`` becomes.

    Args:
        calculator: Of one model.
        out: What the model returned for one structure.
        tensors: What it was given.
    """
    import ase.stress

    ase_stress: Any = ase.stress
    wanted = {name: out[name] for name in PER_LENGTH if out.get(name) is not None}
    if "node_energy" in wanted:
        wanted[_ALONE] = _energies_alone(calculator, tensors)
    arrays = to_host(wanted)
    results: dict[str, Any] = {}
    for name, power in PER_LENGTH.items():
        if name not in wanted:
            continue
        unit = calculator.energy_units_to_eV / calculator.length_units_to_A**power
        results[name] = (arrays[name].item() if name == "energy" else arrays[name]) * unit
    if "energy" in results:
        results["free_energy"] = results["energy"]
    if "node_energy" in results:
        results["energies"] = results["node_energy"].copy()
        results["node_energy"] -= arrays[_ALONE]
    if "stress" in results:
        results["stress"] = ase_stress.full_3x3_to_voigt_6_stress(results["stress"][0])
    return results


def _energies_alone(calculator: Any, tensors: dict[str, Any]) -> torch.Tensor:
    """What MACE takes off the node energies [atoms]."""
    energies: torch.Tensor = calculator.models[0].atomic_energies_fn(tensors["node_attrs"])
    heads = tensors["head"][tensors["batch"]]
    return energies.gather(1, heads.unsqueeze(1)).squeeze(1)


def to_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arrays of the same names, shapes and dtypes; waits for the device once."""
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    if all(tensor.device.type == "cpu" for tensor in plain.values()):
        return {name: tensor.numpy() for name, tensor in plain.items()}
    # large numbers first: each then starts at a multiple of its size
    plain = dict(sorted(plain.items(), key=lambda item: -item[1].element_size()))
    parts = [tensor.reshape(-1).view(torch.uint8) for tensor in plain.values()]
    found, start, arrays = torch.cat(parts).cpu(), 0, {}
    for (name, tensor), part in zip(plain.items(), parts, strict=True):
        chunk = found[start : start + part.numel()]
        arrays[name] = chunk.view(tensor.dtype).reshape(tensor.shape).numpy()
        start += part.numel()
    return arrays
