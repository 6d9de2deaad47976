"""`bench --profile`: where a step goes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType

from e3nn_accel.cli import bench_profile, main
from e3nn_accel.cli.module_times import OTHER, profile, summed
from e3nn_accel.cli.step_parts import PARTS, Clock

MODEL = Path(__file__).parent.parent / "examples/water_ethanol/water_ethanol.model"
pytestmark = pytest.mark.once


@pytest.mark.mace
def test_a_step_of_a_model(capfd: pytest.CaptureFixture[str]) -> None:
    """Every part has its time, stock beside ours; modules have theirs, forward and backward."""
    pytest.importorskip("mace")
    import mace.calculators.mace as calculators
    from mace.modules.models import ScaleShiftMACE

    capfd.readouterr()
    before = dict(vars(calculators.MACECalculator)), dict(vars(ScaleShiftMACE))
    code = main(["bench", str(MODEL), "--atoms", "8", "--profile", "--rounds", "5", "--json"])
    assert code == 0
    assert (dict(vars(calculators.MACECalculator)), dict(vars(ScaleShiftMACE))) == before
    steps = json.loads(capfd.readouterr().out)["steps"]
    assert [s["way"] for s in steps] == ["e3nn", "eager"]
    for step in steps:
        assert list(step["parts"]) == list(PARTS)
        assert 0 < step["whole"]["low"] <= step["whole"]["median"] <= step["whole"]["high"]
        assert all(seconds > 0 for name, seconds in step["parts"].items() if name != PARTS[0])
        contraction = step["profile"]["modules"]["products.0.symmetric_contractions"]
        assert min(contraction) > 0
        spent = sum(map(sum, step["profile"]["modules"].values()))
        assert 0 < spent < 10 * step["whole"]["high"]
        assert step["profile"]["launches"] == step["profile"]["busy"] == 0
    stock, ours = (step["parts"]["neighbour list"] for step in steps)
    assert stock > 0 == ours
    stock, ours = (step["parts"]["batch"] for step in steps)
    assert ours < stock  # no batch of MACE's is made for it


@pytest.mark.slow
@pytest.mark.mace
def test_nothing_is_timed_after_the_profiler_ran(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays attached to a GPU's driver, and each launch then takes longer."""
    pytest.importorskip("mace")
    done: list[str] = []

    def noted(name: str) -> None:
        stock = getattr(bench_profile, name)
        monkeypatch.setattr(
            bench_profile, name, lambda *given: (done.append(name), stock(*given))[1]
        )

    noted("_timed")
    noted("profile")
    sizes = ["--atoms", "8,16"]
    assert main(["bench", "--shape", "tiny", *sizes, "--profile", "--rounds", "2"]) == 0
    assert done == ["_timed"] * 4 + ["profile"] * 4


@pytest.mark.slow
@pytest.mark.mace
def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """Three kinds of tables, of a shape with random weights."""
    pytest.importorskip("mace")
    code = main(["bench", "--shape", "tiny", "--atoms", "8", "--profile", "--rounds", "2"])
    out = capsys.readouterr().out
    assert code == 0
    for text in (
        *PARTS,
        "CPU time by module",
        "interactions.1.conv_tp",
        "time by operation",
        "eager",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "--ops"], "--profile goes with none"),
        (["--profile", "--train", "--device", "cpu"], "--profile goes with none"),
    ],
)
def test_arguments_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """One line, exit code 2."""
    assert main(["bench", "--shape", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


class Two(torch.nn.Module):
    """A forward pass and the backward pass within it, as MACE's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(30, 200)
        self.second = torch.nn.Linear(200, 300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_(True)
        y = self.second(self.first(x)).sin().sum()
        [gradient] = torch.autograd.grad([y], [x])
        return gradient


def test_operations_belong_to_their_modules() -> None:
    """Those of the backward pass to the module whose forward made their nodes."""
    model, x = Two(), torch.randn(500, 30)
    found = profile(lambda: model(x.detach()), model, 2)
    assert set(found.modules) <= {"first", "second", "Two", OTHER}
    assert all(min(found.modules[name]) > 0 for name in ("first", "second", "Two"))
    assert found.kernels["aten::addmm"][0] == found.kernels["aten::mm"][0] == 2
    assert "__call__" not in vars(Two)


def event(name: str, parent: Any = None, **fields: Any) -> Any:
    """Of the profiler."""
    given: dict[str, Any] = {
        "sequence_nr": -1,
        "scope": 0,
        "kernels": [],
        "device_type": DeviceType.CPU,
    }
    return SimpleNamespace(name=name, cpu_parent=parent, **given | fields)


def kernel(name: str, start: float, end: float) -> Any:
    """As it ran on the device."""
    times = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return event(name, time_range=times, device_type=DeviceType.CUDA)


def test_kernels_on_a_gpu() -> None:
    """By the operation or the module that launched them; overlaps are busy once; a graph's are elsewhere."""
    launched = [SimpleNamespace(duration=d) for d in (3.0, 4.0, 5.0)]
    inside = event("module: a")
    forward = event("aten::mm", inside, sequence_nr=7, kernels=launched[:1])
    ours = event("module: b", kernels=launched[1:2])
    node = event("autograd::engine::evaluate_function: MmBackward0", sequence_nr=7)
    backward = event("aten::mm", node, kernels=launched[2:])
    on_device = [
        kernel("gemm", 0, 3),
        kernel("convolution", 2, 6),
        kernel("gemm", 10, 15),
        kernel("replayed", 20, 28),
        kernel("module: a", 0, 100),
    ]
    found = summed([inside, forward, ours, node, backward, *on_device], 2, on_gpu=True)
    scale = 1e-6 / 2
    assert dict(found.modules) == {
        "a": pytest.approx([3 * scale, 5 * scale]),
        "b": pytest.approx([4 * scale, 0]),
        OTHER: pytest.approx([8 * scale, 0]),
    }
    assert found.kernels["gemm"] == pytest.approx([1.0, 8 * scale])
    assert set(found.kernels) == {"gemm", "convolution", "replayed"}
    assert found.launches == 2
    assert found.busy == pytest.approx((6 + 5 + 8) * scale)


def test_parts_within_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own time alone, also where one raises."""
    now = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    clock = Clock(torch.device("cpu"))
    with clock.part("outer"):
        with clock.part("inner"):
            pass
        with pytest.raises(ZeroDivisionError), clock.part("inner"):
            1 / 0
    assert clock.seconds["inner"] > 0
    assert clock.seconds["inner"] + clock.seconds["outer"] == pytest.approx(clock.host["outer"] + 1)
