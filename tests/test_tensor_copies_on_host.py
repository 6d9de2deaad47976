"""Tensors copied by a kernel on the CPU."""

from __future__ import annotations

import pytest
from copies_parity import OFFSETS, SIZES, check, check_types

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("kernels_on_host")]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_every_byte(offsets: tuple[int, int]) -> None:
    check(SIZES, offsets)


def test_types() -> None:
    check_types()


def test_nothing() -> None:
    """No bytes are no launch."""
    check([0, 0], (0, 0))
