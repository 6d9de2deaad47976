"""Linears of rows that were there before: prepared launches are those of other calls, and as safe."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from comparison import usage
from host_driver import HostDriver, devices_of
from known_rows import ROWS, Case, asked, case, driver, kernels, long_way, overlapping
from test_device_memory import DriverError

from e3nn_accel import branches
from e3nn_accel.backends.cuda import (
    indexed_linear_known,
    indexed_linear_launch,
    linear_in_halves_launch,
)
from e3nn_accel.backends.cuda.indexed_linear_launch import IndexedLinearKernels

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eager_e3nn")]
__all__ = ["asked", "case", "driver", "kernels", "long_way", "overlapping"]  # fixtures


def launched(driver: HostDriver) -> list[str]:
    """Kernels that were launched, but for those that sort rows by species."""
    return [name for name, _ in driver.launches if not name.endswith("of_rows")]


def test_numbers_of_rows(
    case: Case,
    kernels: list[str],
    overlapping: list[str],
    driver: HostDriver,
    asked: list[tuple[int, ...]],
    long_way: list[int],
) -> None:
    """The same to the bit, in memory of each call's own, and every call is counted."""
    driver.overlapping.clear()
    for rows in (ROWS, 1, 300, ROWS):
        given = case.arguments(rows, rows)
        found = case.module(*given)
        assert launched(driver) == kernels
        assert {stream for _, stream in driver.launches} == {70}
        assert driver.overlapping == overlapping
        assert len(asked) == len(kernels)
        assert long_way == []
        assert torch.equal(found, case.expected(*given))
        assert (found.shape, found.stride()) == ((rows, 20), (20, 1))
        driver.launches.clear(), driver.overlapping.clear(), asked.clear(), long_way.clear()
    assert list(usage(case.module).values()) == [9]


def test_no_rows(case: Case, driver: HostDriver) -> None:
    """No launch is attempted, which would fail; what sorts rows by species is launched all the same."""
    attempted: list[str] = []
    driver.fails = attempted.append
    assert case.module(*case.arguments(0)).shape == (0, 20)
    assert [name for name in attempted if not name.endswith("of_rows")] == []


def moved(t: torch.Tensor, by: int) -> torch.Tensor:
    """The same in the middle of what is copied at once."""
    found = torch.zeros(t.numel() + 4)[by : by + t.numel()].view_as(t).copy_(t)
    assert found.data_ptr() % 16
    return found


@pytest.mark.parametrize("by", [1, 2, 3])
def test_rows_and_weights_that_begin_anywhere(case: Case, long_way: list[int], by: int) -> None:
    """They are copied first, where a kernel can't read them so."""
    x, *others = case.arguments()
    expected = case.module(x, *others)
    assert torch.equal(case.module(moved(x, by), *others), expected)
    weight: Any = case.module.weight
    weight.data = moved(weight.data, by)
    assert torch.equal(case.module(x, *others), expected)
    assert long_way == []


def test_rows_that_are_copied(
    case: Case, kernels: list[str], driver: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Are before anything is launched: a kernel that may begin early reads them."""
    found: list[list[str]] = []

    def aligned(t: torch.Tensor) -> torch.Tensor:
        found.append(launched(driver))
        return t.clone()

    for of in (linear_in_halves_launch, indexed_linear_known):
        monkeypatch.setattr(of, "aligned", aligned)
    x, *others = case.arguments()
    case.module(moved(x, 1), *others)
    assert found
    assert not any(found)
    assert launched(driver) == kernels


def test_weights_are_read_anew(case: Case) -> None:
    given = case.arguments()
    before = case.module(*given)
    for p in case.module.parameters():
        p.data.mul_(2)
    assert torch.equal(case.module(*given), 2 * before)


def test_another_device_is_current(
    case: Case,
    kernels: list[str],
    driver: HostDriver,
    long_way: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each launch is made on the kernels' own."""
    monkeypatch.setattr(torch.cuda, "device", devices_of(driver))
    given = case.arguments()
    expected = case.module(*given)
    driver.launches.clear()
    driver.device = 1
    assert torch.equal(case.module(*given), expected)
    assert long_way == [ROWS]
    assert launched(driver) == kernels
    assert {stream for _, stream in driver.launches} == {70}


def test_a_capture_with_branches(
    case: Case, kernels: list[str], long_way: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In which weights are cut on another stream."""
    cut: list[tuple[torch.Tensor, ...]] = []

    def begun(find: Any, of: tuple[torch.Tensor, ...]) -> branches.Early[torch.Tensor]:
        cut.append(of)
        return branches.Early(find())

    given = case.arguments()
    expected = case.module(*given)
    if "halve_weights" not in kernels:
        pytest.skip("nothing is begun ahead")
    monkeypatch.setattr(branches, "begun", begun)
    monkeypatch.setitem(branches.branches_of_streams, "a stream", "its branches")  # type: ignore[misc]
    assert torch.equal(case.module(*given), expected)
    assert long_way == [ROWS]
    assert cut[-1][0] is case.module.weight


@pytest.mark.parametrize("which", [0, -1])
def test_a_full_device(
    case: Case,
    kernels: list[str],
    driver: HostDriver,
    long_way: list[int],
    monkeypatch: pytest.MonkeyPatch,
    which: int,
) -> None:
    """torch's allocator gives back what it keeps, and the same launch is made again."""
    kernel = kernels[which]
    emptied: list[str] = []

    def fails(name: str) -> None:
        if name == kernel and not emptied:
            raise DriverError(2)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(kernel))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    given = case.arguments()
    expected = case.module(*given)
    driver.launches.clear()
    driver.fails = fails
    assert torch.equal(case.module(*given), expected)
    assert emptied == [kernel]
    assert launched(driver) == kernels
    assert long_way == []


def test_threads(case: Case, long_way: list[int]) -> None:
    """Take turns between what one of them packs and what the driver reads."""
    given = [case.arguments(ROWS + n % 2, n) for n in range(4)]
    expected = [case.module(*of) for of in given]
    wrong: list[int] = []

    def work(n: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(case.module(*given[n]), expected[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert long_way == []


def test_numbers_of_rows_that_are_remembered(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are bounded: edges come and go."""
    monkeypatch.setattr(indexed_linear_launch, "MOST_LAUNCHES", 3)
    found: list[int] = []
    run_of = IndexedLinearKernels._run_of

    def noted(self: Any, x: torch.Tensor, w: torch.Tensor) -> Any:
        found.append(x.shape[0])
        return run_of(self, x, w)

    monkeypatch.setattr(IndexedLinearKernels, "_run_of", noted)
    for rows in (1, 2, 3, 3, 4, 4, 1):
        case.module(*case.arguments(rows))
    assert found == [1, 2, 3, 4, 1]
