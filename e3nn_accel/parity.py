"""Compare a MACE model with itself on stock e3nn, in one process: is every number still right?

    from e3nn_accel.parity import compare
    from e3nn_accel.structures import default_structures, load_mace

    model = load_mace("my.model")
    print(compare(model, default_structures(model)).verdict)

The comparison works on copies; the model and the process are left as they were. Stock results are
computed before anything of e3nn is intercepted (or with interception suspended, in a process that
is accelerated already), ours afterwards by the very same copy: nothing but the switch differs.
What counts as equal is in `e3nn_accel.criteria`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from e3nn_accel import reporting, switch
from e3nn_accel._version import __version__
from e3nn_accel.compat import version_of
from e3nn_accel.criteria import (
    MOST_VIEWS,
    NEAR,
    VIEWED_ATOMS,
    Row,
    Triple,
    exact_rows,
    gradient_rows,
    rotated_rows,
    rounded_rows,
)
from e3nn_accel.interception import suspend
from e3nn_accel.quantities import Quantities, compute, gradients
from e3nn_accel.structures import Batch, batch_of, cast, check_elements, rotated
from e3nn_accel.verdict import DtypeParity, Parity, StructureParity

__all__ = ["DtypeParity", "Parity", "StructureParity", "accelerated", "compare"]

Progress = Callable[[str], None]
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class _Options(NamedTuple):
    train: bool
    views: int | None
    progress: Progress
    device: torch.device


def compare(
    model: torch.nn.Module,
    structures: Sequence[Any],
    dtypes: Sequence[str] = ("float64", "float32"),
    train: bool = False,
    views: int | None = None,
    progress: Progress = lambda step: None,
    device: str | torch.device = "cpu",
) -> Parity:
    """Compare accelerated with stock results.

    Args:
        model: A MACE model with energies; stays as it is.
        structures: ``ase.Atoms``, all of the model's elements.
        dtypes: Any of "float32" and "float64"; the model is cast to each.
        train: Also compare the gradients of a loss by every parameter.
        views: How often float32 errors are measured, each time turned and displaced a little;
            None: as often as the structure's size asks for, and more often if that finds too much.
        progress: Told each step.
        device: Where both run.

    Raises:
        InputError: Structures with elements that the model doesn't know.
    """
    check_elements(model, structures)
    graphs = [batch_of(model, atoms) for atoms in structures]
    names = [f"{n} {atoms.get_chemical_formula()}" for n, atoms in enumerate(structures, 1)]
    options = _Options(train, views, progress, torch.device(device))
    found = [_compared(model, DTYPES[dtype], options, names, graphs) for dtype in dtypes]
    installed = {name: version_of(name) for name in ("torch", "e3nn", "mace-torch")}
    versions = {"e3nn_accel": __version__} | {n: v for n, v in installed.items() if v}
    return Parity(type(model).__name__, versions, tuple(found))


def _compared(
    model: torch.nn.Module,
    dtype: torch.dtype,
    options: _Options,
    names: Sequence[str],
    graphs: Sequence[Batch],
) -> DtypeParity:
    found = _Comparison(model, dtype, options).run(names, graphs)
    doubtful = all(row.margin <= NEAR for row in found.rows)  # a NaN isn't
    if dtype != torch.float32 or options.views or found.passed or not doubtful:
        return found
    options = options._replace(views=MOST_VIEWS)
    return _Comparison(model, dtype, options).run(names, graphs)


class _Comparison:
    """One dtype: one copy of the model, on stock e3nn and accelerated, and a float64 reference."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, options: _Options) -> None:
        self.dtype, self.options = dtype, options
        self.rounded = dtype == torch.float32
        with suspend():
            self.model = copy.deepcopy(model).to(options.device, dtype).eval()
            self.reference = copy.deepcopy(self.model).double() if self.rounded else self.model

    def run(self, names: Sequence[str], graphs: Sequence[Batch]) -> DtypeParity:
        """Stock for all structures first, then ours: the process is patched in between."""
        stock, stock_turned, references = [], [], []
        with suspend():
            for name, graph in zip(names, graphs, strict=True):
                self._progress(f"stock e3nn, {name}")
                references.append(self._results(self.reference, graph, None))
                sizes = references[-1][0]
                stock.append(
                    self._results(self.model, graph, sizes) if self.rounded else references[-1]
                )
                stock_turned.append(self._turned(graph, stock[-1]))
        structures = []
        with accelerated():
            for n, (name, graph) in enumerate(zip(names, graphs, strict=True)):
                self._progress(f"accelerated, {name}")
                ours = self._results(self.model, graph, references[n][0])
                turned = list(zip(self._turned(graph, ours), stock_turned[n], strict=True))
                rows = tuple(self._rows(name, ours, stock[n], references[n], turned))
                atoms, edges = len(graph["positions"]), graph["edge_index"].shape[1]
                structures.append(StructureParity(name, atoms, edges, rows))
            explained = reporting.explain(self.model)
            asked, rounded = reporting.precision(self.model)
        modules = {row.path for row in explained.rows}
        fallen = {row.path for row in explained.fallbacks}
        return DtypeParity(
            self._name, tuple(structures), len(modules), len(modules - fallen), explained.fallbacks,
            asked if self.rounded else None, rounded,
        )  # fmt: skip

    def _results(
        self, model: torch.nn.Module, graph: Batch, sizes: Quantities | None
    ) -> list[Quantities]:
        """For each view of the structure; gradients where they are compared."""
        found: list[Quantities] = []
        pooled = self._pooled(graph)
        for n in range(max(2, pooled)):
            view = cast(view_of(graph, n), self.dtype)
            result = compute(model, view, _periodic(graph))
            if self.options.train and n < pooled:
                result = replace(
                    result, gradients=gradients(model, view, sizes or (found or [result])[0])
                )
            found.append(result)
        return found

    def _turned(self, graph: Batch, views: list[Quantities]) -> list[Quantities]:
        """The structure as it is, but turned: as in the second view, and as often as errors are measured."""
        others = [rotated(graph, rotation) for rotation in _rotations(self._pooled(graph))[1:]]
        periodic = _periodic(graph)
        return [views[1], *(compute(self.model, cast(g, self.dtype), periodic) for g in others)]

    def _pooled(self, graph: Batch) -> int:
        """In how many views errors are measured."""
        if not self.rounded:
            return 1
        enough = -(-VIEWED_ATOMS // len(graph["positions"]))
        return self.options.views or min(MOST_VIEWS, enough)

    def _rows(
        self,
        name: str,
        ours: list[Quantities],
        stock: list[Quantities],
        reference: list[Quantities],
        turned: list[tuple[Quantities, Quantities]],
    ) -> Iterator[Row]:
        views = [Triple(*three) for three in zip(ours, stock, reference, strict=True)]
        views = views[: len(turned)]
        yield from (
            rounded_rows(name, views) if self.rounded else exact_rows(name, ours[0], stock[0])
        )
        as_is, rotations = (ours[0], stock[0]), _rotations(len(turned))
        yield from rotated_rows(name, as_is, rotations, turned, self.rounded)
        yield from gradient_rows(name, views, self.rounded)

    @property
    def _name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _progress(self, step: str) -> None:
        self.options.progress(f"{self._name}: {step}")


@contextlib.contextmanager
def accelerated() -> Iterator[None]:
    """Accelerated within, with the options in force if it is so already; afterwards as before."""
    with contextlib.nullcontext() if switch.is_enabled() else switch.enabled():
        yield


def view_of(graph: Batch, number: int) -> Batch:
    """A structure as it is (0), turned (1), or turned and displaced by thousandths of an A (2, ..).

    Displaced, because distances are the same however it is turned, and so are their roundings.
    """
    if number == 0:
        return graph
    if number > 1:
        random = torch.Generator().manual_seed(number)
        noise = torch.randn(graph["positions"].shape, generator=random, dtype=torch.float64)
        graph = graph | {"positions": graph["positions"] + 1e-3 * noise}
    return rotated(graph, random_rotation(number))


def _rotations(number: int) -> list[torch.Tensor]:
    """The first is that of the second view."""
    return [random_rotation(seed) for seed in (1, *range(101, 100 + number))]


def random_rotation(seed: int) -> torch.Tensor:
    """A rotation matrix, float64; the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=torch.float64))
    q = q * r.diagonal().sign()
    rotation: torch.Tensor = q * torch.linalg.det(q)
    return rotation


def _periodic(graph: Batch) -> bool:
    return bool(graph["pbc"].any())
