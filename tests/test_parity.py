"""The comparison with stock: what it finds equal, what different, and what it leaves alone."""

import dataclasses
import json

import pytest
import torch

import e3nn_accel
from e3nn_accel import parity
from e3nn_accel.criteria import (
    MOST_VIEWS,
    OF_STOCK,
    Row,
    Triple,
    exact_rows,
    gradient_rows,
    rounded_rows,
)
from e3nn_accel.errors import FallbackWarning
from e3nn_accel.quantities import Quantities
from e3nn_accel.verdict import DtypeParity, StructureParity


def quantities(energy=-3.0, forces=1.0, stress=0.1, gradient=2.0):
    return Quantities(
        energy=energy,
        interaction=energy,
        scale=abs(energy),
        forces=torch.full((4, 3), forces, dtype=torch.float64),
        stress=torch.full((3, 3), stress, dtype=torch.float64),
        gradients={"w": torch.full((5,), gradient, dtype=torch.float64)},
    )


def outcome(rows):
    return {row.quantity: row.passed for row in rows}


STOCK = quantities()


@pytest.mark.parametrize(
    ("quantity", "changed", "passes"),
    [
        ("energy", {"energy": -3.0 + 0.9e-9}, True),
        ("energy", {"energy": -3.0 + 1.1e-9}, False),
        ("forces", {"forces": 1.0 + 0.9e-8}, True),
        ("forces", {"forces": 1.0 + 1.1e-8}, False),
        ("stress", {"stress": 0.1 + 0.9e-9}, True),
        ("stress", {"stress": 0.1 + 1.1e-9}, False),
        ("gradients", {"gradient": 2.0 + 1.8e-9}, True),
        ("gradients", {"gradient": 2.0 + 2.2e-9}, False),
    ],
)
def test_float64_limits(quantity, changed, passes):
    ours = quantities(**changed)
    rows = [*exact_rows("s", ours, STOCK), *gradient_rows("s", [Triple(ours, STOCK, STOCK)], False)]
    found = outcome(rows)
    assert found.pop(quantity) is passes
    assert all(found.values())


@pytest.mark.parametrize(
    ("quantity", "name", "size", "limit"),
    [
        ("energy", "energy", -3.0, 2e-6),
        ("forces", "forces", 1.0, 2e-6),
        ("stress", "stress", 0.1, 2e-6),
        ("gradients", "gradient", 2.0, 5e-6),
    ],
)
def test_float32_limits_are_relative_or_those_of_stock(quantity, name, size, limit):
    def passes(ours, stock):
        triple = Triple(
            quantities(**{name: size * (1 + ours)}), quantities(**{name: size * (1 + stock)}), STOCK
        )
        rows = [*rounded_rows("s", [triple]), *gradient_rows("s", [triple], True)]
        return outcome(rows)[quantity]

    assert passes(0.95 * limit, 0.0)
    assert not passes(1.05 * limit, 0.0)
    assert passes(0.98 * OF_STOCK * 3 * limit, 3 * limit)
    assert not passes(1.02 * OF_STOCK * 3 * limit, 3 * limit)


def test_small_forces_are_compared_absolutely():
    tiny, off = quantities(forces=1e-5), quantities(forces=1.05e-5)
    (row,) = [r for r in rounded_rows("s", [Triple(off, tiny, tiny)]) if r.quantity == "forces"]
    assert row.unit == "eV/A"
    assert row.error == pytest.approx(12**0.5 * 5e-7)
    assert row.passed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_never_passes(bad):
    wrong = quantities(energy=bad, forces=bad, stress=bad, gradient=bad)
    rows = [
        *exact_rows("s", wrong, STOCK),
        *rounded_rows("s", [Triple(wrong, STOCK, STOCK)]),
        *rounded_rows("s", [Triple(wrong, wrong, STOCK)]),
        *gradient_rows("s", [Triple(wrong, wrong, STOCK)], True),
    ]
    assert len(rows) == 10
    assert not any(row.passed for row in rows)


def test_errors_are_pooled_over_views():
    def triple(ours, stock):
        return Triple(quantities(forces=1 + ours), quantities(forces=1 + stock), STOCK)

    rows = rounded_rows("s", [triple(3e-6, 4e-6), triple(4e-6, 3e-6)])
    (row,) = [row for row in rows if row.quantity == "forces"]
    assert row.error == pytest.approx(12.5**0.5 * 1e-6)
    assert row.stock_error == pytest.approx(12.5**0.5 * 1e-6)


# ---- a real model, small


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("mace")
    from e3nn_accel.cli.shapes import build

    model = build("tiny")
    model.scale_shift.scale.fill_(1000.0)  # energies and forces as large as a real model's
    return model


@pytest.fixture(scope="module")
def structures(model):
    from e3nn_accel.structures import random_crystal

    return [random_crystal(model, 12)]


@pytest.mark.mace
@pytest.mark.parametrize(
    ("dtype", "views", "first", "measured"),
    [
        ("float32", None, 0.9, [None]),
        ("float32", None, 1.5, [None, MOST_VIEWS]),
        ("float32", None, 4.5, [None]),
        ("float32", None, float("nan"), [None]),
        ("float32", 2, 1.5, [2]),
        ("float64", None, 1.5, [None]),
    ],
)
def test_what_is_a_little_too_far_off_is_measured_more_often(
    model, structures, monkeypatch, dtype, views, first, measured
):
    """In float32, where nothing else was asked for; what is found then counts."""
    found = []

    class Measurement(parity._Comparison):
        def run(self, names, graphs):
            found.append(self.options.views)
            error = first if len(found) == 1 else 0.8
            row = Row("stress", "s", "relative", error, 0.5, 1.0, 1.0)
            return DtypeParity(dtype, (StructureParity("s", 1, 1, (row,)),), 0, 0, ())

    monkeypatch.setattr(parity, "_Comparison", Measurement)
    result = parity.compare(model, structures, (dtype,), views=views)
    assert found == measured
    assert result.passed is (len(found) == 2 or first < 1)


def test_an_accelerated_model_passes_in_both_dtypes_with_gradients(model, structures):
    from e3nn_accel.parity import compare

    before = {name: p.clone() for name, p in model.state_dict().items()}
    parity = compare(model, structures, train=True)
    assert not [row for row in parity.rows if not row.passed]
    for dtype in parity.dtypes:
        assert dtype.modules == dtype.accelerated == 16
        assert not dtype.fallbacks
        kinds = {row.quantity for row in dtype.rows}
        assert kinds == {
            "energy",
            "forces",
            "stress",
            "rotated energy",
            "rotated forces",
            "gradients",
        }
        gradients = [row for row in dtype.rows if row.quantity == "gradients"]
        assert len(gradients) == len(list(model.parameters()))
    # the float32 rows are measured against float64, so stock has an error of its own there
    assert all(row.stock_error > 0 for row in parity.dtypes[1].rows if row.quantity == "forces")
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.mace
def test_the_process_is_left_as_it_was(model, structures):
    from e3nn import o3

    from e3nn_accel.parity import compare

    before = dict(o3.Linear.__dict__)
    generator = torch.get_rng_state()
    compare(model, structures, ["float64"])
    assert dict(o3.Linear.__dict__) == before
    assert not e3nn_accel.is_enabled()
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.mace
def test_stock_results_are_stock_while_enabled(model, structures, wrong_linear):
    """In a process that is accelerated already the reference must not be ours."""
    from e3nn_accel.parity import compare

    with e3nn_accel.enabled(self_check=False):
        parity = compare(model, structures, ["float64"])
    assert not parity.passed


@pytest.fixture
def wrong_linear(monkeypatch):
    """The torch backend's linear, with one path's weights off by a thousandth."""
    from e3nn_accel.backends.torch import linear

    right = linear.plan

    def plan(descriptor, *args):
        first = dataclasses.replace(
            descriptor.paths[0], path_weight=descriptor.paths[0].path_weight * 1.001
        )
        return right(dataclasses.replace(descriptor, paths=(first, *descriptor.paths[1:])), *args)

    monkeypatch.setattr(linear, "plan", plan)


@pytest.mark.parametrize("misses", [1e-4, 1e-3], ids=["stock in another", "stock in none"])
def test_rotations_are_pooled_in_float32(misses):
    """One in which ours is unlucky says little; one beyond what stock misses on average does."""
    from e3nn_accel.criteria import rotated_rows
    from e3nn_accel.parity import random_rotation
    from e3nn_accel.quantities import Quantities

    def result(turn, error):
        forces = (torch.ones(2, 3, dtype=torch.float64) @ turn.T) * (1 + error)
        return Quantities(error, error, 1.0, forces, None)

    rotations = [random_rotation(seed) for seed in range(4)]
    as_is = (result(torch.eye(3, dtype=torch.float64), 0.0),) * 2
    errors = [(misses, 0.0), (0.0, 1e-4), (0.0, 0.0), (0.0, 0.0)]
    turned = [
        (result(turn, ours), result(turn, stock))
        for turn, (ours, stock) in zip(rotations, errors, strict=True)
    ]
    rows = list(rotated_rows("", as_is, rotations, turned, rounded=True))
    assert [row.error for row in rows] == pytest.approx([misses / 2] * 2)
    assert [row.stock_error for row in rows] == pytest.approx([1e-4 / 2] * 2)
    assert [row.passed for row in rows] == [misses == 1e-4] * 2


@pytest.mark.mace
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_wrong_plan_is_found(model, structures, wrong_linear, monkeypatch, dtype):
    from e3nn_accel.parity import compare

    monkeypatch.setenv("E3NN_ACCEL_SELF_CHECK", "0")
    parity = compare(model, structures, [dtype], train=True, views=1)
    assert not parity.passed
    assert parity.verdict.startswith("FAILED")
    failed = {row.quantity for row in parity.rows if not row.passed}
    assert {"energy", "forces", "stress", "gradients"} <= failed
    # equivariance survives a wrong weight: that row says what is wrong, not that something is
    assert not {"rotated energy", "rotated forces"} & failed


@pytest.mark.mace
def test_the_self_check_keeps_a_wrong_plan_out(model, structures, wrong_linear):
    from e3nn_accel.parity import compare

    with pytest.warns(FallbackWarning, match="gives up a plan"):
        parity = compare(model, structures, ["float64"])
    assert parity.passed
    (dtype,) = parity.dtypes
    linears = [path for path, m in model.named_modules() if type(m).__name__ == "Linear"]
    assert {row.path for row in dtype.fallbacks} == {*linears}
    assert dtype.accelerated == dtype.modules - len(linears)
    assert all("self-check" in row.detail for row in dtype.fallbacks)


@pytest.mark.slow
@pytest.mark.mace
def test_a_precision_that_was_asked_for_is_no_excuse(model, structures, monkeypatch):
    """Its error is told, and held against what float32 is allowed."""
    from e3nn_accel.backends.torch import TorchBackend
    from e3nn_accel.parity import compare

    monkeypatch.setenv("E3NN_ACCEL_PRECISION", "bf16")
    (dtype,) = compare(model, structures[:1], ["float32"]).dtypes
    assert dtype.passed
    assert "bf16 was asked for, but nothing here" in dtype.cost

    right = TorchBackend.plan

    def rounded(self, descriptor, context):
        plan = right(self, descriptor, context)
        if type(descriptor).__name__ != "LinearDescriptor" or context.dtype != torch.float32:
            return plan
        run = lambda x, *given: plan.run(x.bfloat16().float(), *given)  # noqa: E731
        return dataclasses.replace(plan, run=run, rounded_to=context.config.precision)

    monkeypatch.setattr(TorchBackend, "plan", rounded)
    parity = compare(model, structures[:1], views=1)
    exact, single = parity.dtypes
    assert exact.passed
    assert not exact.cost
    assert not single.passed
    assert not single.fallbacks  # the self-check takes it
    assert single.cost.startswith("bf16, as asked for: forces off by")
    assert "beyond float32's tolerance of" in single.cost
    assert f'"cost": "{single.cost}"' in parity.to_json()


@pytest.mark.mace
def test_a_plan_that_is_not_equivariant_is_found(model, structures, monkeypatch):
    """Without comparing with stock: a vector component that is favoured."""
    from e3nn_accel.backends.torch import linear
    from e3nn_accel.parity import compare

    right = linear.plan

    def plan(descriptor, *args):
        strategy, run = right(descriptor, *args)
        return (
            strategy,
            lambda x, *weights: (
                run(x, *weights)
                * torch.linspace(1, 1.01, sum(m.dim for m in descriptor.irreps_out), dtype=x.dtype)
            ),
        )

    monkeypatch.setattr(linear, "plan", plan)
    monkeypatch.setenv("E3NN_ACCEL_SELF_CHECK", "0")
    parity = compare(model, structures, ["float64"])
    assert {"rotated energy", "rotated forces"} <= {r.quantity for r in parity.rows if not r.passed}


@pytest.mark.mace
def test_json_has_everything_even_if_a_number_is_not_finite(model, structures):
    from e3nn_accel.parity import compare

    parity = compare(model, structures, ["float64"])
    document = json.loads(parity.to_json())
    rows = document["dtypes"][0]["structures"][0]["rows"]
    assert document["passed"] is True
    assert [row["quantity"] for row in rows] == [row.quantity for row in parity.rows]
    (dtype,) = parity.dtypes
    (structure,) = dtype.structures
    broken = dataclasses.replace(structure.rows[0], error=float("nan"))
    structure = dataclasses.replace(structure, rows=(broken, *structure.rows[1:]))
    dtype = dataclasses.replace(dtype, structures=(structure,))
    document = json.loads(dataclasses.replace(parity, dtypes=(dtype,)).to_json())
    assert document["passed"] is False
    assert document["dtypes"][0]["structures"][0]["rows"][0]["error"] is None


@pytest.mark.mace
def test_structures_with_foreign_elements_are_refused(model):
    import ase.build

    from e3nn_accel.parity import compare
    from e3nn_accel.structures import InputError

    with pytest.raises(InputError, match="doesn't know Au"):
        compare(model, [ase.build.bulk("Au")])


@pytest.mark.mace
def test_an_atom_without_neighbours(model):
    """No edges at all, and no forces to be relative to."""
    import ase

    from e3nn_accel.parity import compare

    parity = compare(model, [ase.Atoms("H")], train=True)
    assert parity.passed, parity.verdict
    assert parity.dtypes[0].structures[0].edges == 0


@pytest.mark.mace
def test_models_from_before_there_were_heads(model, structures):
    import copy

    from e3nn_accel.structures import batch_of

    old = copy.deepcopy(model)
    del old.heads
    new = batch_of(model, structures[0])
    assert {k: v.tolist() for k, v in batch_of(old, structures[0]).items()} == {
        k: v.tolist() for k, v in new.items()
    }


@pytest.mark.mace
def test_default_structures_are_the_same_each_time_and_of_the_models_elements(model):
    from e3nn_accel.structures import default_structures, elements_of

    first, again = default_structures(model), default_structures(model)
    assert [a.positions.tolist() for a in first] == [a.positions.tolist() for a in again]
    assert first[0].pbc.all()
    assert not first[1].pbc.any()
    assert {*first[0].numbers.tolist()} == {*elements_of(model)}
    assert min(first[0].get_all_distances(mic=True)[~torch.eye(27, dtype=bool).numpy()]) > 0.8
