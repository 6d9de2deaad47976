"""Products in tf32 and bf16, which have to be asked for, by kernels on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import radial_parity
import torch
from comparison import accelerated, draw, usage
from linear_parity import built
from precision_parity import ERRORS, IRREPS, errors, linear, skip
from slow_cases import slow_but

import e3nn_accel
from e3nn_accel import selfcheck
from e3nn_accel.config import Precision

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("eager_e3nn", "float64", "kernels_on_host"),
]


@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize("make", slow_but([linear, skip], linear))
def test_errors_are_those_of_the_format(make: Any, precision: Precision) -> None:
    module, inputs = make()
    least, most = ERRORS[precision]
    for name, error in errors(module, inputs, torch.float32, precision=precision).items():
        # second derivatives round what was rounded before
        assert least < error < 2 * most, (name, error)


@pytest.mark.parametrize("make", slow_but([linear, skip], linear))
def test_float32_stays_float32_and_float64_is_never_rounded(make: Any) -> None:
    module, inputs = make()
    assert max(errors(module, inputs, torch.float32).values()) < 2e-6
    assert max(errors(module, inputs, torch.float64, precision="bf16").values()) < 1e-12


@pytest.mark.parametrize("precision", ERRORS)
def test_what_is_not_finite_stays_so(precision: Precision) -> None:
    module, (x,) = linear()
    module, x = module.float(), x.float()
    x[3, 0], x[5, 1] = float("inf"), float("nan")
    x[7].view(torch.int32)[2] = 0x7FFFFFFF  # a NaN whose bits are all set
    with accelerated(backend="cuda", precision=precision), torch.no_grad():
        finite = torch.isfinite(module(x))
    assert finite[:, :40].all(1).tolist() == [n not in (3, 5, 7) for n in range(70)]
    assert not finite[[3, 5, 7], :40].any()


def test_the_plan_says_so() -> None:
    module, (x,) = linear()
    module, x = module.float(), x.float()
    with accelerated(backend="cuda", precision="tf32"):
        module(x)
        assert "products in tf32" in str(e3nn_accel.report())
        assert "products in tf32" in str(e3nn_accel.explain(module))
    with accelerated(backend="cuda"):
        module(x)
        assert "products in" not in str(e3nn_accel.explain(module))


@pytest.mark.parametrize("precision", ERRORS)
def test_the_self_check_still_finds_a_wrong_number(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All results too large by what the format is allowed, and half as much again."""
    from e3nn_accel.backends.cuda import linear as plans

    right = plans.weighted
    factor = 1 + 1.5 * selfcheck.ROUNDED[precision]
    monkeypatch.setattr(plans, "weighted", lambda x, w, call: right(x, w, call) * factor)
    module, (x,) = linear()
    module, x = module.float(), x.float()
    refused = pytest.raises(e3nn_accel.AccelError, match="self-check: value differs")
    with accelerated(backend="cuda", precision=precision), refused:
        with pytest.warns(e3nn_accel.FallbackWarning, match="self-check"):
            module(x)


def test_models_of_different_precision_share_nothing() -> None:
    one, (x,) = linear()
    one, other, x = one.float(), built(IRREPS, "40x0e+17x1o").float(), x.float()
    e3nn_accel.accelerate(one, precision="bf16", backend="cuda")
    e3nn_accel.accelerate(other, backend="cuda")
    with torch.no_grad():
        rounded, exact = one(x), other(x)
    assert 8e-4 < float((rounded - exact).norm() / exact.norm()) < 5e-3


def test_the_last_layer_of_a_radial_mlp() -> None:
    """The only one that is rounded; there is nothing to gain by the others."""
    module = radial_parity.CASES["MACE"].build()
    x = draw((70, module.hs[0]), 3)
    with torch.no_grad():
        exact = module(x)
        module, x = module.float(), x.float()
        with accelerated(backend="cuda", precision="tf32"):
            found = module(x)
            assert set(usage(module)) == {("radial_mlp", "cuda")}
            assert "its products in tf32" in str(e3nn_accel.report())
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 6e-4
