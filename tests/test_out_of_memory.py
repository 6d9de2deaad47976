"""A device that is full: torch's own exception or stock's result, and the next call is accelerated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_kernels import HostCompiler
from host_launch import LibraryKernel
from small_models import (
    build,
    energy_and_forces,
    inputs_of,
    mace,
    molecules,
    same,
    value_and_gradients,
)

import e3nn_accel
from e3nn_accel import selfcheck
from e3nn_accel.backends.cuda import CudaBackend
from e3nn_accel.backends.torch import TorchBackend
from e3nn_accel.interception import suspend

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eager_e3nn", "float64")]

Full = torch.cuda.OutOfMemoryError


class Memory:
    """Launches count down; one of them finds no memory left."""

    def __init__(self) -> None:
        self.launches = 0
        self.fails_at: int | None = None

    def launch(self) -> None:
        """One more."""
        self.launches += 1
        if self.launches == self.fails_at:
            raise Full("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def memory(kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Of the device that the kernels on the host stand for."""
    found = Memory()
    launch = LibraryKernel.__call__

    def counted(kernel: LibraryKernel, *args: Any, **kwargs: Any) -> None:
        found.launch()
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(LibraryKernel, "__call__", counted)
    return found


def backends() -> set[str]:
    """Which ones the calls of the report ran on."""
    return {row.backend for row in e3nn_accel.report().rows}


def one_after_the_other(
    memory: Memory, run: Callable[[], Any], expected: Any, step: int = 1
) -> tuple[int, int]:
    """Let each launch of a run fail once: how often that was torch's error, and how often stock took over."""
    run()  # which includes the self-checks
    memory.launches, memory.fails_at = 0, None
    same(run(), expected, 1e-10)
    launches, errors = memory.launches, 0
    numbers = range(1, launches + 1, step)
    for number in numbers:
        memory.launches, memory.fails_at = 0, number
        try:
            same(run(), expected, 1e-10)
        except Full:
            errors += 1
        memory.launches, memory.fails_at = 0, None
        same(run(), expected, 1e-10)
        assert memory.launches == launches, "a plan was given up"
    return errors, len(numbers) - errors


@pytest.mark.parametrize("name", ["Linear", "TensorProduct", "ElementwiseTensorProduct"])
def test_every_launch(memory: Memory, name: str) -> None:
    """Forward, stock takes over, which may need less; backward, it is torch's error. No plan is given up."""
    module = build(name)
    inputs = [x.requires_grad_(True) for x in inputs_of(module)]
    expected = value_and_gradients(module, *inputs)
    e3nn_accel.enable()
    errors, stock = one_after_the_other(
        memory, lambda: value_and_gradients(module, *inputs), expected
    )
    assert errors
    assert stock
    assert backends() == {"cuda", "e3nn"}


@pytest.mark.mace
@pytest.mark.slow
def test_launches_of_a_mace(memory: Memory) -> None:
    """Energy and forces of a whole model: some of its launches."""
    pytest.importorskip("mace")
    model, batch = mace(), molecules(1)
    expected = energy_and_forces(model, batch)
    e3nn_accel.enable()
    errors, stock = one_after_the_other(
        memory, lambda: energy_and_forces(model, batch), expected, step=9
    )
    assert errors
    assert stock


def test_stock_finds_no_room_either(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own exception, from its own forward, and the next call is accelerated."""
    module = build("Linear")
    inputs = inputs_of(module)
    e3nn_accel.enable()
    expected = module(*inputs)
    forward = torch.nn.Module.__call__

    def full(*args: Any, **kwargs: Any) -> Any:
        raise Full("stock's")

    monkeypatch.setattr(torch.nn.Module, "__call__", full)
    memory.launches, memory.fails_at = 0, 1
    with pytest.raises(Full, match="stock's"):
        module(*inputs)
    monkeypatch.setattr(torch.nn.Module, "__call__", forward)
    same(module(*inputs), expected, 0)
    assert memory.launches == 2


def test_strict_raises_torchs_error(memory: Memory) -> None:
    """And no plan is given up for it."""
    module = build("Linear")
    inputs = inputs_of(module)
    e3nn_accel.enable(strict=True)
    expected = module(*inputs)
    memory.launches, memory.fails_at = 0, 1
    with pytest.raises(Full):
        module(*inputs)
    same(module(*inputs), expected, 0)


def fail_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, for which there is no memory when it is first called."""
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise Full("CUDA out of memory")
        return function(*args, **kwargs)

    return failing


PLACES = {
    "planning": (CudaBackend, "plan"),
    "planning in torch operations": (TorchBackend, "plan"),
    "self-check, stock": (selfcheck, "_stock"),
    "self-check, plan": (selfcheck, "operands"),
    "self-check, gradients": (selfcheck, "_stock_gradients"),
}


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("place", PLACES)
def test_full_at_the_first_call(
    kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch, place: str, strict: bool
) -> None:
    """It says nothing about the plan, which is made at the next call."""
    module = build("Linear")
    inputs = inputs_of(module)
    with suspend():
        expected = module(*inputs)
    if "torch" in place:
        monkeypatch.setattr(CudaBackend, "device_type", "cuda")
    owner, name = PLACES[place]
    monkeypatch.setattr(owner, name, fail_once(getattr(owner, name)))
    e3nn_accel.enable(strict=strict)
    if strict:
        with pytest.raises(Full):
            module(*inputs)
    else:
        same(module(*inputs), expected, 0)
        (row,) = e3nn_accel.report().rows
        assert row.backend == "e3nn"
        assert "CUDA out of memory" in row.detail
    same(module(*inputs), expected, 1e-12)
    assert backends() - {"e3nn"} == {"torch" if "torch" in place else "cuda"}
