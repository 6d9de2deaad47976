"""Modules whose calls are known by their rows, with kernels that run on the CPU, launched as on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from comparison import accelerated, draw, poisoned_memory, randomise
from e3nn import o3
from host_driver import DrivenCompiler, HostDriver
from host_kernels import HostCompiler

import e3nn_accel
from e3nn_accel import argument_block, launch, overlapping_launch
from e3nn_accel.backends.cuda import (
    indexed_linear_known,
    indexed_linear_launch,
    linear_in_halves_launch,
)
from e3nn_accel.backends.cuda.indexed_linear_launch import IndexedLinearKernels
from e3nn_accel.backends.cuda.linear_in_halves import LinearInHalves

IRREPS, SPECIES, ROWS = "8x0e+4x1o", 3, 70
BY_HALVES, ON_HOPPER = ["halve_weights", "linear_in_halves"], "halves on Hopper"
WAYS = {"few": ["indexed_linear"], "halves": BY_HALVES, ON_HOPPER: BY_HALVES}
"""Kernels of each way to take rows."""
Arguments = tuple[torch.Tensor, ...]


@pytest.fixture
def driver(kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    """On device 0 and torch's stream 70."""
    driven = DrivenCompiler(kernels_on_host)
    driver = driven.driver
    monkeypatch.setattr(argument_block, "driver_for_this_thread", lambda: driver)
    monkeypatch.setattr(launch, "current_stream_function", lambda: lambda index: 70 + index)
    monkeypatch.setattr(launch, "current_device_function", lambda: lambda: driver.device)
    monkeypatch.setattr(indexed_linear_launch, "load_all", driven.load_all)
    monkeypatch.setattr(overlapping_launch, "overlapping_launch", lambda: driver.overlapping_launch)
    return driver


@pytest.fixture(params=WAYS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What any number of rows is launched with."""
    few_blocks = 10**6 if request.param == "few" else -1
    if request.param == ON_HOPPER:
        monkeypatch.setattr(indexed_linear_launch, "architecture_of", lambda device: 90)
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", few_blocks)
    monkeypatch.setattr(indexed_linear_launch, "least_rows", lambda species: 0)
    return WAYS[request.param]


@pytest.fixture
def overlapping(request: pytest.FixtureRequest, kernels: list[str]) -> list[str]:
    """Which of the kernels may begin before the one in front of them has ended."""
    return kernels[1:] if request.node.callspec.params["kernels"] == ON_HOPPER else []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of memory that was asked for as on a device, all NaN."""
    found: list[tuple[int, ...]] = []

    def memory(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Any:
        found.append(shape)
        return torch.empty_strided(shape, strides, dtype=dtype).fill_(float("nan"))

    for of in (linear_in_halves_launch, indexed_linear_known):
        monkeypatch.setattr(of, "new_memory_of", lambda device: memory)
    return found


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call with a look for each launch."""
    found: list[int] = []
    rows, launched = LinearInHalves.rows, IndexedLinearKernels._launched

    def by_halves(self: Any, kernels: Any, blocks: int, x: torch.Tensor, *rest: Any) -> Any:
        found.append(x.shape[0])
        return rows(self, kernels, blocks, x, *rest)

    def by_one(self: Any, kind: str, launch: Any, x: torch.Tensor, *rest: Any) -> Any:
        found.extend([] if launch.halves else [x.shape[0]])
        return launched(self, kind, launch, x, *rest)

    monkeypatch.setattr(LinearInHalves, "rows", by_halves)
    monkeypatch.setattr(IndexedLinearKernels, "_launched", by_one)
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
def case(
    request: pytest.FixtureRequest,
    kernels: list[str],
    driver: HostDriver,
    asked: list[tuple[int, ...]],
) -> Any:
    """After a first call, with nothing noted of it."""
    torch.set_default_dtype(torch.float32)
    found = request.param()
    with accelerated(backend="cuda", self_check=False), torch.no_grad(), poisoned_memory():
        found.module(*found.arguments())
        driver.launches.clear()
        yield found
