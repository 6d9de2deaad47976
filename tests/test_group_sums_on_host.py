"""Rows summed by groups, by a kernel on the CPU, against the same in torch operations."""

from __future__ import annotations

import pytest
import torch
from group_parity import SHAPES, SIZES, check
from host_kernels import HostCompiler
from slow_cases import slow_but

from e3nn_accel.backends.cuda.group_sums import MOST_COLUMNS, GroupSums
from e3nn_accel.config import Config

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("kernels_on_host")]


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.float64], torch.float64), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_group(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for sizes in SIZES.values():
        check(sizes, shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(sanitizer: str, kernels_on_host: HostCompiler) -> None:
    kernels_on_host.sanitizer = sanitizer
    check(SIZES["some"], (3,), torch.float64)


@pytest.mark.parametrize(
    ("like", "taken"),
    [
        (torch.zeros(4, 3), True),
        (torch.zeros(4), True),
        (torch.zeros(4, MOST_COLUMNS + 1), False),
        (torch.zeros(4, 0), False),
        (torch.zeros(0, 3), False),
        (torch.zeros(4, 3, dtype=torch.bfloat16), False),
    ],
)
def test_what_is_left_to_torch(like: torch.Tensor, taken: bool) -> None:
    assert GroupSums(Config()).takes(like) == taken
