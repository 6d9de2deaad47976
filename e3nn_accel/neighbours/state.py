"""The batches of one calculator: made of the last ones, or MACE's own, with the reason."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from e3nn_accel import generation
from e3nn_accel.errors import FallbackWarning
from e3nn_accel.neighbours import NEIGHBOURS
from e3nn_accel.neighbours.agreement import difference
from e3nn_accel.neighbours.frame import Frame, snapshot
from e3nn_accel.neighbours.pairs import SKIN, Pairs
from e3nn_accel.neighbours.snapshot import Snapshot
from e3nn_accel.runner import Runner

log = logging.getLogger(__name__)
DEVICES = ("cpu", "cuda")
UNLIKE = "nothing like the last structure"
FAST = "atoms move far between calls"
Stock = Callable[[Any, Any], Any]
"""MACE's `_atoms_to_batch(calculator, atoms)`."""


class CalculatorState:
    """What is known about one calculator; never holds the calculator itself.

    Attributes:
        off: Whether its calls are MACE's own, unreported.
    """

    def __init__(self, runner: Runner, stock: Stock) -> None:
        config = runner.config
        self.generation = generation.current.name
        self.runner = runner
        self.off = config is None or config.neighbours == "0"
        self._stock = stock
        self._left = runner.left
        if config is not None and config.verify:
            self._left = "verify compares every operation"
        self._at_once = config is not None and config.neighbours == "1"
        self._unchecked = config is not None and config.self_check
        self._reason = ""
        self._declined = False
        self._frame: Frame | None = None
        self._pairs: Pairs | None = None
        self._last: Snapshot | None = None

    def batch(self, calculator: Any, atoms: Any) -> Any:
        """MACE's Batch of a structure."""
        tensors = None if self._declined else self.tensors(calculator, atoms)
        if tensors is not None and self._frame is not None:
            return self._frame.batch(tensors)
        self.runner.count(NEIGHBOURS, "mace", self._reason)
        batch = self._stock(calculator, atoms)
        self._frame = self._pairs = None
        if not self._why_not(calculator):
            self._frame, self._last = Frame(calculator, atoms, batch), snapshot(atoms)
        return batch

    @contextlib.contextmanager
    def declined(self) -> Iterator[None]:
        """Within it MACE makes the batch, for the reason found last."""
        self._declined = True
        try:
            yield
        finally:
            self._declined = False

    def tensors(self, calculator: Any, atoms: Any) -> dict[str, Any] | None:
        """The tensors of a batch, some shared with earlier ones; None where MACE has to make it."""
        self._reason, tensors, how = "", None, ""
        try:
            self._reason = self._why_not(calculator)
            if not self._reason:
                tensors, how = self._reused(calculator, atoms)
        except Exception as error:  # MACE meets the same structure and raises its own error
            log.info("no batch of the last one", exc_info=True)
            self._reason = f"{type(error).__name__}: {error}"
        if tensors is not None:
            self.runner.count(NEIGHBOURS, "verlet", how)
        return tensors

    def _reused(self, calculator: Any, atoms: Any) -> tuple[dict[str, Any] | None, str]:
        frame, last, how = self._frame, self._last, ""
        if frame is None or last is None or not frame.fits(calculator, atoms):
            self._reason = UNLIKE
            return None, ""
        now = self._last = snapshot(atoms)
        if self._pairs is None or not self._pairs.cover(now):
            if not self._worth_it(last, now):
                self._reason = FAST
                return None, ""
            how = "list made"
            self._pairs = Pairs(now, float(calculator.r_max), frame.dtype, frame.device)
            self._note(self._pairs)
        with torch.no_grad():
            positions = torch.from_numpy(now.positions).to(frame.device)
            tensors = frame.filled(now, positions, self._pairs.edges(now, positions))
        if self._unchecked:
            self._check(calculator, tensors, self._stock(calculator, atoms).to_dict())
        return (None if self._reason else tensors), how

    def _why_not(self, calculator: Any) -> str:
        """Why MACE makes the batches of this calculator, or an empty string."""
        if self._left:
            return self._left
        if calculator.use_compile:
            return "compile_mode pads batches"
        if calculator.pad_num_atoms or calculator.pad_num_edges:
            return "pad_num_atoms or pad_num_edges pads batches"
        if calculator.device.type not in DEVICES:
            return f"the device is {calculator.device.type}"
        return ""

    def _worth_it(self, last: Snapshot, now: Snapshot) -> bool:
        """Whether a list would serve a few steps: atoms moved a quarter of the skin at most."""
        return self._at_once or last.reach(now, SKIN) >= SKIN / 2

    def _check(self, calculator: Any, tensors: dict[str, Any], mace: dict[str, Any]) -> None:
        """Compare with MACE's own batch, once; if they differ, MACE makes all from now on."""
        self._unchecked = False
        found = difference(tensors, mace, calculator.r_max)
        if found:
            self._left = self._reason = f"self-check: {found} differ"
            name = type(calculator).__name__
            message = f"e3nn_accel leaves the batches of {name} to MACE: {self._left}"
            warnings.warn(message, FallbackWarning, stacklevel=6)

    def _note(self, pairs: Pairs) -> None:
        within = f"{pairs.cutoff:g} + {SKIN:g}"
        self.runner.notes[NEIGHBOURS] = (
            f"edges from a list of {pairs.number} pairs within {within}, by {pairs.by}"
        )
