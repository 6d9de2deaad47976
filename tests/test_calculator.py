"""MACECalculator: the same batches and results, whatever is done between its calls."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_graphs import ice, replaying, water
from model_graphs import rows as model_rows
from small_models import mace

import e3nn_accel
from e3nn_accel import compat, switch
from e3nn_accel.errors import FallbackWarning
from e3nn_accel.interception import suspend
from e3nn_accel.neighbours import NEIGHBOURS
from e3nn_accel.neighbours.frame import PER_EDGE
from e3nn_accel.neighbours.pairs import SKIN, Edges, Pairs

mace_calculators = pytest.importorskip("mace.calculators")
pytestmark = [pytest.mark.mace, pytest.mark.once]

FOLDER = Path(__file__).parent.parent / "examples/water_ethanol"
ALONE = {"only": ("MACECalculator",)}
"""Nothing but the calculator: what the model computes is stock's to the bit."""


def calculator(**options: Any) -> Any:
    """Of the shipped checkpoint."""
    given = {"device": "cpu", "default_dtype": "float64", **options}
    if "models" not in given:
        given.setdefault("model_paths", str(FOLDER / "water_ethanol.model"))
    return mace_calculators.MACECalculator(**given)


def rows() -> Counter[str]:
    """How batches were made: "verlet", or MACE's reasons."""
    dispatcher = switch.active.dispatcher
    assert dispatcher is not None
    found: Counter[str] = Counter()
    for runner in dispatcher.runners.values():
        for (operation, backend, reason), usage in runner.usage.items():
            if operation == NEIGHBOURS:
                found[reason if backend == "mace" else backend] += usage.calls
    return found


def sorted_edges(batch: Any) -> dict[tuple[int, ...], list[float]]:
    """The shift of each edge, by sender, receiver and cell."""
    keys = torch.cat([batch["edge_index"].T, batch["unit_shifts"].long()], 1).tolist()
    assert len({tuple(key) for key in keys}) == len(keys)
    return dict(zip(map(tuple, keys), batch["shifts"].tolist(), strict=True))


def assert_batch_of_mace(calc: Any, atoms: Any) -> None:
    """What our batch has, MACE's has."""
    ours = calc._atoms_to_batch(atoms)
    with suspend():
        stock = calc._atoms_to_batch(atoms)
    assert type(ours) is type(stock)
    assert ours.num_graphs == stock.num_graphs == 1
    assert ours.keys == stock.keys
    for name in stock.keys:
        a, b = ours[name], stock[name]
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), name
        if name not in PER_EDGE:
            assert torch.equal(a, b), name
    found, wanted = sorted_edges(ours), sorted_edges(stock)
    assert found.keys() == wanted.keys()
    atol = 1e-12 if ours["shifts"].dtype == torch.float64 else 1e-5
    for key, shift in wanted.items():
        np.testing.assert_allclose(found[key], shift, rtol=0, atol=atol)
    assert ours.__slices__ == stock.__slices__
    assert ours.__num_graphs__ == stock.__num_graphs__


def nudge(atoms: Any, seed: int = 0) -> None:
    """As in a step of dynamics."""
    atoms.positions += np.random.default_rng(seed).uniform(-0.03, 0.03, atoms.positions.shape)


def wrap(atoms: Any) -> None:
    atoms.positions[1] += 1.5 * atoms.cell[0]
    atoms.wrap()


def strain(atoms: Any) -> None:
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.004), scale_atoms=True)


def shear_without_atoms(atoms: Any) -> None:
    cell = atoms.cell.array.copy()
    cell[0, 1] += 0.7
    atoms.set_cell(cell)


def other_elements(atoms: Any) -> None:
    atoms.numbers = atoms.numbers[::-1]


def no_longer_periodic(atoms: Any) -> None:
    atoms.pbc = [True, False, True]


def charge(atoms: Any) -> None:
    atoms.info["charge"] = atoms.info.get("charge", 0.0) + 1.0


def charges_of_atoms(atoms: Any) -> None:
    atoms.arrays["Qs"] = np.linspace(-1, 1, len(atoms))
    atoms.arrays["charges"] = np.linspace(-2, 2, len(atoms))


def weight(atoms: Any) -> None:
    atoms.info["config_weight"] = 2.5


def one_atom_less(atoms: Any) -> None:
    del atoms[-1]


def far_jump(atoms: Any) -> None:
    atoms.positions[0] += 1.7


CHANGES: list[Callable[[Any], None]] = [
    nudge, wrap, strain, shear_without_atoms, other_elements, no_longer_periodic, charge, charges_of_atoms,
    weight, one_atom_less, far_jump,
]  # fmt: skip


@pytest.mark.parametrize(("mode", "dtype"), [("auto", "float64"), ("1", "float32")])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_batches_are_those_of_mace(change: Callable[[Any], None], mode: str, dtype: str) -> None:
    """Before a change, at it, and after it; periodic, molecules, and molecules in a cell."""
    calc = calculator(models=mace(), default_dtype=dtype)
    for atoms in (ice(), ice(periodic=False), ice(periodic=[True, True, False]), water()):
        if change is not nudge and not atoms.cell.any() and change in (wrap, strain):
            continue
        with e3nn_accel.enabled(neighbours=mode):
            for seed in range(3):
                nudge(atoms, seed)
                assert_batch_of_mace(calc, atoms)
            assert rows()["verlet"] == 2
            change(atoms)
            assert_batch_of_mace(calc, atoms)
            for seed in range(3):
                nudge(atoms, seed)
                assert_batch_of_mace(calc, atoms)
            assert rows()["verlet"] >= 4


def test_a_list_that_ends_is_made_anew() -> None:
    """Small steps that lead beyond the skin."""
    calc, atoms = calculator(models=mace()), ice(repeat=2)
    velocities = np.random.default_rng(0).uniform(-0.1, 0.1, atoms.positions.shape)
    with e3nn_accel.enabled():
        for _ in range(25):
            atoms.positions += velocities
            assert_batch_of_mace(calc, atoms)
        assert rows() == {"verlet": 24, "nothing like the last structure": 1}
        made = [
            u.calls
            for r in switch.active.dispatcher.runners.values()  # type: ignore[union-attr]
            for key, u in r.usage.items()
            if key == (NEIGHBOURS, "verlet", "list made")
        ]
    assert 25 * 0.1 / SKIN < made[0] < 25 * 0.2 / SKIN + 2


def test_other_objects_of_the_same_structure() -> None:
    """What counts is what a structure is, not which object."""
    calc, atoms = calculator(models=mace()), ice()
    with e3nn_accel.enabled():
        for seed in range(5):
            atoms = atoms.copy()
            nudge(atoms, seed)
            assert_batch_of_mace(calc, atoms)
        assert rows()["verlet"] == 4


def test_a_batch_is_the_caller_s() -> None:
    """Whatever is written into one, the next is right."""
    calc, atoms = calculator(models=mace()), ice()
    with e3nn_accel.enabled():
        for seed in range(4):
            nudge(atoms, seed)
            before = atoms.positions.copy()
            batch = calc._atoms_to_batch(atoms)
            for name in batch.keys:
                batch[name].zero_()
            assert np.array_equal(atoms.positions, before)
            assert_batch_of_mace(calc, atoms)


def steps_of(calc: Any, atoms: Any, number: int = 4) -> list[dict[str, Any]]:
    """Results at positions that follow each other."""
    atoms, found = atoms.copy(), []
    for seed in range(number):
        nudge(atoms, seed)
        calc.calculate(atoms)
        found.append(copy.deepcopy(calc.results))
    return found


def assert_same_results(
    ours: list[dict[str, Any]], stock: list[dict[str, Any]], tolerance: float
) -> None:
    for a, b in zip(ours, stock, strict=True):
        assert list(a) == list(b)
        for name, value in b.items():
            assert type(a[name]) is type(value), name
            if isinstance(value, np.ndarray):
                assert (a[name].dtype, a[name].shape) == (value.dtype, value.shape), name
                assert a[name].flags.writeable
            scale = max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(a[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


CALCULATORS: dict[str, dict[str, Any]] = {
    "float64": {},
    "float32": {"default_dtype": "float32"},
    "units": {"energy_units_to_eV": 27.2, "length_units_to_A": 0.53},
    "whole units": {"energy_units_to_eV": 2, "length_units_to_A": 3},
    "atomic stresses": {"compute_atomic_stresses": True},
    "padding": {"pad_num_atoms": 20, "pad_num_edges": 3000},
}


@pytest.mark.parametrize("structure", ["periodic", "molecule"])
@pytest.mark.parametrize("name", CALCULATORS)
def test_results_are_those_of_mace(name: str, structure: str) -> None:
    """Energies, forces and stress: names in order, types, dtypes and values."""
    atoms = ice() if structure == "periodic" else water()
    calc = calculator(**CALCULATORS[name])
    stock = steps_of(calc, atoms)
    with e3nn_accel.enabled(**ALONE):
        ours = steps_of(calc, atoms)
        assert rows()["verlet"] == (0 if name == "padding" else 3)
    assert_same_results(ours, stock, 1e-5 if name == "float32" else 1e-12)
    assert "stress" in stock[0]


def test_a_committee() -> None:
    """Means, variances and each model's own results."""
    models = [mace(), mace()]
    for parameter in models[1].parameters():
        parameter.data *= 1.01
    calc = calculator(models=models)
    stock = steps_of(calc, ice())
    with e3nn_accel.enabled(**ALONE):
        ours = steps_of(calc, ice())
        assert rows() == {"verlet": 3, "nothing like the last structure": 1}
    assert_same_results(ours, stock, 1e-12)
    assert "forces_comm" in stock[0]


def test_calls_are_replayed() -> None:
    """Batches of ours, of more or fewer edges from step to step, are copied into one captured call."""
    calc = calculator(models=mace())
    stock = steps_of(calc, ice(), 8)
    with replaying():
        ours = steps_of(calc, ice(), 8)
        assert rows()["verlet"] == 7
        assert model_rows()["graph", ""] >= 4
    assert_same_results(ours, stock, 1e-10)


def test_several_heads() -> None:
    """The head that was asked for."""
    model = mace(
        heads=["Default", "other"],
        atomic_energies=np.array([[1.0, 2.0], [3.0, 5.0]]),
        atomic_inter_scale=[1.0, 2.0],
        atomic_inter_shift=[0.0, 0.5],
    )
    calc = calculator(models=model, head="other")
    stock = steps_of(calc, ice())
    with e3nn_accel.enabled(**ALONE):
        ours = steps_of(calc, ice())
        assert rows()["verlet"] == 3
    assert_same_results(ours, stock, 1e-12)


def test_hessians_and_descriptors() -> None:
    """Other methods take their batches the same way."""
    calc, atoms = calculator(models=mace()), water()
    stock = [calc.get_hessian(atoms), calc.get_descriptors(atoms)]
    with e3nn_accel.enabled(**ALONE):
        for _ in range(3):
            ours = [calc.get_hessian(atoms), calc.get_descriptors(atoms)]
            for found, wanted in zip(ours, stock, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
        assert rows()["verlet"] == 5


def trajectory(steps: int, **options: Any) -> tuple[Any, Any]:
    """NVE from 300 K: positions, and the total energy of each step."""
    import ase.io
    from ase import units
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
    from ase.md.verlet import VelocityVerlet

    atoms = ase.io.read(FOLDER / "structures.xyz", index=0) if not options else ice()
    atoms.info.clear()
    atoms.calc = calculator(**options)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    energies: list[float] = []
    dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(steps)
    return atoms.positions, np.array(energies)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["small", "shipped"])
def test_dynamics_of_200_steps(which: str) -> None:
    """The same trajectory and energies, to rounding, though lists end on the way."""
    options = {"models": mace()} if which == "small" else {}
    positions, energies = trajectory(200, **options)
    with e3nn_accel.enabled(**ALONE):
        ours, our_energies = trajectory(200, **options)
        assert rows() == {"verlet": 200, "nothing like the last structure": 1}
    np.testing.assert_allclose(ours, positions, rtol=0, atol=1e-10)
    np.testing.assert_allclose(our_energies, energies, rtol=1e-13)
    assert np.ptp(energies) < 0.02


def test_atoms_that_move_far_get_mace_s_own() -> None:
    """No list is made for what one would serve but a call or two."""
    calc, atoms = calculator(models=mace()), ice()
    with e3nn_accel.enabled():
        for seed in range(4):
            atoms.positions += np.random.default_rng(seed).uniform(-0.5, 0.5, atoms.positions.shape)
            calc._atoms_to_batch(atoms)
        reasons = {"nothing like the last structure": 1, "atoms move far between calls": 3}
        assert rows() == reasons


def test_what_is_left_to_mace() -> None:
    """With the reason, or without a trace where it is switched off."""
    atoms = water()
    padded = calculator(models=mace(), pad_num_atoms=20, pad_num_edges=3000)
    plain = calculator(models=mace())
    with e3nn_accel.enabled():
        steps_of(padded, atoms)
        assert rows() == {"pad_num_atoms or pad_num_edges pads batches": 4}
    with e3nn_accel.enabled(verify=True):
        steps_of(plain, atoms)
        assert rows() == {"verify compares every operation": 4}
    with e3nn_accel.enabled(skip="MACECalculator"):
        steps_of(plain, atoms)
        assert rows() == {"left out by E3NN_ACCEL_SKIP or skip=": 4}
    with e3nn_accel.enabled(neighbours="0"):
        steps_of(plain, atoms)
        assert rows() == {}
    with e3nn_accel.enabled(), suspend():
        steps_of(plain, atoms)
        assert rows() == {}


def test_one_model_accelerated() -> None:
    """The calculators of that model, and no others."""
    ours, other = mace(), mace()
    e3nn_accel.accelerate(ours)
    steps_of(calculator(models=ours), water())
    assert rows()["verlet"] == 3
    steps_of(calculator(models=other), water())
    assert rows()["verlet"] == 3


def test_errors_are_mace_s_own() -> None:
    """An element that the model doesn't know, no atoms at all, a structure that isn't one."""
    calc = calculator(models=mace())
    gold = water()
    gold.numbers[0] = 79
    for wrong in (gold, water()[:0], None, "water"):
        with pytest.raises(Exception) as stock:
            calc.calculate(wrong)
        with e3nn_accel.enabled():
            steps_of(calc, water(), 2)
            with pytest.raises(type(stock.value)):
                calc.calculate(wrong)
            steps_of(calc, water(), 2)


def test_a_step_of_calculate_that_is_replaced_is_called() -> None:
    """By a subclass, or on the object."""
    called: list[str] = []

    class Own(mace_calculators.MACECalculator):
        def _clone_batch(self, batch: Any) -> Any:
            called.append("subclass")
            return super()._clone_batch(batch)

    own = Own(models=mace(), device="cpu", default_dtype="float64")
    one = calculator(models=mace())
    stock_clone = one._clone_batch
    one._clone_batch = lambda batch: (called.append("object"), stock_clone(batch))[1]
    with e3nn_accel.enabled():
        steps_of(own, water())
        steps_of(one, water())
    assert Counter(called) == {"subclass": 4, "object": 4}


def test_pickles_and_copies_hold_nothing_of_ours() -> None:
    """And work, on and off."""
    calc = calculator(models=mace())
    names = set(vars(calc))
    with e3nn_accel.enabled(**ALONE):
        steps_of(calc, water())
        assert set(vars(calc)) == names | {"atoms"}
        data = pickle.dumps(calc)
        assert b"e3nn_accel" not in data
        copies = [pickle.loads(data), copy.deepcopy(calc)]
        ours = [steps_of(found, water()) for found in copies]
    stock = steps_of(pickle.loads(data), water())
    for found in ours:
        assert_same_results(found, stock, 1e-12)


def test_signatures_stay() -> None:
    """For whoever asks, and keyword arguments."""
    names = ("_atoms_to_batch", "calculate")
    stock = [inspect.signature(getattr(mace_calculators.MACECalculator, name)) for name in names]
    calc = calculator(models=mace())
    with e3nn_accel.enabled():
        ours = [inspect.signature(getattr(mace_calculators.MACECalculator, name)) for name in names]
        calc.calculate(atoms=water(), properties=["energy"], system_changes=[])
    assert ours == stock


def test_a_list_that_is_wrong_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check finds an edge that is missing; MACE makes the batches from then on."""
    calc, atoms = calculator(models=mace()), ice()
    edges = Pairs.edges

    def one_less(self: Pairs, now: Any, positions: Any) -> Edges:
        found = edges(self, now, positions)
        return Edges(found.edge_index[:, 1:], found.shifts[1:], found.unit_shifts[1:])

    monkeypatch.setattr(Pairs, "edges", one_less)
    stock = steps_of(calc, atoms)
    with e3nn_accel.enabled(**ALONE):
        with pytest.warns(FallbackWarning, match="edges differ"):
            ours = steps_of(calc, atoms)
        assert rows() == {"nothing like the last structure": 1, "self-check: edges differ": 3}
    assert_same_results(ours, stock, 1e-12)


def test_an_unknown_version_keeps_its_calculator(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a line in doctor."""
    stock = mace_calculators.MACECalculator.calculate
    monkeypatch.setattr(compat, "CALCULATORS", ())
    with e3nn_accel.enabled():
        assert mace_calculators.MACECalculator.calculate is stock
        assert switch.active.dispatcher is not None
        assert "isn't known" in switch.active.dispatcher.registry.problems["MACECalculator"]


def _nothing(atoms: Any) -> None:
    pass


def _moved(atoms: Any) -> None:
    atoms.positions[1, 2] += 1e-3


def _moved_by_rounding(atoms: Any) -> None:
    atoms.positions[0, 0] = np.nextafter(atoms.positions[0, 0], np.inf)


def _not_a_number(atoms: Any) -> None:
    atoms.positions[2, 1] = np.nan


def _strained(atoms: Any) -> None:
    atoms.set_cell(1.01 * atoms.cell.array, scale_atoms=True)


def _open(atoms: Any) -> None:
    atoms.pbc = [True, False, True]


def _other_elements(atoms: Any) -> None:
    atoms.numbers[:] = 8


def _magnetic(atoms: Any) -> None:
    atoms.set_initial_magnetic_moments([0.5] * len(atoms))


def _charged(atoms: Any) -> None:
    atoms.set_initial_charges([0.1] * len(atoms))
    atoms.positions += 0.1


def _with_info(atoms: Any) -> None:
    atoms.info["head"] = "another"


def _fewer(atoms: Any) -> None:
    del atoms[-1]


def _fast(atoms: Any) -> None:
    atoms.set_momenta(np.ones((len(atoms), 3)))


CHANGES = [
    _nothing, _moved, _moved_by_rounding, _not_a_number, _strained, _open, _other_elements, _magnetic, _charged,
    _with_info, _fewer, _fast,
]  # fmt: skip


@pytest.mark.parametrize("tolerance", [1e-15, 1e-2])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_changes_are_ases(change: Callable[[Any], None], tolerance: float) -> None:
    calc = calculator()
    calc.atoms, atoms = ice(1), ice(1)
    change(atoms)
    stock = calc.check_state(atoms, tol=tolerance)
    with e3nn_accel.enabled(**ALONE):
        assert set(calc.check_state(atoms, tol=tolerance)) == set(stock)
        assert set(calc.check_state(atoms, tolerance)) == set(stock)


def test_changes_without_a_last_structure_or_that_are_ignored() -> None:
    calc = calculator()
    with e3nn_accel.enabled(**ALONE):
        assert len(calc.check_state(ice(1))) == 6  # whatever ASE knows
        calc.atoms, calc.ignored_changes = ice(1), {"positions"}
        moved = ice(1)
        _moved(moved)
        assert calc.check_state(moved) == []


def test_plain_changes_are_not_asked_of_ase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Molecular dynamics compares the same structure, and one whose atoms moved."""
    from ase.calculators import calculator as ase_calculator

    calc = calculator()
    calc.atoms, moved = ice(1), ice(1)
    _moved(moved)
    with e3nn_accel.enabled(**ALONE):
        monkeypatch.delattr(ase_calculator, "compare_atoms")
        assert calc.check_state(ice(1)) == []
        assert calc.check_state(moved) == ["positions"]
