"""Small modules and a small MACE, with inputs, for the tests of how e3nn_accel behaves.

They are tiny on purpose: what these tests ask is whether something happens, not how fast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from e3nn import o3

Inputs = tuple[torch.Tensor, ...]


def _uvu(internal: bool) -> o3.TensorProduct:
    """What MACE convolves with: one path for each output block."""
    paths = [(0, 0, 0, "uvu", True), (1, 1, 1, "uvu", True), (0, 1, 2, "uvu", True)]
    return o3.TensorProduct(
        "4x0e+4x1o",
        "1x0e+1x1o",
        "4x0e+4x0e+4x1o",
        paths,
        internal_weights=internal,
        shared_weights=internal,
    )


BUILD: dict[str, Callable[[], torch.nn.Module]] = {
    "Linear": lambda: o3.Linear("4x0e+3x1o", "2x0e+5x1o", biases=True),
    "TensorProduct": lambda: _uvu(internal=False),
    "FullyConnectedTensorProduct": lambda: o3.FullyConnectedTensorProduct(
        "4x0e+2x1o", "3x0e", "3x0e+2x1o"
    ),
    "ElementwiseTensorProduct": lambda: o3.ElementwiseTensorProduct("3x0e+2x1o", "3x1o+2x1o"),
    "FullTensorProduct": lambda: o3.FullTensorProduct("2x0e+1x1o", "1x0e+1x1o"),
    "TensorSquare": lambda: o3.TensorSquare("2x0e+2x1o", "3x0e+2x1o"),
}
"""One module of every class of e3nn that is intercepted."""


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A module of `BUILD` with the weights that belong to a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILD[name]()


@contextlib.contextmanager
def without_torchscript() -> Iterator[None]:
    """Modules built within have plain submodules, as e3nn 0.6 builds them by default."""
    import e3nn

    before = dict(e3nn.get_optimization_defaults())
    e3nn.set_optimization_defaults(jit_script_fx=False)
    try:
        yield
    finally:
        e3nn.set_optimization_defaults(**before)


def inputs_of(module: Any, rows: int = 5, seed: int = 1) -> Inputs:
    """Random inputs that any of the modules takes, leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda dim: torch.randn(rows, dim, generator=generator).requires_grad_()  # noqa: E731
    if isinstance(module, o3.Linear):
        return (draw(module.irreps_in.dim),)
    square = isinstance(module, o3.TensorSquare)
    features = [] if square else [draw(module.irreps_in2.dim)]
    external = module.weight_numel > 0 and not module.internal_weights
    weights = [draw(module.weight_numel)] if external else []
    return (draw(module.irreps_in1.dim), *features, *weights)


def value_and_gradients(module: torch.nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of a fixed function of it by every input and parameter."""
    out = module(*inputs)
    leaves = [x for x in (*inputs, *module.parameters()) if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def same(ours: Any, stock: Any, tolerance: float = 1e-5) -> None:
    """Compare the tensors of two results; everything else must be equal."""
    torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance)


def mace(interaction: str = "RealAgnosticResidualInteractionBlock", **options: Any) -> Any:
    """An untrained MACE of two layers in float64; skips the test where MACE is absent."""
    pytest.importorskip("mace")
    import numpy as np
    from mace import modules

    settings: dict[str, Any] = {
        "r_max": 4.0,
        "num_bessel": 4,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": modules.interaction_classes[interaction],
        "interaction_cls_first": modules.interaction_classes["RealAgnosticInteractionBlock"],
        "num_interactions": 2,
        "num_elements": 2,
        "hidden_irreps": o3.Irreps("4x0e+4x1o"),
        "MLP_irreps": o3.Irreps("4x0e"),
        "atomic_energies": np.array([-1.0, -2.0]),
        "avg_num_neighbors": 4.0,
        "atomic_numbers": [1, 8],
        "correlation": 2,
        "gate": torch.nn.functional.silu,
        "radial_MLP": [8],
        "atomic_inter_scale": 1.0,
        "atomic_inter_shift": 0.0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return modules.ScaleShiftMACE(**settings | options).double()


def two_headed(**options: Any) -> Any:
    """A MACE as `mace` makes it, of heads "a" and "b" with energies, readouts and scales of their own."""
    import numpy as np

    own: dict[str, Any] = {
        "heads": ["a", "b"],
        "atomic_energies": np.array([[-1.0, -2.0], [-3.0, -5.0]]),
        "atomic_inter_scale": [1.0, 2.0],
        "atomic_inter_shift": [0.1, 0.2],
    }
    return mace(**own | options)


def molecules(copies: int = 2) -> dict[str, torch.Tensor]:
    """A batch of slightly different water molecules, as MACE takes it, in float64."""
    pytest.importorskip("mace")
    from ase.build import molecule
    from mace import data, tools
    from mace.tools.torch_geometric import Batch

    table = tools.AtomicNumberTable([1, 8])
    items = []
    for seed in range(copies):
        atoms = molecule("H2O", vacuum=3.0)
        atoms.rattle(0.05, seed=seed)
        item = data.AtomicData.from_config(data.config_from_atoms(atoms), z_table=table, cutoff=4.0)
        items.append(item)
    batch = Batch.from_data_list(items).to_dict()
    doubled = lambda x: x.double() if x.is_floating_point() else x  # noqa: E731
    return {k: doubled(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def energy_and_forces(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What MACE says of a batch, detached."""
    out = model(dict(batch), training=False)
    return [out["energy"].detach(), out["forces"].detach()]
