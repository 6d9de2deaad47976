"""A driver that finds no memory: torch's allocator gives back what it keeps, or torch's error is raised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_programs import Compilations, axpy
from test_launch import Driver, Module, driver, kernel, two_devices

from e3nn_accel.config import Config
from e3nn_accel.launch import load_all

pytestmark = pytest.mark.once
__all__ = ["driver", "two_devices"]  # fixtures

LAUNCH = ((1, 1, 1), (32, 1, 1))


class DriverError(RuntimeError):
    """As CuPy's, which has the driver's number."""

    def __init__(self, status: int) -> None:
        super().__init__(f"error {status}")
        self.status = status


class Allocator:
    """torch's, which can give memory back; the driver lacks some until then, or lacks it always."""

    def __init__(self, keeps: bool) -> None:
        self.keeps, self.emptied, self.capturing = keeps, 0, False

    def empty_cache(self) -> None:
        self.emptied += 1

    def needed(self, *_: Any) -> None:
        """By the driver, now."""
        if not self.keeps or not self.emptied:
            raise DriverError(2)


@pytest.fixture(params=[True, False], ids=["after emptying the cache", "never"])
def allocator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Allocator:
    """One that can help, and one that can't."""
    found = Allocator(request.param)
    monkeypatch.setattr(torch.cuda, "empty_cache", found.empty_cache)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    return found


def attempt(allocator: Allocator, run: Any) -> None:
    """It works where the allocator can help, and is torch's error where it can't."""
    if allocator.keeps:
        run()
    else:
        with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory") as raised:
            run()
        assert isinstance(raised.value.__cause__, DriverError)
    assert allocator.emptied == 1


def test_launch(driver: Driver, allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one works."""
    run, launch = kernel(driver, "q"), driver.launchKernel

    def full(*arguments: int) -> None:
        allocator.needed()
        launch(*arguments)

    monkeypatch.setattr(run, "_launch", full)
    attempt(allocator, lambda: run(*LAUNCH, 5))
    monkeypatch.setattr(run, "_launch", launch)
    run(*LAUNCH, 6)
    assert [values for *_, values in driver.launches] == ([[5], [6]] if allocator.keeps else [[6]])


def test_launch_within_a_capture(
    driver: Driver, allocator: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In which nothing may be freed."""
    allocator.capturing = True
    run = kernel(driver, "q")
    monkeypatch.setattr(run, "_launch", allocator.needed)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(*LAUNCH, 5)
    assert allocator.emptied == 0


def test_other_errors_are_the_drivers(
    driver: Driver, allocator: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An illegal address, say."""
    run = kernel(driver, "q")

    def broken(*_: int) -> None:
        raise DriverError(700)

    monkeypatch.setattr(run, "_launch", broken)
    with pytest.raises(DriverError, match="700"):
        run(*LAUNCH, 5)
    assert allocator.emptied == 0


@pytest.mark.parametrize("step", ["load", "get_function"])
def test_loading(
    two_devices: Compilations, allocator: Allocator, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What could not be loaded is loaded by the next call, and not compiled again."""
    done = getattr(Module, step)

    def full(module: Module, argument: Any) -> Any:
        allocator.needed()
        return done(module, argument)

    def run() -> None:
        (loaded,) = load_all([axpy()], torch.device("cuda", 0), Config())
        loaded.kernel("axpy", "PPqf")

    monkeypatch.setattr(Module, step, full)
    attempt(allocator, run)
    monkeypatch.setattr(Module, step, done)
    run()
    assert len(Module.loaded) == 1
    assert len(two_devices) == 1
