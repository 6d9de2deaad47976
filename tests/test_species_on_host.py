"""Nodes sorted by species: the kernels on the CPU against the same in torch operations."""

from __future__ import annotations

import pytest
import torch
from comparison import poisoned_memory
from host_kernels import HostCompiler
from host_launch import HostError
from kernel_barriers import barriers, without
from mace_parts import ATTRS, node_attrs, one_hot
from species_parity import CASES, assert_sorted, attrs_of

from e3nn_accel.backends.cuda import species
from e3nn_accel.backends.cuda.species import SpeciesSort
from e3nn_accel.config import Config
from e3nn_accel.plan import PlanContext

FILE = "species.cu"
pytestmark = [pytest.mark.once, pytest.mark.usefixtures("kernels_on_host")]


def sort(dtype: torch.dtype = torch.float64) -> SpeciesSort:
    return SpeciesSort(PlanContext(dtype, torch.device("cpu"), Config()))


@pytest.mark.parametrize("attrs", ATTRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attrs(attrs: str, dtype: torch.dtype) -> None:
    assert_sorted(sort(dtype), node_attrs(attrs, 9).to(dtype))


@pytest.mark.parametrize("case", list(CASES))
def test_cases(case: str) -> None:
    """More rows than a tile has, numbers that are none, and what there is no room for."""
    assert_sorted(sort(), attrs_of(case))


def test_tiles_of_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a million rows."""
    monkeypatch.setattr(species, "MOST_TILES", 2)
    monkeypatch.setattr(species, "ROWS", 32)
    monkeypatch.setattr(species, "THREADS", 64)
    assert_sorted(sort(), attrs_of("many rows"))


def test_a_change_in_place_is_seen() -> None:
    """What was found is found again until then."""
    attrs, by = one_hot([0, 1, 2, 1]), sort()
    first = by.nodes(attrs)
    assert by.nodes(attrs) is first
    attrs[0] = attrs[2]
    assert by.nodes(attrs).species.tolist() == [2, 1, 2, 1]
    assert first.attrs is not None  # of the operand as it was
    assert first.attrs[0].tolist() == [1, 0, 0, 0]


def exercise() -> None:
    """Two tiles of two parts each, several warps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(species, "ROWS", 32)
        patch.setattr(species, "MOST_TILES", 2)
        patch.setattr(species, "THREADS", 64)
        assert_sorted(sort(), node_attrs("zero rows", 120, 40))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(sanitizer: str, kernels_on_host: HostCompiler) -> None:
    kernels_on_host.sanitizer = sanitizer
    exercise()


@pytest.mark.slow
@pytest.mark.parametrize("barrier", barriers(FILE))
def test_a_missing_barrier_is_a_race(barrier: int, kernels_on_host: HostCompiler) -> None:
    kernels_on_host.sanitizer, kernels_on_host.change = "thread", without(FILE, barrier)
    with pytest.raises((HostError, AssertionError), match=r"data race|SEGV|order|species|first"):
        exercise()


def test_memory_is_written_where_it_is_read() -> None:
    with poisoned_memory():
        assert_sorted(sort(), node_attrs("one row mixed", 70))
