"""What has changed since a calculator's last results, as ASE finds it.

ASE asks before every property, three times a step of molecular dynamics, and compares each time all arrays of two
structures within a tolerance: a tenth of a small system's step. Numbers that are equal to the bit are so within
any tolerance, and one that differs by more settles it, too; whatever is less plain is left to ASE.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ARRAYS = ("numbers", "initial_charges", "initial_magmoms")


def plain_changes(calculator: Any, atoms: Any, tolerance: float) -> list[str] | None:
    """What MACECalculator's ``check_state`` returns; None where that isn't plain to see.

    Args:
        calculator: MACE's, which compares ``info`` besides what ASE compares.
        atoms: The structure of which something is asked.
        tolerance: Numbers that differ by no more are the same.
    """
    last = calculator.atoms
    if last is None or last.info or atoms.info or calculator.ignored_changes:
        return None
    if not _same(last.cell.array, atoms.cell.array) or not _same(last.pbc, atoms.pbc):
        return None
    before, now = last.arrays, atoms.arrays
    for name in ARRAYS:
        if not _same(before.get(name), now.get(name)):
            return None
    was, places = before["positions"], now["positions"]
    if was.shape != places.shape:
        return None
    if np.array_equal(was, places):
        return []
    return ["positions"] if (np.abs(was - places) > tolerance).any() else None


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return bool(np.array_equal(a, b))
