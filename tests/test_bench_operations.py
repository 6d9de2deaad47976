"""`bench --ops` without a model: every product is the module it says, and is timed as it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from e3nn import o3

import e3nn_accel
from e3nn_accel.cli import bench_operations, main, product_timing
from e3nn_accel.cli.node_operations import NODE_OPERATIONS, NodeOperation, node_work
from e3nn_accel.cli.peers import PEERS
from e3nn_accel.cli.product_timing import MODES
from e3nn_accel.cli.products import PRODUCTS, Product, Work, work

BY_NAME = {product.name: product for product in PRODUCTS}
CPU = torch.device("cpu")


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.name)
def test_ours_and_stock_compute_the_same(product: Product) -> None:
    """On a few edges; and what is said of the edges is true."""
    here = work(product, 120, torch.float64, CPU)
    with e3nn_accel.enabled(self_check=False):
        torch.testing.assert_close(here.ours()(*here.tensors), here.stock()(*here.tensors))
    assert (here.edge_index is None) == (not product.fused)
    if here.edge_index is not None and product.is_sorted:
        assert bool((here.edge_index[1].diff() >= 0).all())


@pytest.mark.parametrize("operation", NODE_OPERATIONS, ids=lambda o: o.name)
def test_ours_and_stock_compute_the_same_on_nodes(operation: NodeOperation) -> None:
    """On a few nodes, whose species are those that node_attrs say."""
    if operation.kind in ("contraction", "radial"):
        pytest.importorskip("mace", reason="MACE isn't installed")
    here = node_work(operation, 300, torch.float64, CPU)
    with e3nn_accel.enabled(self_check=False):
        torch.testing.assert_close(here.ours()(*here.tensors), here.stock()(*here.tensors))
    assert len(here.tensors[0]) == 10 * operation.share
    assert (here.attrs is None) == (here.species is None) == (not operation.species)
    if here.attrs is not None:
        assert torch.equal(here.attrs.argmax(1), here.species)


def test_constants_have_the_precision_of_the_operands() -> None:
    """Those of a float32 module that was made float64 are others, and a contraction's couplings less dependent."""
    pytest.importorskip("mace", reason="MACE isn't installed")
    [operation] = (o for o in NODE_OPERATIONS if o.name == "contraction")
    for module in (
        work(BY_NAME["mace layer 2"], 300, torch.float64, CPU).module,
        node_work(operation, 300, torch.float64, CPU).module,
    ):
        constants = [t for t in module.buffers() if t.numel() > 1 and t.is_floating_point()]
        assert any(not torch.equal(t.float().double(), t) for t in constants)
    assert torch.get_default_dtype() == torch.float32


def test_mace_layer_2_has_the_shape_it_stands_for() -> None:
    """10 paths of 128 channels, outputs up to l = 3, 30 edges a node."""
    here = work(BY_NAME["mace layer 2"], 300, torch.float32, CPU)
    assert here.module.weight_numel == 10 * 128
    assert here.module.irreps_out.simplify() == o3.Irreps("256x0e+384x1o+384x2e+256x3o")
    assert [tuple(t.shape) for t in here.tensors] == [(10, 512), (300, 16), (300, 1280)]


def test_table_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All ways in all modes, with a spread; a peer that isn't there says so; nothing stays enabled."""
    plot = tmp_path / "operations.png"
    arguments = [
        "bench",
        "--ops",
        "--edges",
        "60",
        "--rounds",
        "2",
        "--only",
        "tutorial, unsorted",
        "--peers",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("tutorial, unsorted", "float64", *MODES))
    pytest.importorskip("matplotlib")
    assert main([*arguments, "--dtype", "float64", "--json", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert {"e3nn", "e3nn_accel"} <= set(case["timings"])
    for modes in case["timings"].values():
        assert list(modes) == list(MODES)
        assert all(0 < t["seconds"]["low"] <= t["seconds"]["high"] for t in modes.values())
    assert set(case["timings"]) | set(case["refused"]) >= set(PEERS)
    assert case["grouping"]["median"] > 0
    assert not e3nn_accel.switch.is_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "--only", "no such product"], "matches none of 'mace layer 1'"),
        (["--shape", "tiny", "--peers"], "--ops without a model"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rounds", [1, 3])
def test_long_calls(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a turn, but never so few that there are no quartiles."""
    monkeypatch.setattr(product_timing, "LONG", 0.0)
    calls: list[int] = []
    found = product_timing.time_ways({"one": lambda: calls.append(1)}, rounds, CPU)["one"]
    assert found.seconds.low <= found.seconds.median <= found.seconds.high
    timed = rounds if rounds > 1 else product_timing.CALLS
    assert len(calls) <= timed + product_timing.WARM_UP


def test_on_the_cpu_beside_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where --device says so: nothing is asked of the GPU, which is the default."""
    seen: list[str] = []

    def work_on(product: Product, edges: int, dtype: torch.dtype, device: torch.device) -> Work:
        seen.append(str(device))
        return work(product, edges, dtype, CPU)

    monkeypatch.setattr(bench_operations, "work", work_on)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    arguments = ["--edges", "60", "--rounds", "2", "--only", "tutorial, unsorted"]
    arguments = ["bench", "--ops", "--dtype", "float32", *arguments]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert seen == ["cpu"]
    text = capsys.readouterr().out
    assert "a GPU" not in text
    assert "atomics" not in text
    monkeypatch.setattr(bench_operations, "time_ways", lambda ways, rounds, device: {})
    with pytest.raises(KeyError, match="squares"):  # further than the device this gets on no CPU
        main(arguments)
    assert seen == ["cpu", "cuda"]


def test_stock_that_runs_out_of_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others fail in is said; the rest is timed."""
    modes_of = bench_operations.modes_of

    def without_second_derivatives(call: Any, tensors: Any) -> Any:
        runs = modes_of(call, tensors)
        if len(made) == 0:  # stock's come first

            def full() -> None:
                raise RuntimeError("The following operation failed\nCUDA out of memory. Tried")

            runs["and double"] = full
        made.append(runs)
        return runs

    made: list[Any] = []
    monkeypatch.setattr(bench_operations, "modes_of", without_second_derivatives)
    arguments = ["--edges", "60", "--rounds", "2", "--only", "tutorial, unsorted"]
    assert main(["bench", "--ops", "--dtype", "float32", *arguments]) == 0
    text = capsys.readouterr().out
    assert "no and double by e3nn: RuntimeError: CUDA out of memory. Tried" in text
    (stock,) = [line for line in text.splitlines() if line.split()[:1] == ["e3nn"]]
    assert stock.rstrip().endswith("-")
    assert len(made) == 2
