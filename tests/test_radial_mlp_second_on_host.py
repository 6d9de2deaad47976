"""Second derivatives of the radial MLP's kernels on the CPU, as training on forces takes them, against stock e3nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import accelerated, draw, poisoned_memory
from host_kernels import HostCompiler
from radial_parity import CASES, Net, compare_of_forces, of_forces
from slow_cases import slow_but

from e3nn_accel.backends.cuda.radial_mlp_kernels import RadialMlpKernels

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]

OF_FORCES = [case for case in CASES if CASES[case].widths[1:-1] and "too" not in case]


def asked_of_second(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """What the kernel of second derivatives is asked for, filled as it is called."""
    asked: list[tuple[bool, ...]] = []
    original = RadialMlpKernels.second

    def second(self: Any, g: Any, x: Any, h: Any, weights: Any, wanted: tuple[bool, ...]) -> Any:
        asked.append(wanted)
        return original(self, g, x, h, weights, wanted)

    monkeypatch.setattr(RadialMlpKernels, "second", second)
    return asked


@pytest.mark.parametrize("case", slow_but(OF_FORCES, "MACE", "odd widths"))
@pytest.mark.parametrize("rows", slow_but([0, 1, 300], 300))
def test_second_derivatives(case: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_of_second(monkeypatch)
    compare_of_forces(case, torch.float64, rows)
    assert len(asked) == 1


@pytest.mark.parametrize("case", slow_but(["MACE", "odd widths", "wider than a tile"], "MACE"))
def test_second_derivatives_in_single_precision(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_of_second(monkeypatch)
    compare_of_forces(case, torch.float32, 300)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "wanted", slow_but(["x", "g", "layer0", "layer1", "x layer2", "g layer0"], "x", "g layer0")
)
def test_only_the_second_derivatives_that_are_asked_for(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_of_second(monkeypatch)
    compare_of_forces("MACE", torch.float64, 70, wanted)
    ((of_g, _, *of_weights),) = asked  # x was asked for before, and is taken for wanted since
    assert of_weights == [name in wanted for name in ("layer0", "layer1", "layer2")]
    assert of_g == ("g" in wanted or "layer3" in wanted)


@pytest.mark.parametrize(
    "act", slow_but([torch.nn.functional.silu, torch.tanh, torch.sigmoid], torch.nn.functional.silu)
)
def test_by_finite_differences(act: Any) -> None:
    """Forces of whatever the gradient by x alone is made of; curvatures of each activation."""
    module = Net((3, 5, 4, 6), act).build()
    x, g = draw((6, 3), 3).requires_grad_(), draw((6, 6), 4).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def gradient(x: torch.Tensor, g: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, weights, strict=True))
        out = torch.func.functional_call(module, given, (x,))
        (found,) = torch.autograd.grad(out, x, g, create_graph=True)
        return found

    with accelerated(self_check=False, backend="cuda"):
        assert torch.autograd.gradcheck(gradient, (x, g, *module.parameters()))


def test_the_same_bits_again() -> None:
    """A block has several tiles: sums have a fixed order."""
    module = Net((8, 64, 64, 12)).build().float()
    x, g = (draw((500, width), 1, torch.float32).requires_grad_() for width in (8, 12))
    with accelerated(self_check=False, backend="cuda"), poisoned_memory():
        first, again = (of_forces(module, x, g, "") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(
    sanitizer: str, dtype: torch.dtype, kernels_on_host: HostCompiler
) -> None:
    """Races; reads and writes beyond the end, in shared memory too; undefined arithmetic."""
    kernels_on_host.sanitizer = sanitizer
    compare_of_forces("odd widths", dtype, 150)
