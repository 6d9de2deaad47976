"""Linears by halves of rows that were there before: by the kernels on the CPU, launched as on a device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from comparison import accelerated, draw, poisoned_memory, randomise, usage
from e3nn import o3
from host_driver import DrivenCompiler, HostDriver
from host_kernels import HostCompiler
from test_device_memory import DriverError

import e3nn_accel
from e3nn_accel import argument_block, branches, launch
from e3nn_accel.backends.cuda import indexed_linear_launch, linear_in_halves_launch
from e3nn_accel.backends.cuda.linear_in_halves import LinearInHalves

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eager_e3nn")]

IRREPS, SPECIES, ROWS = "8x0e+4x1o", 3, 70
BOTH = ["halve_weights", "linear_in_halves"]
Arguments = tuple[torch.Tensor, ...]


@pytest.fixture
def driver(kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    """On device 0 and torch's stream 70, for however few rows."""
    driven = DrivenCompiler(kernels_on_host)
    driver = driven.driver
    monkeypatch.setattr(argument_block, "driver_for_this_thread", lambda: driver)
    monkeypatch.setattr(launch, "current_stream_function", lambda: lambda index: 70 + index)
    monkeypatch.setattr(launch, "current_device_function", lambda: lambda: driver.device)
    monkeypatch.setattr(indexed_linear_launch, "load_all", driven.load_all)
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", -1)
    monkeypatch.setattr(indexed_linear_launch, "least_rows", lambda species: 0)
    return driver


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of memory that was asked for as on a device, all NaN."""
    found: list[tuple[int, ...]] = []

    def memory(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Any:
        found.append(shape)
        return torch.empty_strided(shape, strides, dtype=dtype).fill_(float("nan"))

    monkeypatch.setattr(linear_in_halves_launch, "new_memory_of", lambda device: memory)
    return found


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call with a look for each launch."""
    found: list[int] = []
    rows = LinearInHalves.rows

    def counted(self: Any, kernels: Any, blocks: int, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(x.shape[0])
        return rows(self, kernels, blocks, x, *rest)

    monkeypatch.setattr(LinearInHalves, "rows", counted)
    return found


class Case(NamedTuple):
    """A module, and its arguments of so many rows."""

    module: torch.nn.Module
    arguments: Callable[..., Arguments]

    def expected(self, *arguments: torch.Tensor) -> torch.Tensor:
        """By a look for each launch, which plans of modules that aren't known take."""
        runner = self._runner()
        known, runner.ordinary = runner.ordinary, None
        attempts, runner.attempts_to_remember = runner.attempts_to_remember, 99
        out: torch.Tensor = self.module(*arguments)
        runner.ordinary, runner.attempts_to_remember = known, attempts
        return out

    def _runner(self) -> Any:
        assert e3nn_accel.switch.active.dispatcher is not None
        return e3nn_accel.switch.active.dispatcher.runners[self.module]


def linear() -> Case:
    module = randomise(o3.Linear(IRREPS, IRREPS), 0)
    return Case(module, lambda rows=ROWS, seed=1: (draw((rows, 20), seed, torch.float32),))


def skip_connection() -> Case:
    module = randomise(o3.FullyConnectedTensorProduct(IRREPS, f"{SPECIES}x0e", IRREPS), 0)

    def arguments(rows: int = ROWS, seed: int = 1) -> Arguments:
        attrs = torch.nn.functional.one_hot(torch.arange(rows) % SPECIES, SPECIES)
        return draw((rows, 20), seed, torch.float32), attrs.float()

    return Case(module, arguments)


@pytest.fixture(params=[linear, skip_connection], ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest, driver: HostDriver, asked: list[tuple[int, ...]]) -> Any:
    """After a first call, with nothing noted of it."""
    torch.set_default_dtype(torch.float32)
    found = request.param()
    with accelerated(backend="cuda", self_check=False), torch.no_grad(), poisoned_memory():
        found.module(*found.arguments())
        driver.launches.clear()
        yield found


def in_halves(driver: HostDriver) -> list[str]:
    """Kernels that were launched, but for those that sort rows by species."""
    return [name for name, _ in driver.launches if name in BOTH]


def test_numbers_of_rows(
    case: Case, driver: HostDriver, asked: list[tuple[int, ...]], long_way: list[int]
) -> None:
    """The same to the bit, in memory of each call's own, and every call is counted."""
    for rows in (ROWS, 1, 300, ROWS):
        given = case.arguments(rows, rows)
        found = case.module(*given)
        assert in_halves(driver) == BOTH
        assert {stream for _, stream in driver.launches} == {70}
        assert len(asked) == 2
        assert long_way == []
        assert torch.equal(found, case.expected(*given))
        assert (found.shape, found.stride()) == ((rows, 20), (20, 1))
        driver.launches.clear(), asked.clear(), long_way.clear()
    assert list(usage(case.module).values()) == [9]


def test_rows_that_begin_anywhere(case: Case, long_way: list[int]) -> None:
    """In the middle of what is copied at once: they are copied themselves."""
    x, *others = case.arguments()
    flat = torch.zeros(x.numel() + 4)
    for offset in range(1, 4):
        moved = flat[offset : offset + x.numel()].view_as(x).copy_(x)
        assert moved.data_ptr() % 16
        assert torch.equal(case.module(moved, *others), case.module(x, *others))
    assert long_way == []


def test_weights_are_cut_anew(case: Case) -> None:
    given = case.arguments()
    before = case.module(*given)
    for p in case.module.parameters():
        p.data.mul_(2)
    assert torch.equal(case.module(*given), 2 * before)


def test_another_device_is_current(
    case: Case, driver: HostDriver, long_way: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each launch is made on the kernels' own."""

    class Current:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            driver.device = self.index

        def __exit__(self, *error: object) -> None:
            driver.device = 1

    monkeypatch.setattr(torch.cuda, "device", Current)
    given = case.arguments()
    expected = case.module(*given)
    driver.launches.clear()
    driver.device = 1
    assert torch.equal(case.module(*given), expected)
    assert long_way == [ROWS]
    assert in_halves(driver) == BOTH
    assert {stream for _, stream in driver.launches} == {70}


def test_a_capture_with_branches(
    case: Case, long_way: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In which weights are cut on another stream."""
    cut: list[tuple[torch.Tensor, ...]] = []

    def begun(find: Any, of: tuple[torch.Tensor, ...]) -> branches.Early[torch.Tensor]:
        cut.append(of)
        return branches.Early(find())

    given = case.arguments()
    expected = case.module(*given)
    monkeypatch.setattr(branches, "begun", begun)
    monkeypatch.setitem(branches.branches_of_streams, "a stream", "its branches")  # type: ignore[misc]
    assert torch.equal(case.module(*given), expected)
    assert long_way == [ROWS]
    assert cut[-1][0] is case.module.weight


@pytest.mark.parametrize("kernel", BOTH)
def test_a_full_device(
    case: Case,
    driver: HostDriver,
    long_way: list[int],
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
) -> None:
    """torch's allocator gives back what it keeps, and the same launch is made again."""
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
    assert in_halves(driver) == BOTH
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
    of_rows = linear_in_halves_launch.run_of_rows

    def noted(halved: Any, kernels: Any, rows: int, device: torch.device) -> Any:
        found.append(rows)
        return of_rows(halved, kernels, rows, device)

    monkeypatch.setattr(indexed_linear_launch, "run_of_rows", noted)
    for rows in (1, 2, 3, 3, 4, 4, 1):
        case.module(*case.arguments(rows))
    assert found == [1, 2, 3, 4, 1]
