"""What the report says: modules, calls, backends, reasons and times, in text and JSON."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import fresh_python
import pytest
import torch
from small_models import BUILD, build, energy_and_forces, inputs_of, mace, molecules

import e3nn_accel
from e3nn_accel.reporting import Report


def call(module: torch.nn.Module, times: int = 1) -> torch.nn.Module:
    """Call it and give it back."""
    for _ in range(times):
        module(*inputs_of(module))
    return module


def cells(report: Report) -> set[tuple[Any, ...]]:
    """What can be known beforehand of its rows."""
    return {(r.cls, r.operation, r.backend, r.modules, r.calls) for r in report.rows}


def test_counts() -> None:
    """Calls are counted for each class, operation, backend and reason; modules once."""
    e3nn_accel.enable()
    first, second, hooked = build("Linear"), build("Linear"), build("Linear")
    product = build("FullyConnectedTensorProduct")
    handle = hooked.register_forward_hook(lambda *a: None)
    keep = [call(first, 3), call(second, 2), call(product), call(hooked, 4)]
    handle.remove()
    call(hooked)
    found = e3nn_accel.report()
    assert cells(found) == {
        ("Linear", "linear", "torch", 3, 6),
        ("Linear", "", "e3nn", 1, 4),
        ("FullyConnectedTensorProduct", "tensor_product", "torch", 1, 1),
    }
    assert found.heading.endswith(": on; 4 modules seen, 4 called, 7 of 11 calls accelerated")
    [fallback] = found.fallbacks
    assert fallback.detail == "it has hooks, which only stock e3nn runs"
    assert all(row.detail for row in found.rows)
    assert len(keep) == 4


def test_a_convolution_is_its_own_operation() -> None:
    """The same product called with and without edges is counted apart."""
    e3nn_accel.enable()
    module = build("TensorProduct")
    x, y, weight = inputs_of(module)
    edges = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 1, 0, 2]])
    module(x, y, weight)
    module(x, y, weight, edges)
    module(x, y, weight, edge_index=edges)
    assert cells(e3nn_accel.report()) == {
        ("TensorProduct", "tensor_product", "torch", 1, 1),
        ("TensorProduct", "convolution", "torch", 1, 2),
    }


def test_modules_that_are_gone_are_counted_once() -> None:
    """The report speaks of all that ran; copies made for the self-check are not among them."""
    import gc

    e3nn_accel.enable()
    module = call(build("TensorSquare"))
    gc.collect()
    found = e3nn_accel.report()
    assert "1 modules seen, 1 called, 1 of 1 calls" in found.heading
    del module
    gc.collect()
    assert e3nn_accel.report() == found
    call(build("TensorSquare"))
    gc.collect()
    assert "2 modules seen, 2 called, 2 of 2 calls" in e3nn_accel.report().heading
    (row,) = e3nn_accel.report().rows
    assert (row.modules, row.calls) == (2, 2)


def test_times_only_when_profiling() -> None:
    """Seconds are zero without profiling, and add up with it."""
    module = build("Linear")
    e3nn_accel.enable()
    call(module, 3)
    [row] = e3nn_accel.report().rows
    assert row.seconds == 0
    assert " ms " not in str(e3nn_accel.report())
    e3nn_accel.enable(profile=True)
    call(module)
    [once] = e3nn_accel.report().rows
    call(module, 20)
    [often] = e3nn_accel.report().rows
    assert 0 < once.seconds < often.seconds < 10
    assert " ms " in str(e3nn_accel.report())


def test_text_and_json_say_the_same() -> None:
    """The document has every row and field; the table has every class, backend and detail."""
    e3nn_accel.enable()
    keep = [call(build(name)) for name in BUILD]
    found = e3nn_accel.report()
    document = json.loads(found.to_json())
    assert document["heading"] == found.heading
    assert [tuple(row.values()) for row in document["rows"]] == [
        tuple(vars(row).values()) for row in found.rows
    ]
    text = str(found).splitlines()
    assert text[0] == found.heading
    assert text[1].split() == ["class", "operation", "backend", "calls", "detail"]
    for line, row in zip(text[2:], found.rows, strict=True):
        assert line.split()[:4] == [row.cls, row.operation, row.backend, str(row.calls)]
        assert line.endswith(row.detail)
    assert len(keep) == len(found.rows)


def test_before_during_and_after() -> None:
    """Off, on, and off again with what ran remembered."""
    assert ": off" in e3nn_accel.report().heading
    e3nn_accel.enable(strict=True)
    assert ": on, strict; " in e3nn_accel.report().heading
    module = call(build("Linear"), 2)
    e3nn_accel.disable()
    found = e3nn_accel.report()
    assert ": off; " in found.heading
    assert cells(found) == {("Linear", "linear", "torch", 1, 2)}
    call(module)
    assert cells(e3nn_accel.report()) == cells(found)


def test_single_models_are_named_in_the_heading() -> None:
    """Off globally, with some modules accelerated."""
    model = e3nn_accel.accelerate(torch.nn.Sequential(build("Linear")))
    count = len(list(model.modules()))
    assert f": off, {count} modules accelerated singly; " in e3nn_accel.report().heading
    call(model[0])
    assert cells(e3nn_accel.report()) == {("Linear", "linear", "torch", 1, 1)}


def test_accelerating_another_model_keeps_the_counts() -> None:
    """What has run is not forgotten when a further model is accelerated."""
    e3nn_accel.enable()
    module = call(build("Linear"), 2)
    other = e3nn_accel.accelerate(build("FullTensorProduct"))
    call(module)
    assert cells(e3nn_accel.report()) == {("Linear", "linear", "torch", 1, 3)}
    assert other is not None


class Net(torch.nn.Module):
    """One of each, one unsupported, one with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleDict({name: build(name) for name in BUILD})
        self.plain = torch.nn.Linear(2, 2)
        self.own = build("Linear")
        self.own.forward = lambda x: x  # type: ignore[method-assign]


def test_explain_before_any_call() -> None:
    """Every supported module has a row with its path, planned without being called."""
    net = Net()
    e3nn_accel.enable()
    found = e3nn_accel.explain(net)
    assert found.heading == "Net: 7 operations, 6 accelerated, 1 on e3nn"
    assert {row.path: row.backend for row in found.rows} == {
        **{f"parts.{name}": "torch" for name in BUILD},
        "own": "e3nn",
    }
    [own] = found.fallbacks
    assert own.detail == "it has a forward of its own"
    assert all(row.calls == 0 for row in found.rows)
    assert e3nn_accel.report().rows == ()


def test_explain_after_calls() -> None:
    """Modules that were called show what happened to them."""
    net = Net()
    e3nn_accel.enable()
    call(net.parts["Linear"], 2)
    half = net.parts["FullTensorProduct"].to(torch.bfloat16)
    half(*(x.to(torch.bfloat16) for x in inputs_of(half)))
    rows = {row.path: row for row in e3nn_accel.explain(net).rows}
    assert (rows["parts.Linear"].backend, rows["parts.Linear"].calls) == ("torch", 2)
    refused = rows["parts.FullTensorProduct"]
    assert (refused.backend, refused.calls) == ("e3nn", 1)
    assert "needs float32 or float64, got bfloat16" in refused.detail
    assert rows["parts.TensorSquare"].calls == 0


def test_explain_takes_the_dtype_of_the_model() -> None:
    """A module that was not called is planned in the model's precision."""
    e3nn_accel.enable()
    [row] = e3nn_accel.explain(build("Linear").to(torch.float16)).rows
    assert (row.backend, "got float16" in row.detail) == ("e3nn", True)
    [row] = e3nn_accel.explain(build("Linear").double()).rows
    assert row.backend == "torch"


def test_explain_when_off() -> None:
    """It answers as if enabled, leaves everything off, and the last report as it was."""
    module = build("Linear")
    e3nn_accel.enable()
    call(module)
    e3nn_accel.disable()
    before = e3nn_accel.report().rows
    [row] = e3nn_accel.explain(module).rows
    assert row.backend == "torch"
    assert not e3nn_accel.is_enabled()
    assert e3nn_accel.report().rows == before != ()


def test_explain_of_one_accelerated_model() -> None:
    """Others are not accelerated, and the explanation says so."""
    ours, other = e3nn_accel.accelerate(build("Linear")), build("Linear")
    assert [row.backend for row in e3nn_accel.explain(ours).rows] == ["torch"]
    assert [(r.backend, r.detail) for r in e3nn_accel.explain(other).rows] == [
        ("e3nn", "not accelerated")
    ]


def test_explain_a_mace_before_and_after_a_call() -> None:
    """Convolutions are announced as such beforehand; afterwards the same rows have calls."""
    model = mace()
    e3nn_accel.enable()
    before = e3nn_accel.explain(model)
    assert before.fallbacks == ()
    energy_and_forces(model, molecules())
    after = e3nn_accel.explain(model)
    key = lambda rows: [(r.path, r.cls, r.operation, r.backend, r.detail) for r in rows]  # noqa: E731
    assert key(after.rows) == key(before.rows)
    assert {r.operation for r in before.rows if r.path.endswith("conv_tp")} == {"convolution"}
    assert all(row.calls >= 1 for row in after.rows)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> fresh_python.FreshPython:
    """A Python that sees the project, with a program that uses e3nn."""
    python = fresh_python.make(tmp_path_factory.mktemp("python"), start_files=False)
    (python.folder / "program.py").write_text(
        "import sys, torch, e3nn_accel\n"
        "from e3nn import o3\n"
        "dtype = getattr(torch, sys.argv[1])\n"
        "module = o3.Linear('2x0e', '3x0e').to(dtype)\n"
        "model = module\n"
        "def run(times):\n"
        "    for _ in range(times): module(torch.ones(1, 2, dtype=dtype))\n"
        "exec(sys.argv[2])\n"
    )
    return python


def program(
    python: fresh_python.FreshPython, dtype: str, code: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the program."""
    return python.run("program.py", dtype, code, **variables)


USES = {
    "enable": "e3nn_accel.enable(); run(2)",
    "accelerate": "e3nn_accel.accelerate(module); run(2)",
    "enabled": "with e3nn_accel.enabled(): run(2)",
}


@pytest.mark.parametrize("use", USES)
def test_a_file_when_the_process_ends(
    python: fresh_python.FreshPython, tmp_path: Path, use: str
) -> None:
    """`E3NN_ACCEL_REPORT=file` has the report of all that ran, however it was switched on."""
    done = program(python, "float32", USES[use], E3NN_ACCEL_REPORT=str(tmp_path / "report.json"))
    document = json.loads((tmp_path / "report.json").read_text())
    [row] = document["rows"]
    assert (row["cls"], row["backend"], row["calls"]) == ("Linear", "torch", 2)
    assert "accelerated" not in done.stdout + done.stderr


def test_print_and_warn_when_the_process_ends(python: fresh_python.FreshPython) -> None:
    """`1` prints it on stderr; a process in which nothing was accelerated hears the top reason."""
    variables = {"E3NN_ACCEL_REPORT": "1", "E3NN_ACCEL_PLUGINS": "-cuda", "E3NN_ACCEL_LOG": "ERROR"}
    done = program(python, "bfloat16", "e3nn_accel.enable(); run(3)", **variables)
    assert done.stdout == ""
    assert "0 of 3 calls accelerated" in done.stderr
    warning = (
        "FallbackWarning: e3nn_accel accelerated nothing; most calls: Linear: torch: needs float32"
    )
    assert warning in done.stderr


def test_silence_by_default(python: fresh_python.FreshPython) -> None:
    """Nothing is printed at the end, neither where all went well nor where nothing was called."""
    for code in (
        "e3nn_accel.enable(); run(1)",
        "e3nn_accel.enable()",
        "e3nn_accel.explain(module)",
    ):
        done = program(python, "float32", code)
        assert "e3nn_accel" not in done.stdout + done.stderr


def test_explain_without_e3nn(python: fresh_python.FreshPython) -> None:
    """A model of plain torch, in a process that has no e3nn at all, has nothing to explain."""
    code = (
        "import sys, torch, e3nn_accel\n"
        "found = e3nn_accel.explain(torch.nn.Linear(2, 2))\n"
        "assert found.rows == () and 'e3nn' not in sys.modules, found"
    )
    python.run("-c", code)
