"""Models and structures from files, and the batches that a MACE model takes.

A model file is a pickle of a whole module, which runs code when it is loaded: open only files that
you trust. What can't be used is an `InputError` with one line that says why.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pickle
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Batch = dict[str, torch.Tensor]
MACE_PARTS = ("r_max", "atomic_numbers", "interactions", "products", "atomic_energies_fn")
MOST_ELEMENTS = 6
DEFAULT_ATOMS = 27
"""Of the larger default structure."""


class InputError(ValueError):
    """A file or a combination of files that can't be used; the message is one line for the user."""


def import_mace() -> bool:
    """Import MACE, if it is installed, without what it prints; whether it is there.

    MACE has to come before e3nn: it makes e3nn 0.4.4 importable where torch is 2.6 or newer.
    """
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("mace.modules")
        except ImportError:
            return False
    return True


def load_module(path: str | Path) -> torch.nn.Module:
    """Load any pickled module onto the CPU.

    Raises:
        InputError: There is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    import_mace()
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=False)
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: needs the package {error.name!r}, not installed here") from error
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a model saved by torch.save ({reason[:120]})") from error
    except Exception as error:  # unpickling runs the file's own code, which may raise anything
        raise InputError(f"{path}: can't be loaded: {type(error).__name__}: {error}") from error
    if isinstance(loaded, dict):
        what = "a training checkpoint" if "optimizer" in loaded else "a state_dict"
        raise InputError(f"{path}: holds {what}, without the model; save the model itself")
    if isinstance(loaded, torch.jit.ScriptModule):
        raise InputError(f"{path}: holds a TorchScript export, which always runs stock e3nn")
    if not isinstance(loaded, torch.nn.Module):
        raise InputError(f"{path}: holds a {type(loaded).__name__}, not a model")
    return loaded


def load_mace(path: str | Path) -> torch.nn.Module:
    """Load a MACE model with energies.

    Raises:
        InputError: As `load_module`, or the model is of another kind.
    """
    model = load_module(path)
    if any(not hasattr(model, part) for part in MACE_PARTS):
        raise InputError(f"{path}: holds a {type(model).__name__}, not a MACE model with energies")
    return model


def read_structures(path: str | Path) -> list[Any]:
    """Every structure (`ase.Atoms`) of a file.

    Raises:
        InputError: ase can't read the file, or finds nothing in it.
    """
    import ase.io

    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        found: Any = ase.io.read(path, index=":")
    except Exception as error:  # each of ase's many readers has errors of its own
        raise InputError(f"{path}: ase can't read it: {type(error).__name__}: {error}") from error
    if not found:
        raise InputError(f"{path}: there are no structures in it")
    return list(found)


def default_structures(model: torch.nn.Module, seed: int = 0) -> list[Any]:
    """A periodic structure and a molecule-like one of the model's own elements."""
    import ase

    bulk = random_crystal(model, DEFAULT_ATOMS, seed)
    layer = random_crystal(model, DEFAULT_ATOMS // 3, seed + 1)
    return [bulk, ase.Atoms(layer.numbers, positions=layer.positions)]


def random_crystal(model: torch.nn.Module, atoms: int, seed: int = 0) -> Any:
    """A periodic structure of so many atoms of the model's elements, the same for the same seed.

    Atoms of all elements (of many: a random choice) lie on a grid, randomly displaced, so that
    nothing is symmetric and no error can cancel. It is wider than a bond: many models extrapolate
    without bound at short distances, where no two roundings agree.
    """
    import ase
    from ase.data import covalent_radii

    random = np.random.default_rng(seed)
    known = elements_of(model)
    chosen = np.sort(random.choice(known, min(len(known), MOST_ELEMENTS), replace=False))
    spacing = 3.0 * max(float(covalent_radii[z]) for z in chosen)
    side = _sides(atoms)
    corners = np.stack(np.meshgrid(*map(np.arange, side), indexing="ij"), -1).reshape(-1, 3)
    strain = np.eye(3) + random.uniform(-0.05, 0.05, (3, 3))
    displaced = corners[:atoms] + random.uniform(-0.12, 0.12, (atoms, 3))
    kinds = np.resize(chosen, atoms)
    random.shuffle(kinds)
    cell = spacing * np.diag(side) @ strain
    return ase.Atoms(kinds, positions=spacing * displaced @ strain, cell=cell, pbc=True)


def _sides(atoms: int) -> tuple[int, int, int]:
    """A grid, near to a cube, with room for so many atoms."""
    a = max(1, round(atoms ** (1 / 3)))
    b = max(1, round((atoms / a) ** 0.5))
    return -(-atoms // (a * b)), b, a


def elements_of(model: Any) -> list[int]:
    """Atomic numbers of the model, in its order."""
    return [int(z) for z in model.atomic_numbers]


def check_elements(model: torch.nn.Module, structures: Sequence[Any]) -> None:
    """Refuse structures that the model can't compute.

    Raises:
        InputError: It names the elements.
    """
    from ase.data import chemical_symbols

    unknown = {int(z) for atoms in structures for z in atoms.numbers} - {*elements_of(model)}
    if unknown:
        names = ", ".join(chemical_symbols[z] for z in sorted(unknown))
        raise InputError(f"the model doesn't know {names}, which the structures contain")


def batch_of(model: Any, atoms: Any, dtype: torch.dtype = torch.float64) -> Batch:
    """The input of a MACE model for a structure, or a list of them; rounded once, at the very end.

    Models from before MACE had heads get its default one; of several heads the one called default
    is taken, else the last, as MACE does.
    """
    from mace import data, tools
    from mace.tools import torch_geometric

    heads = list(getattr(model, "heads", None) or ["Default"])
    head = next((head for head in heads if head.lower() == "default"), heads[-1])
    with default_dtype(torch.float64):
        graphs = [
            data.AtomicData.from_config(
                data.config_from_atoms(structure, head_name=head),
                z_table=tools.AtomicNumberTable(elements_of(model)),
                cutoff=float(model.r_max),
                heads=heads,
            )
            for structure in (atoms if isinstance(atoms, list) else [atoms])
        ]
        batches: Any = torch_geometric.Batch
        batch = batches.from_data_list(graphs).to_dict()
    return cast(batch, dtype)


def cast(batch: Batch, dtype: torch.dtype, device: torch.device | None = None) -> Batch:
    """A copy with its floating-point tensors in ``dtype``; models change the batch they get."""
    return {
        name: value.detach().clone().to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
        if torch.is_tensor(value)
    }


def rotated(batch: Batch, rotation: torch.Tensor) -> Batch:
    """The same graph turned by a matrix, edge for edge: its neighbours are not sought again."""
    turned = dict(batch)
    for name in ("positions", "shifts", "cell"):
        turned[name] = batch[name] @ rotation.T.to(batch[name].dtype)
    return turned


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """MACE makes some tensors in torch's default dtype; set it for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
