"""Linears by halves that begin before weights are cut, on the CPU, where these are there once they are waited for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import accelerated, draw
from e3nn import o3
from host_kernels import HostCompiler
from host_launch import LibraryKernel
from kernel_barriers import barriers, without
from linear_parity import built
from mace_parts import node_attrs

from e3nn_accel import branches
from e3nn_accel.backends.cuda import indexed_linear_launch
from e3nn_accel.backends.cuda.linear_in_halves import LinearInHalves

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]
ROWS = 70
WAIT = r"wait_for_end_of_last\(\);"
Call = Callable[[], torch.Tensor]


class WrittenByLast(ctypes.Structure):
    """Of tests/host/overlapping.h."""

    _fields_ = (
        ("to", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("bytes", ctypes.c_ulong),
        ("waits", ctypes.c_ulong),
    )


class Late:
    """A kernel in each of whose blocks W's halves are NaN until a thread waits for them."""

    def __init__(self, kernel: LibraryKernel, waits: list[int]) -> None:
        self.kernel, self.waits = kernel, waits

    def __call__(self, *given: Any, **how: Any) -> None:
        assert how["overlapping"]
        halves = given[-3]
        there = halves.clone()
        written = WrittenByLast.in_dll(ctypes.CDLL(str(self.kernel.path)), "written_by_last")
        written.to, written.source = halves.data_ptr(), there.data_ptr()
        written.bytes, written.waits = halves.nbytes, 0
        self.kernel(*given, **how)
        self.waits.append(written.waits)
        written.bytes = 0


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of however few rows."""
    monkeypatch.setattr(indexed_linear_launch, "architecture_of", lambda device: 90)
    monkeypatch.setattr(indexed_linear_launch, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(indexed_linear_launch, "FEW_BLOCKS", -1)
    monkeypatch.setattr(indexed_linear_launch, "least_rows", lambda species: 0)


def linear(irreps_in: str, irreps_out: str) -> Call:
    module = built(irreps_in, irreps_out).float()
    x = draw((ROWS, module.irreps_in.dim), 3, torch.float32)
    return lambda: module(x)


def gradient(irreps_in: str, irreps_out: str) -> Call:
    module = built(irreps_in, irreps_out).float()
    x = draw((ROWS, module.irreps_in.dim), 3, torch.float32).requires_grad_()
    out = draw((ROWS, module.irreps_out.dim), 4, torch.float32)
    return lambda: torch.autograd.grad(module(x), x, out)[0]


def skip_connection(attrs: torch.Tensor) -> Call:
    module = o3.FullyConnectedTensorProduct("32x1o", f"{attrs.shape[1]}x0e", "32x1o").float()
    x = draw((ROWS, 96), 3, torch.float32)
    return lambda: module(x, attrs.float())


CASES: dict[str, Callable[[], Call]] = {
    "blocks that stay, scalars": lambda: linear("128x0e", "128x0e"),
    "blocks that stay, vectors": lambda: linear("128x1o", "256x1o"),
    "blocks that stay, of both": lambda: gradient("128x0e+128x1o", "128x0e+128x1o"),
    "a tile each, scalars": lambda: linear("64x0e", "64x0e"),
    "a tile each, parts of steps and tiles": lambda: linear("40x0e+20x1o", "20x0e+36x1o"),
    "a tile each, to the input": lambda: gradient("40x1o", "36x1o"),
    "by species": lambda: skip_connection(node_attrs("all species", ROWS)),
    "of several species each": lambda: skip_connection(draw((ROWS, 4), 5)),
    "of no species": lambda: skip_connection(torch.zeros(ROWS, 4)),
}


def found(
    call: Call, late: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, list[int]]:
    """The result, and how often each launch waited."""
    waits: list[int] = []
    rows = LinearInHalves.rows

    def with_late_weights(self: Any, kernels: Any, *rest: Any) -> torch.Tensor:
        return rows(self, (kernels[0], Late(kernels[1], waits)), *rest)

    with monkeypatch.context() as patch, accelerated(backend="cuda", self_check=False):
        if late:
            patch.setattr(LinearInHalves, "rows", with_late_weights)
        out = call().detach()
    return out, waits


@pytest.mark.parametrize("case", CASES)
def test_weights_are_waited_for(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are read, in each block; by each launch, even where nothing of them is read."""
    call = CASES[case]()
    expected, _ = found(call, False, monkeypatch)
    out, waits = found(call, True, monkeypatch)
    assert torch.equal(out, expected)
    assert waits
    assert all(waits)


FILES = {
    "linear_in_halves.cu": ["a tile each, scalars", "of no species"],
    "linear_in_halves_staged.cu": ["blocks that stay, vectors"],
}


@pytest.mark.parametrize(
    ("file", "wait"), [(file, n) for file in FILES for n in barriers(file, WAIT)]
)
def test_a_missing_wait_shows(
    file: str, wait: int, kernels_on_host: HostCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each, in one of the cases or another."""
    kernels_on_host.change = without(file, wait, WAIT)
    shown = []
    for case in FILES[file]:
        call = CASES[case]()
        expected, _ = found(call, False, monkeypatch)
        out, waits = found(call, True, monkeypatch)
        shown.append(not torch.equal(out, expected) or not all(waits))
    assert any(shown)


def test_not_where_another_stream_cuts_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last kernel of this one may have made the rows."""
    overlapping: list[bool] = []
    launch = LibraryKernel.__call__

    def noted(self: Any, *given: Any, **how: Any) -> None:
        overlapping.append(how.get("overlapping", False))
        launch(self, *given, **how)

    call = linear("64x0e", "64x0e")
    monkeypatch.setattr(LibraryKernel, "__call__", noted)
    found(call, False, monkeypatch)
    assert overlapping == [False, True]
    monkeypatch.setattr(branches, "begun", lambda find, of: branches.Early(find()))
    monkeypatch.setitem(branches.branches_of_streams, "a stream", "its branches")  # type: ignore[misc]
    found(call, False, monkeypatch)
    assert overlapping[2:] == [False, False]
