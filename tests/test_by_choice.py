"""Targets that one backend alone is faster for: elsewhere stock e3nn has them, and nothing makes a fuss of it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable

import pytest
import torch
from e3nn import o3
from small_models import build

import e3nn_accel
from e3nn_accel import builtins, hookimpl
from e3nn_accel.descriptor import (
    Descriptor,
    LinearDescriptor,
    LinearPath,
)
from e3nn_accel.errors import AccelError
from e3nn_accel.hookspecs import Call, Target
from e3nn_accel.irreps import MulIr
from e3nn_accel.plan import Availability

pytestmark = pytest.mark.once


class Doubled(torch.nn.Module):
    """Some package's module, with the fields of a Linear that the self-check draws inputs by."""

    internal_weights, shared_weights = True, True

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(12))
        self.bias = torch.nn.Parameter(torch.zeros(0))
        self.irreps_in = o3.Irreps("3x0e")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., 3] to [.., 4]."""
        return 2 * x @ self.weight.view(3, 4)


class Plugin:
    """A target for the cuda backend alone; reading its arguments is noted."""

    def __init__(self) -> None:
        self.bound = 0

    @hookimpl
    def e3nn_accel_targets(self) -> Iterable[Target]:
        """One class."""

        def bind(module: Doubled, x: torch.Tensor) -> Call:
            self.bound += 1
            return Call("linear", (x, module.weight, module.bias))

        path = f"{__name__}:Doubled"
        yield Target(path, bind, "linear", "pytest", ">=8", traceable=True, backend="cuda")

    @hookimpl
    def e3nn_accel_describe(self, module: torch.nn.Module, operation: str) -> Descriptor | None:
        """As a Linear with one path."""
        if not isinstance(module, Doubled):
            return None
        path = LinearPath(0, 0, (3, 4), 2.0)
        return LinearDescriptor(
            (MulIr(3, 0, 1),), (MulIr(4, 0, 1),), (path,), None, None, True, True
        )


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Plugin:
    """Registered."""
    found = Plugin()
    monkeypatch.setitem(builtins.PLUGINS, "doubled", found)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"strict": True}, {"verify": True}, {"backend": "torch"}, {"profile": True}],
    ids=str,
)
def test_stock_without_a_word(plugin: Plugin, options: dict[str, bool | str]) -> None:
    module, linear, x = Doubled(), build("Linear"), torch.randn(5, 3)
    expected = module(x)
    e3nn_accel.enable(**options)
    assert torch.equal(module(x), expected)
    assert torch.equal(module(x=x), expected)
    assert plugin.bound == 0
    assert not e3nn_accel.report().rows
    linear(torch.randn(2, linear.irreps_in.dim))
    report = e3nn_accel.report()
    assert [row.cls for row in report.rows] == ["Linear"]
    assert "1 called, 1 of 1 calls accelerated" in report.heading


def test_explain_has_a_line_and_no_row(plugin: Plugin) -> None:
    model = torch.nn.Sequential(Doubled(), Doubled(), build("Linear"))
    found = e3nn_accel.explain(model)
    assert [row.cls for row in found.rows] == ["Linear"]
    assert "1 operations, 1 accelerated, 0 on e3nn" in found.heading
    [line] = found.by_choice
    assert line.strip() == "2 Doubled on stock e3nn by choice: as fast on the CPU as any plan"
    assert str(found).endswith(line)
    assert line.strip() in found.to_json()


def test_a_backend_that_is_asked_for_must_have_it(plugin: Plugin) -> None:
    module, x = Doubled(), torch.randn(5, 3)
    e3nn_accel.enable(backend="cuda")
    with pytest.raises(AccelError, match="can't be accelerated"):
        module(x)
    assert plugin.bound == 1


@pytest.mark.usefixtures("kernels_on_host")
def test_where_the_backend_is_there_it_has_a_plan(plugin: Plugin) -> None:
    module, x = Doubled(), torch.randn(5, 3)
    expected = module(x)
    e3nn_accel.enable(strict=True)
    torch.testing.assert_close(module(x), expected)
    [row] = e3nn_accel.report().rows
    assert (row.cls, row.backend) == ("Doubled", "cuda")
    assert not e3nn_accel.explain(module).by_choice


def test_where_the_backend_is_not_available(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """As on a GPU without CuPy."""
    from e3nn_accel.backends import cuda

    request.getfixturevalue("kernels_on_host")
    monkeypatch.setattr(
        cuda.CudaBackend, "available", lambda self: Availability(False, "no CuPy here")
    )
    module, x = Doubled(), torch.randn(5, 3)
    expected = module(x)
    e3nn_accel.enable(strict=True)
    assert torch.equal(module(x), expected)
    assert not e3nn_accel.report().rows
    [line] = e3nn_accel.explain(module).by_choice
    assert line.endswith("no CuPy here")


def test_compiled(plugin: Plugin) -> None:
    """Traced as stock; strict mode doesn't complain."""
    module, x = Doubled(), torch.randn(5, 3)
    expected = module(x)
    e3nn_accel.enable(strict=True)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert not e3nn_accel.report().rows


def test_one_model_alone(plugin: Plugin) -> None:
    model = e3nn_accel.accelerate(torch.nn.Sequential(Doubled()), strict=True)
    x = torch.randn(5, 3)
    found = model(x)
    assert not e3nn_accel.report().rows
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), found)


PRODUCT = ("4x0e+4x1o", "1x0e+1x1o", "4x0e+4x1o")


def few_and_enough() -> tuple[torch.nn.Module, int]:
    """A small product, and from how many rows on it is ours."""
    torch.manual_seed(0)
    product = o3.FullyConnectedTensorProduct(*PRODUCT)
    found = e3nn_accel.explain(product).rows[0].detail
    return product, int(re.search(r"fewer than (\d+) rows", found)[1])  # type: ignore[index]


def operands(product: torch.nn.Module, *rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh ones."""
    return product.irreps_in1.randn(*rows, -1), product.irreps_in2.randn(*rows, -1)


@pytest.mark.few_rows
@pytest.mark.parametrize("strict", [False, True])
def test_products_of_few_rows(strict: bool) -> None:
    """Stock e3nn's to the bit, uncounted and no fallback; from so many rows on ours."""
    product, enough = few_and_enough()
    assert 4 < enough < 10_000
    for rows, counted in ((1, 0), (enough - 1, 0), (enough, 1)):
        x, y = operands(product, rows)
        expected = product(x, y)
        with e3nn_accel.enabled(strict=strict):
            found = product(x, y)
            report = e3nn_accel.report()
        assert sum(row.calls for row in report.rows) == counted
        assert not report.fallbacks
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert counted or torch.equal(found, expected)


@pytest.mark.few_rows
def test_rows_are_those_of_the_result() -> None:
    """Inputs may broadcast; shapes that don't fit raise as stock e3nn does."""
    product, enough = few_and_enough()
    x, y = product.irreps_in1.randn(enough, 1, -1), product.irreps_in2.randn(1, 2, -1)
    wrong = operands(product, 2)[0], operands(product, 3)[1]
    with pytest.raises(Exception) as stock:
        product(*wrong)
    with e3nn_accel.enabled():
        product(x, y)
        assert [row.calls for row in e3nn_accel.report().rows] == [1]
        with pytest.raises(type(stock.value)):
            product(*wrong)


@pytest.mark.few_rows
def test_a_backend_asked_for_by_name_has_them() -> None:
    """And so has a model's skip connection, of any number of rows."""
    product, _ = few_and_enough()
    with e3nn_accel.enabled(backend="torch"):
        product(*operands(product, 1))
        (row,) = e3nn_accel.report().rows
        assert row.backend == "torch"
        assert "fewer" not in row.detail
    skip = o3.FullyConnectedTensorProduct("4x0e+4x1o", "3x0e", "4x0e+4x1o")
    attrs = torch.eye(3)[:1]
    with e3nn_accel.enabled():
        skip(operands(skip, 1)[0], attrs)
        assert [row.backend for row in e3nn_accel.report().rows] == ["torch"]


def test_elsewhere_tests_are_of_plans() -> None:
    """What conftest.py sees to: a test of a plan with few rows would compare stock e3nn with itself."""
    product = o3.FullyConnectedTensorProduct(*PRODUCT)
    with e3nn_accel.enabled():
        product(*operands(product, 1))
        assert [row.backend for row in e3nn_accel.report().rows] == ["torch"]
