"""MACE's own programs, unmodified, by the environment variable alone: they write what they write without us."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import fresh_python
import numpy as np
import pytest
import torch

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [pytest.mark.slow, pytest.mark.once]

EXAMPLE = fresh_python.SOURCE / "examples" / "water_ethanol"
ENTRY = "import sys; from mace.cli.{} import main; sys.argv[:] = sys.argv[1:]; main()"
TRAIN: dict[str, Any] = {
    "name": "water", "seed": 3, "train_file": EXAMPLE / "valid.xyz", "valid_fraction": 0.3,
    "E0s": "average", "model": "MACE", "hidden_irreps": "8x0e+8x1o", "r_max": 3.5, "max_ell": 2,
    "correlation": 2, "num_radial_basis": 4, "batch_size": 2, "valid_batch_size": 8, "lr": 0.005,
    "default_dtype": "float64", "device": "cpu", "energy_key": "REF_energy", "forces_key": "REF_forces",
    "ema_decay": 0.9, "eval_interval": 1, "scheduler_patience": 5, "error_table": "PerAtomMAE",
}  # fmt: skip
STEPS = 20
TOLERANCE = 1e-8
"""Of losses, relative, over that many steps in float64: two orders of summation drift apart by no more."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> fresh_python.FreshPython:
    """With the start files, as an installation has them."""
    return fresh_python.make(tmp_path_factory.mktemp("python"), start_files=True)


def run(
    python: fresh_python.FreshPython, folder: Path, program: str, *flags: str, **options: Any
) -> list[dict[str, Any]]:
    """One of MACE's programs; the rows of our report, none where the folder's name isn't "ours"."""
    done = started(python, folder, program, *flags, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    report = folder / f"{program}.json"
    return json.loads(report.read_text())["rows"] if folder.name == "ours" else []


def started(
    python: fresh_python.FreshPython, folder: Path, program: str, *flags: str, **options: Any
) -> subprocess.CompletedProcess[str]:
    """One of MACE's programs, with us where the folder's name is "ours"."""
    folder.mkdir(exist_ok=True)
    report = folder / f"{program}.json"
    on = {"E3NN_ACCEL": "1", "E3NN_ACCEL_REPORT": str(report)} if folder.name == "ours" else {}
    return subprocess.run(
        [str(python.executable), "-W", "ignore", "-c", ENTRY.format(program), program, *flags,
         *(f"--{name}={value}" for name, value in options.items())],
        cwd=folder,
        env=fresh_python.environment(OMP_NUM_THREADS="1", **on),
        capture_output=True,
        text=True,
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    """Of every step, in order."""
    (log,) = (folder / "results").glob("*_train.txt")
    rows = map(json.loads, log.read_text().splitlines())
    return [row["loss"] for row in rows if row["mode"] == "opt"]


def assert_planned(rows: list[dict[str, Any]]) -> None:
    """Everything that was called ran in a plan."""
    assert {row["operation"] for row in rows} >= {"linear", "convolution", "contraction"}
    assert all(row["backend"] == "torch" for row in rows), rows


@pytest.fixture(scope="module")
def trained(
    python: fresh_python.FreshPython, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The folders of two trainings from the same seed, with moving averages, saved after each epoch."""
    folder = tmp_path_factory.mktemp("trained")
    folders = {name: folder / name for name in ("stock", "ours")}
    for name, place in folders.items():
        rows = run(python, place, "run_train", "--ema", max_num_epochs=2, **TRAIN)
        if name == "ours":
            assert_planned(rows)
    return folders


def test_losses_of_a_training(trained: dict[str, Path]) -> None:
    """From the same seed, the same to the last step."""
    stock, ours = (losses(trained[name]) for name in ("stock", "ours"))
    assert len(stock) == len(ours) >= STEPS
    for a, b in zip(ours, stock, strict=True):
        assert math.isclose(a, b, rel_tol=TOLERANCE)


@pytest.fixture(scope="module")
def with_stresses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Water in cells, whose reference stresses are drawn."""
    from ase.io import read, write

    random, frames = np.random.default_rng(0), read(EXAMPLE / "valid.xyz", ":24")
    for atoms in frames:
        atoms.set_cell(np.diag([7.0, 7.5, 8.0]))
        atoms.pbc = True
        atoms.info["REF_stress"] = random.normal(scale=0.01, size=6)
    path = tmp_path_factory.mktemp("stresses") / "train.xyz"
    write(path, frames)
    return path


FINE_TUNED = {
    "foundation_model": EXAMPLE / "water_ethanol.model", "batch_size": 4, "lr": 0.001, "max_num_epochs": 1,
}  # fmt: skip
OTHERS = {
    "stress": {"loss": "stress", "compute_stress": True, "model": "ScaleShiftMACE", "stress_key": "REF_stress"},
    "LoRA": {**FINE_TUNED, "lora": True},
    "several heads": {
        **FINE_TUNED, "E0s": "foundation", "multiheads_finetuning": True, "pt_train_file": EXAMPLE / "test.xyz",
        "num_samples_pt": 10, "loss": "universal", "force_mh_ft_lr": True,
    },
}  # fmt: skip
"""Trainings of other kinds: their options beside those of `TRAIN`."""


@pytest.mark.parametrize("kind", OTHERS)
def test_other_trainings(
    kind: str, python: fresh_python.FreshPython, tmp_path: Path, with_stresses: Path
) -> None:
    """On stresses, by low-rank updates, and of a model with several heads: the same losses."""
    file = with_stresses if kind == "stress" else EXAMPLE / "valid.xyz"
    options = {**TRAIN, "max_num_epochs": 1, "train_file": file, **OTHERS[kind]}
    found = {}
    for name in ("stock", "ours"):
        rows = run(python, tmp_path / name, "run_train", **options)
        if name == "ours":
            assert_planned(rows)
        found[name] = losses(tmp_path / name)
    assert len(found["ours"]) == len(found["stock"]) >= 4
    for a, b in zip(found["ours"], found["stock"], strict=True):
        assert math.isclose(a, b, rel_tol=TOLERANCE)


def test_a_restart_goes_on_where_it_was(
    python: fresh_python.FreshPython, trained: dict[str, Path]
) -> None:
    """From a checkpoint that was written while enabled, or not."""
    for folder in trained.values():
        run(python, folder, "run_train", "--ema", "--restart_latest", max_num_epochs=3, **TRAIN)
    stock, ours = (losses(trained[name]) for name in ("stock", "ours"))
    assert len(ours) == len(stock) > 2 * STEPS
    assert all(math.isclose(a, b, rel_tol=10 * TOLERANCE) for a, b in zip(ours, stock, strict=True))


def test_models_are_read_by_either(
    python: fresh_python.FreshPython, trained: dict[str, Path]
) -> None:
    """Written by the one and evaluated by the other: energies and forces of the same structures."""
    from ase.io import read

    found = {}
    for writer, other in (("stock", "ours"), ("ours", "stock")):
        out = trained[other] / f"by_{writer}.xyz"
        rows = run(
            python, trained[other], "eval_configs", configs=EXAMPLE / "test.xyz", output=out,
            model=trained[writer] / "water.model", default_dtype="float64", device="cpu",
        )  # fmt: skip
        if other == "ours":
            assert_planned(rows)
        found[writer] = [(a.info["MACE_energy"], a.arrays["MACE_forces"]) for a in read(out, ":")]
    for (e1, f1), (e2, f2) in zip(found["stock"], found["ours"], strict=True):
        assert math.isclose(e1, e2, rel_tol=1e-7)
        assert abs(f1 - f2).max() < 1e-5  # of two trainings that drifted apart by rounding


def test_model_for_lammps(python: fresh_python.FreshPython, trained: dict[str, Path]) -> None:
    """TorchScript written while enabled holds nothing of us: the same code and numbers."""
    model = trained["stock"] / "water.model"
    written = {}
    for name, folder in trained.items():
        copy = folder / "copy.model"
        copy.write_bytes(model.read_bytes())
        run(python, folder, "create_lammps_model", str(copy))
        written[name] = torch.jit.load(f"{copy}-lammps.pt")
    stock, ours = written["stock"].state_dict(), written["ours"].state_dict()
    assert list(stock) == list(ours)
    assert all(torch.equal(stock[name], ours[name]) for name in stock)
    assert written["stock"].code == written["ours"].code
    assert b"e3nn_accel" not in (trained["ours"] / "copy.model-lammps.pt").read_bytes()


def test_model_for_ml_iap(python: fresh_python.FreshPython, tmp_path: Path) -> None:
    """MACE converts it to cuEquivariance first: a file without us, or, where that is absent, the error of MACE."""
    found = {}
    for name in ("stock", "ours"):
        folder = tmp_path / name
        folder.mkdir()
        copy = folder / "copy.model"
        copy.write_bytes((EXAMPLE / "water_ethanol.model").read_bytes())
        done = started(python, folder, "create_lammps_model", str(copy), "--format=mliap")
        found[name] = done.returncode, done.stderr.strip().splitlines()[-1:]
        written = Path(f"{copy}-mliap_lammps.pt")
        assert written.exists() == (done.returncode == 0)
        assert not written.exists() or b"e3nn_accel" not in written.read_bytes()
    assert found["ours"] == found["stock"]


def test_a_model_is_converted(python: fresh_python.FreshPython, tmp_path: Path) -> None:
    """Read and written again while enabled: the same weights, and nothing of us."""
    written = {}
    for name in ("stock", "ours"):
        file = tmp_path / f"{name}.model"
        model = EXAMPLE / "water_ethanol.model"
        run(python, tmp_path / name, "convert_device", "-t", "cpu", "-o", str(file), str(model))
        assert b"e3nn_accel" not in file.read_bytes()
        written[name] = torch.load(file, weights_only=False).state_dict()
    assert list(written["stock"]) == list(written["ours"])
    assert all(torch.equal(t, written["ours"][name]) for name, t in written["stock"].items())
