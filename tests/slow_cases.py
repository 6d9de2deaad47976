"""Cases of a test of which some run in every check and the others, marked slow, in the full one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases, all but the quick ones marked slow."""
    cases = list(cases)
    missing = [case for case in quick if case not in cases]
    if missing:
        raise ValueError(f"no such cases: {missing}")
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
