"""Every command of the command line: its output for people and for programs, and its exit codes."""

import json
import sys
import warnings

import pytest
import torch

import e3nn_accel
from e3nn_accel import config
from e3nn_accel.cli import COMMANDS, main
from e3nn_accel.cli.tables import Table, plain
from e3nn_accel.hookspecs import HealthCheck


@pytest.fixture
def command(capsys):
    """Run a command in this process: exit code, standard output, standard error."""

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse
            code = leaving.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def json_of(command):
    """Run a command with --json: exit code and the document, which must be all of the output."""

    def run(*arguments):
        code, out, _ = command(*arguments, "--json")
        return code, json.loads(out, parse_constant=pytest.fail)

    return run


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A tiny MACE with seeded weights, saved as MACE saves models."""
    pytest.importorskip("mace")
    from e3nn_accel.cli.shapes import build

    path = tmp_path_factory.mktemp("model") / "tiny.model"
    model = build("tiny")
    model.scale_shift.scale.fill_(1000.0)  # energies and forces as large as a real model's
    torch.save(model, path)
    return path


@pytest.fixture(scope="module")
def structure_file(tmp_path_factory):
    import ase
    import ase.io

    path = tmp_path_factory.mktemp("structures") / "two.xyz"
    water = ase.Atoms("OH2", [[0, 0, 0], [0.76, 0.59, 0.1], [-0.76, 0.59, 0]])
    box = ase.Atoms("SiO2H", [[0, 0, 0], [1.6, 0.1, 0], [0.2, 1.7, 0.3], [0.1, 0, 1.5]])
    box.set_cell([4.1, 4.3, 4.2])
    box.pbc = True
    ase.io.write(path, [water, box])
    return path


# ---- all commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"{name} [" in out or f"{name} [-h]" in out
    assert len(out.splitlines()) > 5


# ---- info


def test_info_tells_variables_with_their_source(json_of, monkeypatch):
    monkeypatch.setenv("E3NN_ACCEL_SKIP", "Linear")
    monkeypatch.delenv("E3NN_ACCEL_BACKEND", raising=False)
    code, document = json_of("info")
    assert code == 0
    variables = {v["name"]: v for v in document["variables"]}
    assert [*variables] == [v.name for v in config.VARIABLES]
    assert variables["E3NN_ACCEL_SKIP"]["value"] == "Linear"
    assert variables["E3NN_ACCEL_SKIP"]["source"] == "environment"
    assert variables["E3NN_ACCEL_BACKEND"]["value"] == "auto"
    assert variables["E3NN_ACCEL_BACKEND"]["source"] == "default"
    assert document["machine"]["versions"]["e3nn_accel"] == e3nn_accel.__version__
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert "torch" in document["plugins"]
    assert document["backends"]["torch"] == "available"


def test_the_build_of_torch(json_of, monkeypatch):
    """Of PyPI's wheels metadata have the version alone, the module has the CUDA that it was built for, too."""
    monkeypatch.setattr(torch, "__version__", "2.4.1+cu121")
    _, document = json_of("info")
    assert document["machine"]["versions"]["torch"] == "2.4.1+cu121"


def test_info_for_people(command):
    code, out, _ = command("info")
    assert code == 0
    assert torch.__version__ in out
    assert all(v.name in out for v in config.VARIABLES)


def test_info_names_blocked_plugins(json_of, monkeypatch):
    monkeypatch.setenv("E3NN_ACCEL_PLUGINS", "-linear")
    _, document = json_of("info")
    assert document["blocked"] == ["linear"]
    assert "linear" not in document["plugins"]


# ---- doctor


def test_doctor_finds_no_failure_here(json_of):
    code, document = json_of("doctor")
    status = {check["check"]: check["status"] for check in document["checks"]}
    assert code == 0
    assert document["ok"] is True
    assert "fail" not in status.values()
    assert status["self-test"] == status["backends"] == status["plugins"] == "ok"
    assert status["gpu"] == "ok" or torch.cuda.is_available()


def test_doctor_for_people_gives_advice_where_it_is_needed(command, monkeypatch):
    monkeypatch.setenv("E3NN_ACCEL_SKIPP", "Linear")
    code, out, _ = command("doctor")
    assert code == 0
    assert "did you mean 'E3NN_ACCEL_SKIP'" in out
    assert "variables: 'e3nn-accel info' lists" in out
    assert "nothing failed" in out
    assert "self-test: " not in out  # advice for what is in order would be noise


def test_doctor_fails_without_a_backend(json_of, monkeypatch):
    monkeypatch.setenv("E3NN_ACCEL_PLUGINS", "-torch,-cuda")
    code, document = json_of("doctor")
    failed = {check["check"]: check for check in document["checks"] if check["status"] == "fail"}
    assert code == 1
    assert document["ok"] is False
    assert {*failed} == {"backends", "self-test"}
    assert "unblock" in failed["backends"]["advice"]
    assert "no such backend" in failed["self-test"]["found"]


def test_doctor_fails_on_wrong_numbers(json_of, monkeypatch):
    from e3nn_accel.backends.torch import linear

    right = linear.plan

    def plan(*args):
        strategy, run = right(*args)
        return strategy, lambda *operands: 1.001 * run(*operands)

    monkeypatch.setattr(linear, "plan", plan)
    monkeypatch.setenv("E3NN_ACCEL_SELF_CHECK", "0")
    code, document = json_of("doctor")
    (failed,) = [check for check in document["checks"] if check["status"] == "fail"]
    assert code == 1
    assert failed["found"] == "o3.Linear differs from stock e3nn"


@pytest.mark.parametrize(
    ("answer", "status", "found"),
    [
        (lambda: ("ok", "plenty"), "ok", "plenty"),
        (lambda: ("fail", "full"), "fail", "full"),
        (lambda: 1 / 0, "fail", "ZeroDivisionError: division by zero"),
    ],
)
def test_doctor_runs_the_checks_of_plugins(json_of, monkeypatch, answer, status, found):
    from e3nn_accel import builtins, hookimpl

    class Plugin:
        @hookimpl
        def e3nn_accel_health_checks(self):
            yield HealthCheck("disk", answer, "free some space")

    monkeypatch.setitem(builtins.PLUGINS, "disks", Plugin())
    code, document = json_of("doctor")
    (check,) = [check for check in document["checks"] if check["check"] == "disk"]
    assert (check["status"], check["found"]) == (status, found)
    assert check["advice"] == ("" if status == "ok" else "free some space")
    assert code == (1 if status == "fail" else 0)


def test_doctor_reports_a_plugin_that_breaks(json_of, monkeypatch):
    from e3nn_accel import builtins, hookimpl

    class Plugin:
        @hookimpl
        def e3nn_accel_backends(self):
            raise OSError("no driver")

    monkeypatch.setitem(builtins.PLUGINS, "broken", Plugin())
    code, document = json_of("doctor")
    (failed,) = [check for check in document["checks"] if check["status"] == "fail"]
    assert code == 1
    assert failed["check"] == "plugins"
    assert "broken" in failed["found"]
    assert "no driver" in failed["found"]


def test_the_version_check_warns_outside_the_range(monkeypatch):
    from e3nn_accel import health

    monkeypatch.setattr(health, "version_of", lambda name: "0.9.1" if name == "e3nn" else None)
    status, found = health._versions()
    assert status == "warn"
    assert "e3nn 0.9.1 is not >=0.4.4,<0.7" in found


# ---- explain


@pytest.mark.mace
def test_explain(command, json_of, model_file):
    code, document = json_of("explain", model_file)
    assert code == 0
    assert len(document["rows"]) == 16
    assert {row["backend"] for row in document["rows"]} == {"torch"}
    code, out, _ = command("explain", model_file)
    assert code == 0
    assert "16 operations, 16 accelerated, 0 on e3nn" in out
    assert all(row["path"] in out for row in document["rows"])


@pytest.mark.mace
def test_explain_tells_why_not(json_of, model_file, monkeypatch):
    monkeypatch.setenv("E3NN_ACCEL_SKIP", "SymmetricContraction")
    _, document = json_of("explain", model_file)
    fallen = [row for row in document["rows"] if row["backend"] == "e3nn"]
    assert {row["cls"] for row in fallen} == {"SymmetricContraction"}
    assert all("E3NN_ACCEL_SKIP" in row["detail"] for row in fallen)


def test_explain_needs_no_mace(json_of, tmp_path):
    from e3nn import o3

    torch.save(torch.nn.Sequential(o3.Linear("2x0e", "3x0e"), torch.nn.Tanh()), tmp_path / "m.pt")
    code, document = json_of("explain", tmp_path / "m.pt")
    assert code == 0
    assert [(row["path"], row["backend"]) for row in document["rows"]] == [("0", "torch")]


# ---- files that can't be used


@pytest.mark.parametrize("name", ["explain", "verify", "bench"])
def test_missing_files(command, tmp_path, name):
    code, out, err = command(name, tmp_path / "none.model")
    assert code == 2
    assert not out
    assert err.count("\n") == 1
    assert "none.model: there is no such file" in err


@pytest.mark.parametrize("name", ["explain", "verify", "bench"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "not a model saved by torch.save"),
        ("empty", "not a model saved by torch.save"),
        ("state_dict", "holds a state_dict, without the model"),
        ("training", "holds a training checkpoint, without the model"),
        ("tensor", "holds a Tensor, not a model"),
        ("script", "TorchScript"),
    ],
)
def test_files_that_are_no_models(command, tmp_path, name, content, message):
    path = tmp_path / "file.model"
    layer = torch.nn.Linear(2, 2)
    if content in ("text", "empty"):
        path.write_text("not a pickle\n" if content == "text" else "")
    elif content == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(layer).save(path)
    else:
        saved = {
            "state_dict": layer.state_dict(),
            "training": {"model": layer.state_dict(), "optimizer": {}, "epoch": 3},
            "tensor": torch.ones(3),
        }
        torch.save(saved[content], path)
    code, out, err = command(name, path)
    assert code == 2
    assert not out
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("name", ["verify", "bench"])
def test_models_that_are_not_mace(command, tmp_path, name):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "linear.model")
    code, _, err = command(name, tmp_path / "linear.model")
    assert code == 2
    assert "holds a Linear, not a MACE model" in err


def test_pickles_of_packages_that_are_not_installed(command, tmp_path, monkeypatch):
    module = type(sys)("soon_gone")
    module.Thing = type("Thing", (), {"__module__": "soon_gone"})
    monkeypatch.setitem(sys.modules, "soon_gone", module)
    torch.save(module.Thing(), tmp_path / "thing.model")
    monkeypatch.delitem(sys.modules, "soon_gone")
    code, _, err = command("verify", tmp_path / "thing.model")
    assert code == 2
    assert "needs the package 'soon_gone'" in err


@pytest.mark.mace
@pytest.mark.parametrize("name", ["verify", "bench"])
def test_structures_that_cannot_be_used(command, model_file, tmp_path, name):
    import ase.build
    import ase.io

    gold, nonsense = tmp_path / "gold.xyz", tmp_path / "nonsense.xyz"
    ase.io.write(gold, ase.build.bulk("Au"))
    nonsense.write_text("three\nblind mice\n")
    for path, message in (
        (tmp_path / "none.xyz", "no such file"),
        (nonsense, "ase can't read it"),
        (gold, "doesn't know Au"),
    ):
        code, _, err = command(name, model_file, "--structures", path)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1


# ---- verify


@pytest.mark.mace
def test_verify_passes(json_of, model_file, structure_file):
    code, document = json_of("verify", model_file, "--structures", structure_file)
    assert code == 0
    assert document["passed"] is True
    assert document["verdict"].startswith("PASSED")
    assert [d["dtype"] for d in document["dtypes"]] == ["float64", "float32"]
    for dtype in document["dtypes"]:
        assert (dtype["modules"], dtype["accelerated"], dtype["fallbacks"]) == (16, 16, [])
        assert [s["atoms"] for s in dtype["structures"]] == [3, 4]
        quantities = [{row["quantity"] for row in s["rows"]} for s in dtype["structures"]]
        assert quantities[1] - quantities[0] == {"stress"}  # only the second has a cell


@pytest.mark.mace
def test_verify_for_people(command, model_file):
    code, out, _ = command("verify", model_file, "--dtype", "float64", "--train")
    assert code == 0
    assert "PASSED" in out.splitlines()[-1]
    assert "16 of 16 modules accelerated in float64" in out
    assert out.count("gradients") == 1  # of all parameters, the worst
    code, out, _ = command("verify", model_file, "--dtype", "float64", "--tolerance-report")
    assert code == 0
    assert "1e-8 eV/A, largest component" in out
    assert out.count("rotated forces") == 3  # of both structures, and in the criteria


@pytest.fixture
def wrong_linear(monkeypatch):
    """The torch backend's linear, off by a thousandth."""
    from e3nn_accel.backends.torch import linear

    right = linear.plan

    def plan(*args):
        strategy, run = right(*args)
        return strategy, lambda *operands: 1.001 * run(*operands)

    monkeypatch.setattr(linear, "plan", plan)


@pytest.mark.mace
def test_verify_fails_on_wrong_numbers(command, json_of, model_file, wrong_linear, monkeypatch):
    monkeypatch.setenv("E3NN_ACCEL_SELF_CHECK", "0")
    code, document = json_of("verify", model_file, "--dtype", "float64")
    assert code == 1
    assert document["passed"] is False
    code, out, _ = command("verify", model_file, "--dtype", "float64")
    assert code == 1
    assert out.splitlines()[-1].startswith("FAILED")
    assert "FAILED  " in out  # in the row, too


@pytest.mark.mace
def test_verify_lists_what_the_self_check_kept_out(command, model_file, wrong_linear):
    code, out, err = command("verify", model_file, "--dtype", "float64")
    assert code == 0
    (line,) = [line for line in out.splitlines() if "node_embedding.linear" in line]
    assert line.startswith("  on stock e3nn: node_embedding.linear (Linear): ")
    assert "torch: self-check" in line
    assert out.splitlines()[-1].endswith("fell back")
    assert "FallbackWarning" not in err  # said once is enough


def test_unknown_dtypes(command, tmp_path):
    code, _, err = command("verify", tmp_path / "any.model", "--dtype", "float16")
    assert code == 2
    assert "'float16': wanted one or both of float32,float64" in err


# ---- bench


@pytest.mark.mace
def test_bench(json_of, model_file, tmp_path):
    plot = tmp_path / "out.png"
    pytest.importorskip("matplotlib")
    code, document = json_of(
        "bench", model_file, "--atoms", "4,8", "--rounds", 2, "--ops", "--train",
        "--against", "e3nn,torch", "--threads", 1, "--plot", plot,
    )  # fmt: skip
    assert code == 0
    assert document["machine"]["threads"] == 1
    cases = document["cases"]
    kinds = [case["kind"] for case in cases]
    assert kinds[:4] == ["call", "training step"] * 2
    assert [case["detail"].split(" atoms")[0] for case in cases[:4:2]] == ["4", "8"]
    assert {*cases[0]["result"]["seconds"]} == {"e3nn", "torch", "e3nn_accel"}
    for case in cases:
        spreads = [*case["result"]["seconds"].values(), *case["result"]["speedup"].values()]
        assert all(0 < s["low"] <= s["median"] <= s["high"] for s in spreads)
    operations = [case for case in cases if case["kind"] == "operation"]
    paths = {p for case in operations for p in case["name"].split(": ")[1].split(", ")}
    assert len(paths) == 16  # every module is in some operation
    assert {case["mode"] for case in operations} == {"forward", "forward+backward", "with weights"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not e3nn_accel.is_enabled()


@pytest.mark.mace
def test_bench_for_people_gives_no_number_without_spread(command, model_file, structure_file):
    code, out, _ = command("bench", model_file, "--structures", structure_file, "--rounds", 3)
    assert code == 0
    assert "median [quartiles] of 3 rounds" in out
    (line,) = [line for line in out.splitlines() if "energy+forces" in line]
    figures = line.split("float32")[1].replace("] ", "]|").split("|")
    assert len(figures) == 3
    assert all("[" in figure and figure.strip().endswith("]") for figure in figures)


@pytest.mark.mace
def test_bench_times_stock_as_stock_and_ours_as_ours(command, model_file, monkeypatch):
    """Stock must not pass through a plan, ours must not fall back, whatever is timed."""
    from e3nn_accel.cli import timing
    from e3nn_accel.dispatch import Dispatcher

    counts = {"plans": 0}
    run = Dispatcher.run

    def counted(*args):
        counts["plans"] += 1
        return run(*args)

    seen = {}

    def measure(ways, ours, rounds, device):
        for name, prepare in ways.items():
            call = prepare()
            before = counts["plans"]
            call()
            seen.setdefault(name, []).append(counts["plans"] - before)
        assert device == torch.device("cpu")
        return original(ways, ours, rounds, device)

    original = timing.measure
    monkeypatch.setattr(Dispatcher, "run", counted)
    for module in ("cases", "operations"):
        monkeypatch.setattr(f"e3nn_accel.cli.{module}.measure", measure)
    code, _, _ = command("bench", model_file, "--atoms", 4, "--rounds", 2, "--ops")
    assert code == 0
    assert {*seen["e3nn"]} == {0}
    assert seen["e3nn_accel"][0] == 16
    assert {*seen["e3nn_accel"][1:]} == {1}


@pytest.mark.mace
def test_operations_of_a_model_whose_calls_are_replayed(json_of, model_file, monkeypatch):
    """As on a GPU: the whole call is a graph, its operations are found all the same."""
    from model_graphs import CpuLane

    from e3nn_accel.graphs.calls import ModelCalls

    replays = []

    class Lane(CpuLane):
        def record(self, run, derivative=None):
            found = super().record(run, derivative)
            found.replay = lambda: replays.append(1)  # no module of the model is called
            return found

    create = ModelCalls.__init__

    def on_the_cpu(self, runner_for):
        create(self, runner_for)
        self.device_type, self.lane_for = "cpu", Lane

    monkeypatch.setattr(ModelCalls, "__init__", on_the_cpu)
    code, document = json_of("bench", model_file, "--atoms", 4, "--rounds", 2, "--ops")
    assert code == 0
    assert len(replays) > 2
    operations = [case for case in document["cases"] if case["kind"] == "operation"]
    paths = {p for case in operations for p in case["name"].split(": ")[1].split(", ")}
    assert len(paths) == 16


def test_a_gpu_is_waited_for_after_each_call(monkeypatch):
    """And before the first, for inputs that are still being made."""
    from e3nn_accel.cli import timing

    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(str(device)))
    monkeypatch.setattr(timing, "WARM_UP", 0)
    monkeypatch.setattr(timing, "MOST_REPEATS", 2)
    way = lambda: lambda: seen.append("call")  # noqa: E731
    timing.measure({"ours": way}, "ours", 2, torch.device("cuda:1"))
    sample = ["cuda:1", "call", "cuda:1", "call", "cuda:1"]
    assert seen == [*sample[:3], *sample, *sample]
    seen.clear()
    timing.measure({"ours": way}, "ours", 2, torch.device("cpu"))
    assert {*seen} == {"call"}


def test_figures_are_of_the_device_that_was_timed(monkeypatch):
    """A heading names the processor where a GPU had nothing to do."""
    from e3nn_accel.cli.machine import this_machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    assert this_machine("cpu").gpu is None
    assert this_machine("cuda:1").heading.startswith("a GPU, cuda:1, ")
    assert this_machine().gpu == "a GPU, cuda"


@pytest.mark.mace
def test_a_model_that_does_not_fit(command, model_file, monkeypatch):
    """One line."""
    from e3nn_accel.cli.cases import Bench

    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")

    monkeypatch.setattr(Bench, "cases", full)
    code, out, err = command("bench", model_file, "--atoms", 4)
    assert (code, out) == (1, "")
    assert err.strip().endswith("error: CUDA out of memory. Tried to")


@pytest.mark.mace
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a MODEL or --shape"),
        (("MODEL", "--shape", "tiny"), "give a MODEL or --shape"),
        (("MODEL", "--rounds", "1"), "one round has no spread"),
        (("MODEL", "--atoms", "0"), "wanted a whole number above zero"),
        (("MODEL", "--against", "abacus"), "--against abacus: there are e3nn, "),
        (("MODEL", "--rounds", "2", "--atoms", "4", "--plot", "/nowhere/x.png"), "--plot"),
    ],
)
def test_bench_arguments_that_make_no_sense(command, model_file, arguments, message):
    code, out, err = command("bench", *[model_file if a == "MODEL" else a for a in arguments])
    assert code == 2
    assert not out
    assert message in err


@pytest.mark.mace
def test_shapes_have_random_weights_that_are_the_same_each_time():
    pytest.importorskip("mace")
    from e3nn_accel.cli.shapes import build, silicon, structure

    generator = torch.get_rng_state()
    first, again = build("tiny").state_dict(), build("tiny").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [len(silicon(n)) for n in (8, 64, 65, 512)] == [8, 64, 216, 512]
    assert structure("tiny", 8) == silicon(8)
    water = [structure("off-large", n) for n in (1, 4, 648)]
    assert [len(atoms) for atoms in water] == [3, 24, 648]
    assert water[-1].get_chemical_formula() == "H432O216"
    assert 0.9 < water[-1].get_masses().sum() / water[-1].get_volume() / 0.6022 < 1.1  # g/cm3


# ---- tables


def test_plain_tables_are_aligned():
    table = Table(("name", "value"), [("a", "1.5"), ("long name", "12.5")], "title")
    assert plain(table) == [
        "title",
        "  name       value",
        "  a            1.5",
        "  long name   12.5",
    ]


def test_tables_on_a_terminal_are_drawn_by_rich(monkeypatch, capsys):
    pytest.importorskip("rich")
    from e3nn_accel.cli import tables

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    tables.show(Table(("a", "b"), [("[bold]x", "ok")]))
    assert "[bold]x" in capsys.readouterr().out  # text from elsewhere is no markup


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "wanted cpu, cuda"),
        ("meta", "wanted cpu, cuda"),
        ("cuda:99", "--device cuda:99: torch finds"),
    ],
)
@pytest.mark.parametrize("name", ["verify", "explain", "bench"])
def test_devices_that_are_not_there(command, name, device, message):
    code, out, err = command(name, "MODEL", "--device", device)
    assert code == 2
    assert not out
    assert message in err


@pytest.mark.parametrize("arguments", [("MODEL",), ("MODEL", "--profile"), ("--ops",)], ids=str)
def test_benchmarks_of_a_device_without_one(command, monkeypatch, arguments):
    """In a line; what torch counts as devices doesn't help where CUDA doesn't work."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    code, out, err = command("bench", *arguments, "--device", "cuda")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "error: --device cuda: torch finds no CUDA devices; `e3nn-accel doctor`" in err
