"""Real trained models, unmodified: the numbers of stock e3nn, and every module planned.

Checkpoints trained by others are not shipped. They are looked for in $E3NN_ACCEL_CHECKPOINTS, else
in ../shared/checkpoints beside the repository; where there are none, these tests are skipped.
"""

import os
from pathlib import Path

import pytest

import e3nn_accel

pytest.importorskip("mace")
pytestmark = [pytest.mark.mace, pytest.mark.checkpoints]

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ROOT.parent / "shared" / "checkpoints"
FOLDER = Path(os.environ.get("CHECKPOINTS_OF_TESTS", BESIDE))  # conftest.py renames the variable
SHIPPED = ROOT / "examples" / "water_ethanol"

MOLECULES = ("H2O", "NH3", "CH3CH2OH", "C6H6", "CH3CONH2")
# A structure of so many atoms is looked at as it is, as the criteria say; the small ones, whose
# float32 errors are down to luck, in several views.
CASES = {
    "GO_MACE_swa.model": ("GO.xyz", slice(None), 1),
    "gesbte_mace_swa.model": ("gesbte_81.xyz", slice(None), 1),
    "imagdau_mace01_swa.model": ("solvent_liquid.xyz", slice(None), 1),
    "ani500k_small_CC.model": (None, MOLECULES, None),
}


def checkpoint(name):
    from e3nn_accel.structures import load_mace

    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"no {path}; $E3NN_ACCEL_CHECKPOINTS names the folder of the checkpoints")
    return load_mace(path)


def structures(name):
    import ase.build

    from e3nn_accel.structures import read_structures

    file, selection, _ = CASES[name]
    if file is None:
        return [ase.build.molecule(molecule) for molecule in selection]
    return read_structures(FOLDER / file)[selection]


def assert_equal_to_stock(parity):
    failed = [row for row in parity.rows if not row.passed]
    assert not failed, parity.verdict
    for dtype in parity.dtypes:
        assert dtype.modules > 10
        assert not dtype.fallbacks


@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float64", marks=pytest.mark.slow), "float32"],  # which others have, too
)
@pytest.mark.parametrize("name", CASES)
def test_energies_forces_and_stress_are_those_of_stock(name, dtype):
    from e3nn_accel.parity import compare

    parity = compare(checkpoint(name), structures(name), [dtype], views=CASES[name][2])
    assert_equal_to_stock(parity)


@pytest.mark.parametrize("name", CASES)
def test_every_module_is_planned(name):
    report = e3nn_accel.explain(checkpoint(name))
    assert len(report.rows) > 10
    assert not report.fallbacks
    assert {row.operation for row in report.rows} == {
        "linear",
        "tensor_product",
        "convolution",
        "contraction",
    }


@pytest.mark.parametrize("name", CASES)
def test_default_structures_pass_with_parameter_gradients_in_float64(name):
    from e3nn_accel.parity import compare
    from e3nn_accel.structures import default_structures

    model = checkpoint(name)
    assert_equal_to_stock(compare(model, default_structures(model), ["float64"], train=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_default_structures_pass_with_parameter_gradients_in_float32(name):
    from e3nn_accel.parity import compare
    from e3nn_accel.structures import default_structures

    model = checkpoint(name)
    assert_equal_to_stock(compare(model, default_structures(model), ["float32"], train=True))


@pytest.mark.slow
def test_many_small_clusters():
    """Training data: 1 to some dozen atoms each, near to and far from equilibrium."""
    from e3nn_accel.parity import compare
    from e3nn_accel.structures import read_structures

    model = checkpoint("imagdau_mace01_swa.model")
    frames = read_structures(FOLDER / "solvent_xtb_train_200.xyz")[::5]
    assert_equal_to_stock(compare(model, frames))


def test_the_shipped_model():
    from e3nn_accel.parity import compare
    from e3nn_accel.structures import load_mace, read_structures

    model = load_mace(SHIPPED / "water_ethanol.model")
    frames = read_structures(SHIPPED / "structures.xyz")[:1]
    assert_equal_to_stock(compare(model, frames, train=True))
    assert not e3nn_accel.explain(model).fallbacks
