"""Whole calls of MACE models as CUDA graphs, against eager calls of the same model on a GPU."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from model_graphs import batch_of, fresh, headed, ice, rows, water

import e3nn_accel
from e3nn_accel import structures
from e3nn_accel.cli import main
from e3nn_accel.cli.shapes import build, silicon
from e3nn_accel.graphs import capture, record
from e3nn_accel.graphs import eager as graphs_eager

pytest.importorskip("mace", reason="MACE isn't installed")
from small_models import mace, molecules, two_headed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHIPPED = Path(__file__).parents[2] / "examples" / "water_ethanol"
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative to the norm. Most of it is rounding of matrix products that cuBLAS picks by the number of rows."""
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
STRESS = pytest.mark.parametrize("stress", [False, True], ids=["forces", "stress"])
BACKEND = {"backend": "cuda"}
"""Its kernels don't wait for the device."""


@pytest.fixture(autouse=True)
def the_same_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eager calls of few edges, too: where forces cancel, nothing but the rounding of other operations is left."""
    monkeypatch.setattr(graphs_eager, "ENOUGH_EDGES", 0)


def shipped(dtype: torch.dtype = torch.float64) -> Any:
    """The trained model, frozen, on the device."""
    model = structures.load_mace(SHIPPED / "water_ethanol.model")
    return model.to("cuda", dtype).requires_grad_(False).eval()


def crystal(model: Any, atoms: int, seed: int = 0) -> dict[str, Any]:
    """A batch of one structure, on the model's device and in its dtype."""
    dtype = next(model.parameters()).dtype
    batch = structures.batch_of(model, structures.random_crystal(model, atoms, seed), dtype)
    return structures.cast(batch, dtype, torch.device("cuda"))


def moved(batch: dict[str, Any], seed: int, size: float = 0.02) -> dict[str, Any]:
    """The same graph with atoms displaced a little, in tensors of its own."""
    found = fresh(batch)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    like = found["positions"]  # its dtype: in another, the same seed gives other numbers
    noise = torch.randn(like.shape, generator=generator, device="cuda", dtype=like.dtype)
    found["positions"] += size * noise
    return found


def call(model: Any, batch: dict[str, Any], **flags: bool) -> dict[str, Any]:
    """A call in the default dtype of the model."""
    with structures.default_dtype(next(model.parameters()).dtype):
        return model(fresh(batch), **flags)


def eager(model: Any, batch: dict[str, Any], **flags: bool) -> dict[str, Any]:
    """By the same plans."""
    with e3nn_accel.enabled(graph="0", **BACKEND):
        return call(model, batch, **flags)


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Keys, what is None, shapes, dtypes, requires_grad, and values within rounding."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        got = found[name]
        if value is None:
            assert got is None, name
            continue
        assert (got.shape, got.dtype, got.device) == (value.shape, value.dtype, value.device), name
        assert got.requires_grad == value.requires_grad, name
        error, size = (got - value).detach().norm(), value.detach().norm()
        assert error <= TOLERANCE[expected["forces"].dtype] * size + 1e-30, (name, error, size)


def counted() -> tuple[int, int, list[str]]:
    """Replays, captures, reasons of eager calls other than waiting to be captured."""
    found = rows()
    reasons = [why for (how, why) in found if how == "eager" and "often enough" not in why]
    return found.get(("graph", ""), 0), found.get(("graph", "captured"), 0), reasons


@BOTH
@STRESS
@pytest.mark.parametrize("atoms", [1, 20, 200])
def test_equal_to_eager(atoms: int, stress: bool, dtype: torch.dtype) -> None:
    """Positions differ at every call."""
    model = shipped(dtype)
    batch = crystal(model, atoms)
    flags = {"compute_stress": stress}
    expected = [eager(model, moved(batch, n), **flags) for n in range(6)]
    with e3nn_accel.enabled(**BACKEND):
        found = [call(model, moved(batch, n), **flags) for n in range(6)]
        assert counted() == (3, 1, [])
    for ours, theirs in zip(found, expected, strict=True):
        agree(ours, theirs)


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_large_model(backend: str) -> None:
    """MACE-MP-0's shape, float32; by default products that aren't timed yet run in torch operations."""
    model = build("mp0-medium").cuda().requires_grad_(False)
    batch = structures.cast(
        structures.batch_of(model, silicon(64), torch.float32), torch.float32, torch.device("cuda")
    )
    with e3nn_accel.enabled(graph="0", backend=backend):
        expected = call(model, batch, compute_stress=True)
    with e3nn_accel.enabled(graph="1", backend=backend):
        found = call(model, batch, compute_stress=True)
        found = call(model, batch, compute_stress=True)
        assert counted() == (1, 1, [])
    error = (found["forces"] - expected["forces"]).norm() / expected["forces"].norm()
    assert error < 1e-5


def test_gradients_take_the_place_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where whole rows are moved: the same bits in less memory, by those of the larger layer at least."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the kernels that write over weights are those of compute capability 9.0")
    model = build("mp0-medium").cuda().requires_grad_(False)
    batch = structures.batch_of(model, silicon(216), torch.float32)
    batch = structures.cast(batch, torch.float32, torch.device("cuda"))
    edges, paths = batch["edge_index"].shape[1], 10
    found = {}
    for way in ("over the weights", "beside them"):
        if way == "beside them":
            monkeypatch.setattr(record, "differentiated_once", contextlib.nullcontext)
        with e3nn_accel.enabled(graph="1", **BACKEND):
            call(model, batch, compute_stress=True)
            out = call(model, batch, compute_stress=True)
            assert counted() == (1, 1, [])
            [mebibytes] = re.findall(r"(\d+) MiB", str(e3nn_accel.report()))
        found[way] = int(mebibytes), out["forces"], out["stress"]
    (less, *ours), (more, *theirs) = found.values()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert more - less >= 0.9 * edges * paths * 128 * 4 / 2**20


@STRESS
def test_batches_of_molecules(stress: bool) -> None:
    """Without a cell that matters; several structures, and fewer and more of them."""
    model = mace().cuda().requires_grad_(False)
    with e3nn_accel.enabled(graph="1", **BACKEND):
        found = [call(model, to_cuda(molecules(n)), compute_stress=stress) for n in (3, 2, 3, 1)]
        assert counted()[2] == []
    for n, ours in zip((3, 2, 3, 1), found, strict=True):
        theirs = eager(model, to_cuda(molecules(n)), compute_stress=stress)
        for name in ("energy", "forces", "node_energy", "stress"):
            if theirs[name] is not None:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-14)


def to_cuda(batch: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of a batch."""
    return {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}


def two_heads(atoms: list[Any], letters: str, dtype: torch.dtype) -> dict[str, Any]:
    """A batch whose structures have heads a and b, as the letters say."""
    batch = batch_of(headed(atoms, letters), heads=("a", "b"))
    return structures.cast(batch, dtype, torch.device("cuda"))


@BOTH
@STRESS
def test_heads_change_from_call_to_call(stress: bool, dtype: torch.dtype) -> None:
    """Every order of heads after every other, of one captured size."""
    model = two_headed().to("cuda", dtype).requires_grad_(False)
    orders = ("aa", "ab", "ba", "bb")
    batches = {heads: two_heads([ice(1), water()], heads, dtype) for heads in orders}
    flags = {"compute_stress": stress}
    expected = {heads: eager(model, batch, **flags) for heads, batch in batches.items()}
    for one, other in itertools.combinations(orders, 2):
        assert not torch.allclose(expected[one]["forces"], expected[other]["forces"], rtol=1e-3)
    with e3nn_accel.enabled(**BACKEND):
        for heads in itertools.chain(*itertools.permutations(orders, 2)):
            agree(call(model, batches[heads], **flags), expected[heads])
        assert counted() == (2 * 12 - 3, 1, [])


@BOTH
@STRESS
def test_numbers_of_structures_change(stress: bool, dtype: torch.dtype) -> None:
    """Within one captured size, whose dummy structures come and go."""
    model = two_headed().to("cuda", dtype).requires_grad_(False)
    batches = [
        two_heads([ice(m, repeat=m) for m in sizes], heads, dtype)
        for sizes, heads in (((1, 1, 1), "aba"), ((3,), "b"), ((2, 1), "ab"), ((1, 1, 1), "bba"))
    ]
    flags = {"compute_stress": stress}
    expected = [eager(model, batch, **flags) for batch in batches]
    with e3nn_accel.enabled(**BACKEND):
        for _ in range(2):
            for batch, theirs in zip(batches, expected, strict=True):
                agree(call(model, batch, **flags), theirs)
        assert counted() == (2 * len(batches) - 3, 1, [])


def test_models_and_flags_in_turns() -> None:
    """Of one head and two, each flag a capture of its own, all of them beside each other."""
    models = [shipped(), two_headed().cuda().requires_grad_(False)]
    batches = [crystal(models[0], 30), two_heads([ice(1), water()], "ba", torch.float64)]
    flags: list[dict[str, bool]] = [
        {},
        {"compute_stress": True},
        {"compute_virials": True},
        {"compute_displacement": True},
    ]
    calls = [(m, b, f) for f in flags for m, b in zip(models, batches, strict=True)]
    expected = [eager(m, b, **f) for m, b, f in calls]
    with e3nn_accel.enabled(**BACKEND):
        for _ in range(5):
            for (model, batch, on), theirs in zip(calls, expected, strict=True):
                agree(call(model, batch, **on), theirs)
        assert counted() == (2 * len(calls), len(calls), [])


def test_sizes_come_and_go() -> None:
    """As in molecular dynamics: edges come and go, atoms stay; then another structure, and back."""
    model = shipped()
    wide, narrow = crystal(model, 60), crystal(model, 27)
    batches = []
    for n in range(12):
        batch = moved(wide, n)
        keep = batch["edge_index"].shape[1] - 2 * (n % 5)
        for name, dim in (("edge_index", 1), ("shifts", 0), ("unit_shifts", 0)):
            batch[name] = batch[name].narrow(dim, 0, keep).contiguous()
        batches.append(batch)
    batches[6:6] = [moved(narrow, n) for n in range(5)]
    expected = [eager(model, batch) for batch in batches]
    with e3nn_accel.enabled(**BACKEND):
        found = [call(model, batch) for batch in batches]
        replays, captures, reasons = counted()
    assert (captures, reasons) == (2, [])
    assert replays == len(batches) - 2 * 2 - 2
    for ours, theirs in zip(found, expected, strict=True):
        agree(ours, theirs)


def test_results_may_be_kept() -> None:
    """A later replay leaves them alone, and so does what follows on other streams."""
    model = shipped()
    batch = crystal(model, 40)
    with e3nn_accel.enabled(graph="1", **BACKEND):
        first = call(model, batch)
        forces = first["forces"].clone()
        call(model, moved(batch, 1))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            again = call(model, batch)
        other = call(model, moved(batch, 2))
        torch.cuda.synchronize()
    assert torch.equal(first["forces"], forces)
    assert torch.equal(again["forces"], forces)
    agree_values = eager(model, moved(batch, 2))
    assert (other["forces"] - agree_values["forces"]).norm() < 1e-10


def test_weights_written_in_place() -> None:
    """By an average, load_state_dict, or hand: the next replay has them; nothing is captured anew."""
    model, twin = shipped(), shipped()
    batch = crystal(model, 30)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.01)
    changed = eager(twin, batch)
    before = eager(model, batch)
    original = {k: v.clone() for k, v in model.state_dict().items()}
    with e3nn_accel.enabled(graph="1", **BACKEND):
        call(model, batch)
        model.load_state_dict(twin.state_dict())
        after = call(model, batch)
        model.load_state_dict(original)
        back = call(model, batch)
        assert counted() == (2, 1, [])
    assert (after["forces"] - changed["forces"]).norm() < 1e-12 * changed["forces"].norm()
    assert (back["forces"] - before["forces"]).norm() < 1e-12 * before["forces"].norm()


def test_weights_in_other_places() -> None:
    """Assigned, or moved to another dtype and back: captured anew."""
    model = shipped()
    batch = crystal(model, 30)
    with e3nn_accel.enabled(graph="1", **BACKEND):
        call(model, batch)
        twin = shipped()
        for parameter in twin.parameters():
            parameter.mul_(1.01)
        model.load_state_dict(twin.state_dict(), assign=True)
        found = call(model, batch)
        assert counted()[1] == 2
    expected = eager(twin, batch)
    assert (found["forces"] - expected["forces"]).norm() < 1e-12 * expected["forces"].norm()


def test_two_models_in_turns() -> None:
    """Each has graphs and memory of its own."""
    models = [shipped(), mace().cuda().requires_grad_(False)]
    batches = [crystal(models[0], 30), to_cuda(molecules(2))]
    expected = [eager(m, b) for m, b in zip(models, batches, strict=True)]
    with e3nn_accel.enabled(graph="1", **BACKEND):
        for _ in range(4):
            for model, batch, theirs in zip(models, batches, expected, strict=True):
                found = call(model, batch)
                assert (found["forces"] - theirs["forces"]).norm() <= 1e-10


def test_two_threads() -> None:
    """One model called by two threads on streams of their own."""
    model = shipped()
    batch = crystal(model, 30)
    expected = [eager(model, moved(batch, n))["forces"] for n in range(2)]
    errors: list[Any] = []

    def work(n: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                found = model(moved(batch, n))["forces"]
                errors.append((found - expected[n]).norm())
            stream.synchronize()

    with e3nn_accel.enabled(graph="1", **BACKEND), structures.default_dtype(torch.float64):
        call(model, batch)
        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 40
    assert max(map(float, errors)) < 1e-10


def test_gradient_of_a_replayed_energy() -> None:
    """Forward is run again: minus the forces."""
    model = shipped()
    batch = crystal(model, 20)
    with e3nn_accel.enabled(**BACKEND):
        for _ in range(4):
            data = fresh(batch)
            out = model(data)
        assert counted()[0] == 1
        (gradient,) = torch.autograd.grad(out["energy"].sum(), data["positions"])
    assert (gradient + out["forces"]).norm() < 1e-10 * out["forces"].norm()


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call runs eagerly, its reason is told, and the device is as it was; random numbers, too."""
    model = shipped()
    batch = crystal(model, 20)
    expected = eager(model, batch)
    readout = type(model.readouts[0])
    stock = readout.forward

    def waits(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = stock(self, *args, **kwargs)
        float(found.detach().sum())
        return found

    monkeypatch.setattr(readout, "forward", waits)
    with e3nn_accel.enabled(graph="1", **BACKEND):
        for _ in range(3):
            agree(call(model, batch), expected)
        assert counted()[:2] == (0, 0)
        assert any("capture failed" in reason for reason in counted()[2])
        torch.randn(3, device="cuda").sum().item()
        monkeypatch.setattr(readout, "forward", stock)
        for _ in range(2):
            found = call(model, batch)
        assert counted()[:2] == (1, 1)
    error = (found["forces"] - expected["forces"]).norm() / expected["forces"].norm()
    assert error < 1e-12


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes too much isn't kept; disabling gives everything back."""
    model = shipped()
    batch = crystal(model, 100)
    torch.cuda.empty_cache()
    with e3nn_accel.enabled(graph="1", **BACKEND):
        call(model, batch)
        call(model, batch)
        assert "MiB" in str(e3nn_accel.report())
        torch.cuda.synchronize()
        kept = torch.cuda.memory_reserved()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < kept
    monkeypatch.setattr(capture, "MOST_OF_DEVICE", 1e-9)
    with e3nn_accel.enabled(graph="1", **BACKEND):
        call(model, batch)
        call(model, batch)
        assert counted()[:2] == (0, 0)
        assert any("too much to keep" in reason for reason in counted()[2])


def test_disabling_restores_the_class() -> None:
    """Stock MACE's own call, object for object."""
    from mace.modules.models import MACE, ScaleShiftMACE

    before = [vars(cls).get("__call__") for cls in (MACE, ScaleShiftMACE)]
    e3nn_accel.enable()
    assert all("__call__" in vars(cls) for cls in (MACE, ScaleShiftMACE))
    e3nn_accel.disable()
    assert [vars(cls).get("__call__") for cls in (MACE, ScaleShiftMACE)] == before


def test_bench_on_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    """A model's calls and training steps, of which ours are replayed, and its operations; a product by itself."""
    timed = ["--device", "cuda", "--rounds", "2", "--ops", "--json"]
    assert main(["bench", "--shape", "tiny", "--atoms", "8,27", "--train", *timed]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["machine"]["gpu"] == torch.cuda.get_device_name()
    kinds = [case["kind"] for case in document["cases"]]
    assert kinds[:5] == ["call", "training step"] * 2 + ["operation"]
    for case in document["cases"]:
        assert all(0 < s["low"] <= s["high"] for s in case["result"]["seconds"].values())
    assert document["cases"][0]["result"]["speedup"]["e3nn"]["median"] > 2  # it is replayed
    for device, name in (("cuda", torch.cuda.get_device_name()), ("cpu", None)):
        timed[1] = device
        assert main(["bench", *timed, "--edges", "600", "--only", "tutorial, unsorted"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["machine"]["gpu"] == name
        for case in document["cases"]:
            busy = [t["busy"] for t in case["timings"]["e3nn_accel"].values()]
            assert all(b is None if name is None else b > 0 for b in busy)
    assert main(["bench", "--shape", "tiny", "--device", "cuda:99"]) == 2
    assert "--device cuda:99: torch finds" in capsys.readouterr().err


def test_the_calculator() -> None:
    """MACECalculator in a short run of molecular dynamics: the same trajectory."""
    from ase import units
    from ase.md.verlet import VelocityVerlet
    from mace.calculators import MACECalculator

    def run(**options: Any) -> Any:
        model = shipped()
        atoms = structures.random_crystal(model, 40)
        with e3nn_accel.enabled(**options, **BACKEND):
            atoms.calc = MACECalculator(models=model, device="cuda", default_dtype="float64")
            VelocityVerlet(atoms, 0.5 * units.fs).run(15)
            return atoms.positions.copy(), counted()

    stock, _ = run(graph="0")
    ours, (replays, captures, _) = run(graph="auto")
    assert captures >= 1
    assert replays >= 10
    assert abs(ours - stock).max() < 1e-9
