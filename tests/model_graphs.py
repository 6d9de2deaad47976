"""Models, batches, and a stand-in for CUDA graphs on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

import e3nn_accel
from e3nn_accel import switch
from e3nn_accel.graphs import MODEL_CALL
from e3nn_accel.graphs.capture import WARM_UPS, Run, warm_up
from e3nn_accel.graphs.derivative import Derivative
from e3nn_accel.graphs.outputs import Produced

Gradients = tuple[torch.Tensor | None, ...]


class StandIn:
    """A run that is remembered, and run again at each replay, into the tensors of the first time."""

    def __init__(self, run: Run, derivative: Derivative | None) -> None:
        self.run, self.derivative = run, derivative
        found = run()
        self.produced = Produced(
            found.keys, found.results, found.marked, tuple(t.clone() for t in found.tensors)
        )
        self.bytes = sum(t.numel() * t.element_size() for t in found.tensors)
        self.left: list[Produced] = []
        self.gradients = () if derivative is None else copies_of(derivative(found))

    def replay(self) -> None:
        Memory.last_written = self
        with torch.enable_grad():  # which a captured run has, wherever it is replayed
            found = self.run()
        self.left = [found]
        for kept, tensor in zip(self.produced.tensors, found.tensors, strict=True):
            kept.copy_(tensor)

    def replay_gradients(self) -> Gradients:
        assert Memory.last_written is self, "what the forward left was written over"
        Memory.last_written = None
        for kept, tensor in zip(self.gradients, self._found(self.left.pop()), strict=True):
            if kept is not None:
                kept.copy_(tensor)
        return self.gradients

    def _found(self, produced: Produced) -> Gradients:
        """As the derivative finds them, by the parameters themselves: at a replay nothing stands for them."""
        derivative, live = self.derivative, produced.live
        assert derivative is not None
        assert live is not None
        results = [live.results[n] for n in derivative.places]
        wanted = [*live.leaves.values(), *derivative.parameters]
        return torch.autograd.grad(results, wanted, derivative.given, allow_unused=True)


class Memory:
    """That all recordings share: a replay writes over what the one before has left."""

    last_written: StandIn | None = None


def copies_of(gradients: Gradients) -> Gradients:
    """Of those that there are."""
    return tuple(None if t is None else t.clone() for t in gradients)


class CpuLane:
    """Where stand-ins are made."""

    limit = 1 << 40

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.left: object = None

    def enter(self) -> None:
        pass

    def allocating(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, run: Run, derivative: Derivative | None = None) -> StandIn:
        for n in range(WARM_UPS):
            warm_up(run, derivative, first=n == 0)
        return StandIn(run, derivative)


@contextlib.contextmanager
def replaying(lane: Any = CpuLane, **options: Any) -> Iterator[None]:
    """Enabled, with stand-ins on the CPU."""
    with e3nn_accel.enabled(**options):
        use_stand_ins(lane)
        yield


def use_stand_ins(lane: Any = CpuLane) -> None:
    """For what is enabled from now on until it is disabled."""
    assert switch.active.dispatcher is not None
    calls = switch.active.dispatcher.model_calls
    calls.device_type, calls.lane_for = "cpu", lane


def rows() -> dict[tuple[str, str], int]:
    """Calls of models by how they ran, and why: ("graph", ""), ("graph", "captured"), ("eager", reason)."""
    dispatcher = switch.active.dispatcher
    assert dispatcher is not None
    found: dict[tuple[str, str], int] = {}
    for runner in dispatcher.runners.values():
        for (operation, backend, reason), usage in runner.usage.items():
            if operation == MODEL_CALL:
                found[backend, reason] = found.get((backend, reason), 0) + usage.calls
    return found


def fresh(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch in tensors of its own."""
    return {k: v.detach().clone() if torch.is_tensor(v) else v for k, v in batch.items()}


def captures() -> int:
    """Calls of models that were captured."""
    return rows().get(("graph", "captured"), 0)


def replays() -> int:
    """Calls of models that were replayed, but for training."""
    return rows().get(("graph", ""), 0)


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """In everything that a caller can see of the results of a call."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        assert found[name].requires_grad == value.requires_grad, name
        scale = max(float(value.detach().abs().max()), 1e-3)
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12 * scale)


def water(**options: Any) -> Any:
    """A molecule without a cell."""
    from ase.build import molecule

    atoms = molecule("H2O", **options)
    atoms.rattle(0.05, seed=1)
    return atoms


def ice(seed: int = 0, periodic: Any = True, repeat: int = 1) -> Any:
    """A dense cell, narrower than the cutoff."""
    import ase

    atoms = ase.Atoms(
        "OHHOHH",
        positions=[(0, 0, 0), (1, 0, 0), (0, 1, 0), (2, 2, 2), (2.9, 2, 2), (2, 2.9, 2)],
        cell=[[3.6, 0.2, 0], [0, 3.5, 0.3], [0.1, 0, 3.7]],
        pbc=periodic,
    )
    atoms = atoms * (repeat, 1, 1)
    atoms.rattle(0.05, seed=seed)
    return atoms


def alone() -> Any:
    """An atom without neighbours."""
    import ase

    return ase.Atoms("O", positions=[(0, 0, 0)])


def headed(structures: list[Any], heads: str) -> list[Any]:
    """Structures that name a head each, of one letter."""
    for atoms, head in zip(structures, heads, strict=True):
        atoms.info["head"] = head
    return structures


def batch_of(
    structures: list[Any], cutoff: float = 4.0, heads: tuple[str, ...] = ("Default",)
) -> Any:
    """As MACE makes it, float64; structures name their head in ``info["head"]``."""
    from mace import data, tools
    from mace.tools.torch_geometric import Batch

    from e3nn_accel.structures import default_dtype

    table = tools.AtomicNumberTable([1, 8])
    with default_dtype(torch.float64):
        items = [
            data.AtomicData.from_config(
                data.config_from_atoms(atoms, head_name=atoms.info.get("head", heads[0])),
                z_table=table,
                cutoff=cutoff,
                heads=list(heads),
            )
            for atoms in structures
        ]
        return Batch.from_data_list(items).to_dict()
