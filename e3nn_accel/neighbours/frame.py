"""What MACE's batch was made of besides positions and cell, and the batch, to be filled in again."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from e3nn_accel.neighbours.pairs import Edges
from e3nn_accel.neighbours.snapshot import Snapshot

OF_CALCULATOR = (
    "r_max",
    "default_dtype",
    "device",
    "head",
    "available_heads",
    "charges_key",
    "info_keys",
    "arrays_keys",
)
PER_EDGE = ("edge_index", "shifts", "unit_shifts")
_FAR = 5
"""MACE makes a cell that doesn't repeat so many cutoffs wide, for each unit that atoms are away from 0."""


def ingredients(calculator: Any, atoms: Any) -> dict[Any, Any]:
    """Everything that goes into MACE's batch besides positions and cell, by name; not copied."""
    found: dict[Any, Any] = {name: getattr(calculator, name) for name in OF_CALCULATOR}
    found["elements"] = calculator.z_table.zs
    found["numbers"] = atoms.numbers
    found["pbc"] = atoms.pbc
    info, arrays = atoms.info, atoms.arrays
    weights = [f"config_{name}_weight" for name in (*found["arrays_keys"], *found["info_keys"])]
    for key in ("config_type", "config_weight", *weights, *found["info_keys"].values()):
        if key in info:
            found["info", key] = info[key]
    for key in found["arrays_keys"].values():
        if key in arrays:
            found["arrays", key] = arrays[key]
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two ingredients are equal for certain."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        alike = type(a) is type(b) and a.dtype == b.dtype and a.dtype != object
        return bool(alike and np.array_equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    return type(a) is type(b) and (a == b) is True


def snapshot(atoms: Any) -> Snapshot:
    """Where the atoms are, in arrays of its own."""
    return Snapshot(atoms.get_positions(), np.array(atoms.cell), tuple(atoms.pbc.tolist()))


def cell_of_batch(now: Snapshot, cutoff: float) -> Any:
    """The cell [3, 3] that MACE puts into a batch: very wide where it doesn't repeat."""
    cell = np.array(now.cell) if now.cell.any() else np.identity(3)
    for axis, repeats in enumerate(now.pbc):
        if not repeats:
            cell[axis] = (np.max(np.absolute(now.positions)) + 1) * _FAR * cutoff * np.eye(3)[axis]
    return cell


class Frame:
    """A batch that MACE made, whose tensors serve later ones.

    Attributes:
        start: Where the atoms were.
    """

    def __init__(self, calculator: Any, atoms: Any, batch: Any) -> None:
        self.start = snapshot(atoms)
        # one model is no ingredient, but deepcopy must meet none
        self._made_of = copy.deepcopy(ingredients(calculator, atoms))
        self._batch = batch.clone()
        self._tensors: dict[str, Any] = self._batch.to_dict()
        self._cutoff = float(calculator.r_max)
        self._cell = cell_of_batch(self.start, self._cutoff)
        self.dtype: torch.dtype = self._tensors["positions"].dtype
        self.device: torch.device = self._tensors["positions"].device

    def fits(self, calculator: Any, atoms: Any) -> bool:
        """Whether a batch made now would differ in nothing but positions, cell and edges."""
        return same(self._made_of, ingredients(calculator, atoms))

    def filled(self, now: Snapshot, positions: torch.Tensor, edges: Edges) -> dict[str, Any]:
        """The tensors of a batch; those that didn't change are shared with earlier ones.

        Args:
            now: Where the atoms are.
            positions: The same on the device, float64.
            edges: Between them.
        """
        tensors = dict(self._tensors)
        tensors["positions"] = positions.to(self.dtype, copy=True)
        for name in PER_EDGE:
            tensors[name] = getattr(edges, name)
        cell = cell_of_batch(now, self._cutoff)
        if not np.array_equal(cell, self._cell):
            self._change_cell(cell)
            tensors |= {name: self._tensors[name] for name in ("cell", "rcell", "volume")}
        return tensors

    def _change_cell(self, numbers: Any) -> None:
        """As AtomicData has it, and in its order of roundings."""
        cell = torch.tensor(numbers, dtype=self.dtype)
        volume = torch.linalg.det(cell)
        rcell = (
            2 * torch.pi * torch.linalg.inv(cell.mT)
            if torch.abs(volume) > 0
            else torch.zeros(3, 3, dtype=self.dtype)
        )
        self._cell = numbers
        for name, value in (("cell", cell), ("rcell", rcell), ("volume", volume.unsqueeze(0))):
            self._tensors[name] = value.to(self.device)

    def batch(self, tensors: dict[str, Any]) -> Any:
        """MACE's Batch of these tensors, its own throughout."""
        batch = copy.copy(self._batch)
        for name, value in tensors.items():
            batch[name] = value.clone() if torch.is_tensor(value) else copy.deepcopy(value)
        edges = tensors["edge_index"].shape[1]
        batch.__slices__ = {**batch.__slices__, **{name: [0, edges] for name in PER_EDGE}}
        return batch
