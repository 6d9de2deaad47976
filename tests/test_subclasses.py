"""Subclasses of intercepted classes: accelerated if they keep e3nn's forward, else left alone."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from comparison import assert_ran_on_torch, usage
from e3nn import o3
from small_models import build, inputs_of, same

import e3nn_accel
from e3nn_accel import switch

OWN = "it has a forward of its own"


class PlainSubclass(o3.Linear):
    """A constructor of its own and nothing else, as graph-pes has it."""

    def __init__(self, channels: int, *, degree: int = 1) -> None:
        super().__init__(f"{channels}x0e+{channels}x{degree}o", f"{channels}x0e", biases=True)
        self.channels = channels


class Doubled(o3.Linear):
    """A forward of its own that uses e3nn's."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(features)


class Shouting(o3.Linear):
    """A call of its own around e3nn's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.heard = getattr(self, "heard", 0) + 1
        return super().__call__(*args, **kwargs) + 1


class Grandchild(PlainSubclass):
    """A subclass of a subclass."""


def reason_of(module: torch.nn.Module) -> str:
    """Why the last call of a module ran on stock e3nn."""
    assert switch.active.dispatcher is not None
    [(_, backend, reason)] = switch.active.dispatcher.runners[module].usage
    assert backend == "e3nn"
    return reason


@pytest.mark.parametrize("cls", [PlainSubclass, Grandchild])
def test_without_a_forward_of_its_own(cls: type[PlainSubclass]) -> None:
    """Accelerated, whether the instance was built before or after enabling."""
    early = cls(3)
    inputs = inputs_of(early)
    expected = early(*inputs)
    e3nn_accel.enable(strict=True)
    late = cls(3, degree=2)
    late(*inputs_of(late))
    same(early(*inputs), expected)
    for module in (early, late):
        assert_ran_on_torch(module, "linear", 1)
        assert module.channels == 3


def test_a_class_defined_while_enabled() -> None:
    """It inherits the wrapped constructor and call, and outlives disabling."""
    e3nn_accel.enable()

    class Late(o3.Linear):
        def __init__(self, irreps: str) -> None:
            super().__init__(irreps, irreps)

    module = Late("2x0e+2x1o")
    inputs = inputs_of(module)
    ours = module(*inputs)
    assert_ran_on_torch(module, "linear", 1)
    e3nn_accel.disable()
    same(ours, module(*inputs))
    assert Late("3x0e")(torch.ones(3)).shape == (3,)
    e3nn_accel.enable()
    module(*inputs)
    assert_ran_on_torch(module, "linear", 1)


def test_a_forward_of_its_own_runs() -> None:
    """A subclass that overrides forward computes what it always did, and the report says why."""
    module = Doubled("4x0e+3x1o", "2x0e")
    inputs = inputs_of(module)
    expected = module(*inputs)
    e3nn_accel.enable()
    assert torch.equal(module(*inputs), expected)
    assert reason_of(module) == OWN
    [row] = e3nn_accel.report().rows
    assert (row.cls, row.backend, row.detail) == ("Doubled", "e3nn", OWN)


def test_an_instance_with_a_forward_of_its_own() -> None:
    """As MACE's converters set it on instances: it wins; removed, the plan is back."""
    module: Any = build("Linear")
    inputs = inputs_of(module)
    expected = module(*inputs)
    e3nn_accel.enable()
    module.forward = types.MethodType(lambda self, x: torch.zeros(7), module)
    assert torch.equal(module(*inputs), torch.zeros(7))
    assert reason_of(module) == OWN
    del module.forward
    same(module(*inputs), expected)
    assert usage(module)["linear", "torch"] == 1


@pytest.mark.parametrize("before", [True, False], ids=["before enabling", "while enabled"])
def test_a_forward_patched_on_the_class(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone else's patch of the class is respected, whoever came first."""

    def patched(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.full((2,), 7.0)

    module = build("Linear")
    with monkeypatch.context() as patch:
        if before:
            patch.setattr(o3.Linear, "forward", patched)
        e3nn_accel.enable()
        patch.setattr(o3.Linear, "forward", patched)
        assert torch.equal(module(*inputs_of(module)), torch.full((2,), 7.0))
        assert reason_of(module) == OWN
        assert torch.equal(build("Linear")(*inputs_of(module)), torch.full((2,), 7.0))


def test_a_call_of_its_own_goes_around_ours() -> None:
    """A subclass's own call runs once, and finds the plan inside."""
    module = Shouting("4x0e", "2x0e")
    inputs = inputs_of(module)
    expected = module(*inputs)
    e3nn_accel.enable()
    same(module(*inputs), expected)
    assert module.heard == 2
    assert_ran_on_torch(module, "linear", 1)


def test_a_mixin_before_the_class() -> None:
    """A cooperative mixin's call and constructor both run."""

    class Counting(torch.nn.Module):
        def __init__(self, *args: Any, tag: str, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.tag = tag

    class Mixed(Counting, o3.Linear):
        pass

    module = Mixed("4x0e", "2x0e", tag="mixed")
    inputs = inputs_of(module)
    expected = module(*inputs)
    e3nn_accel.enable()
    twin = Mixed("4x0e", "2x0e", tag="late")
    twin(*inputs)
    same(module(*inputs), expected)
    assert (module.tag, twin.tag) == ("mixed", "late")
    assert_ran_on_torch(module, "linear", 1)


def test_constructors_take_all_their_arguments() -> None:
    """Positional and keyword arguments and errors of the wrapped constructors are e3nn's."""

    def construct() -> list[Any]:
        linear = o3.Linear(
            "2x0e",
            "3x0e",
            f_in=2,
            f_out=3,
            internal_weights=True,
            shared_weights=True,
            instructions=[(0, 0)],
            biases=[True],
            path_normalization="path",
        )
        product = o3.TensorProduct(
            "2x0e",
            "1x0e",
            "2x0e",
            [(0, 0, 0, "uvu", True, 0.5)],
            [1.0],
            None,
            out_var=[2.0],
            irrep_normalization="norm",
            path_normalization="none",
            internal_weights=False,
            shared_weights=False,
            compile_left_right=True,
            compile_right=True,
        )
        shapes = [linear.weight.shape, linear.bias.shape, product.weight_numel]
        for wrong in (lambda: o3.Linear("1x0e"), lambda: o3.Linear("1x0e", "1x0e", biasses=True)):
            with pytest.raises(TypeError) as error:
                wrong()
            shapes.append(str(error.value))
        return [*shapes, product.right(torch.ones(1, 1), torch.ones(1, 2)).tolist()]

    stock = construct()
    e3nn_accel.enable()
    assert construct() == stock


def test_subclasses_within_e3nn() -> None:
    """The constructor of a subclass runs its base's: the module is seen once all the same."""
    e3nn_accel.enable()
    module = build("FullyConnectedTensorProduct")
    module(*inputs_of(module))
    assert_ran_on_torch(module, "tensor_product", 1)
    [row] = e3nn_accel.report().rows
    assert (row.cls, row.modules) == ("FullyConnectedTensorProduct", 1)
    assert "1 modules seen, 1 called" in e3nn_accel.report().heading
