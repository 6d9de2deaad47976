"""MACECalculator: batches whose neighbours are found from the last step's, and what is asked before (`neighbours`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e3nn_accel.neighbours.calls import CalculatorCalls

MODULE, CLASS = "mace.calculators.mace", "MACECalculator"


def methods_for(cls: Any, calls: CalculatorCalls) -> dict[str, Callable[..., Any]]:
    """What to put on the class, by name."""
    from ase.calculators.calculator import all_changes
    from mace.modules import models

    from e3nn_accel.neighbours.calls import REPLACED, SHORT_CUT

    calls.stock = {name: getattr(cls, name) for name in (*REPLACED, *SHORT_CUT)}
    calls.models = (models.MACE, models.ScaleShiftMACE)

    @functools.wraps(calls.stock["_atoms_to_batch"])
    def _atoms_to_batch(self: Any, atoms: Any) -> Any:
        return calls.batch(self, atoms)

    @functools.wraps(calls.stock["calculate"])
    def calculate(
        self: Any, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        calls.calculate(self, atoms, properties, system_changes)

    @functools.wraps(calls.stock["check_state"])
    def check_state(self: Any, atoms: Any, tol: float = 1e-15) -> Any:
        return calls.changes(self, atoms, tol)

    calls.ours = {
        "_atoms_to_batch": _atoms_to_batch,
        "calculate": calculate,
        "check_state": check_state,
    }
    return calls.ours
