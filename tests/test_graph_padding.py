"""A padded batch means what the batch means: stock MACE's numbers, row for row, and no NaN."""

from __future__ import annotations

from math import isqrt
from typing import Any

import pytest
import torch
from model_graphs import alone, batch_of, fresh, headed, ice, water

from e3nn_accel.graphs import buffers, copying
from e3nn_accel.graphs.buffers import StaticInputs
from e3nn_accel.graphs.outputs import NotCapturable, produce, unpadded
from e3nn_accel.graphs.padding import AXES, Axis, Capacity, Size, dummies, feature_axes

pytest.importorskip("mace")
from small_models import mace, two_headed

pytestmark = pytest.mark.mace
CUTOFF = 4.0


STRUCTURES: dict[str, list[Any]] = {
    "molecule": [water()],
    "periodic": [ice()],
    "a surface": [ice(periodic=(True, True, False))],
    "three of different sizes": [ice(1), water(), ice(2, repeat=2)],
    "isolated atom": [alone()],
    "isolated atom among others": [water(), alone(), ice(3)],
    "far apart": [water(), alone(), alone()],
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "density": {
        "interaction": "RealAgnosticDensityResidualInteractionBlock",
        "pair_repulsion": True,
        "distance_transform": "Agnesi",
    },
    "nonlinear": {"interaction": "RealAgnosticResidualNonLinearInteractionBlock"},
    "no cutoff in the radial part": {"apply_cutoff": False, "distance_transform": "Soft"},
    "agnostic product": {"use_agnostic_product": True, "radial_type": "gaussian"},
}
FLAGS = {
    "forces": {},
    "stress": {"compute_stress": True},
    "virials": {"compute_virials": True},
    "displacement": {"compute_displacement": True},
}


def padded(
    model: Any, batch: dict[str, Any], size: Size, capacity: Capacity, flags: dict[str, bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stock MACE's results on padded inputs, the real rows; and all of them."""
    axes = {**AXES, **feature_axes(model)}
    inputs = {name: batch[name] for name in axes if name in batch}
    offsets = {name: -int(spec.get("offset", 0)) for name, spec in specs_of(model).items()}
    static = StaticInputs(dummies(inputs, axes, capacity, CUTOFF, offsets), axes, capacity)
    static.load(inputs, size)
    produced = produce(lambda data: model(data, **flags), static.tensors, capacity)
    names = [result.name for result in produced.results]
    rows = dict(zip(names, unpadded(produced, size), strict=True))
    return rows, dict(zip(names, produced.tensors, strict=True))


def specs_of(model: Any) -> dict[str, Any]:
    return getattr(model, "embedding_specs", None) or {}


def size_of(batch: dict[str, Any]) -> Size:
    return Size(len(batch["positions"]), batch["edge_index"].shape[1], len(batch["ptr"]) - 1)


def check(
    model: Any, batch: dict[str, Any], flags: dict[str, bool], capacity: Capacity | None = None
) -> None:
    """Against the same model on the batch as it is."""
    size = size_of(batch)
    rows, whole = padded(model, fresh(batch), size, capacity or Capacity.of(size), flags)
    data = fresh(batch)
    expected = model(data, **flags)
    if flags:
        expected |= {"positions": data["positions"], "shifts": data["shifts"]}
    assert rows.keys() == {name for name, value in expected.items() if value is not None}
    for name, found in rows.items():
        scale = float(expected[name].detach().abs().max()) if found.numel() else 1.0
        torch.testing.assert_close(
            found, expected[name].detach(), rtol=1e-12, atol=1e-12 * max(scale, 1e-3)
        )
        assert torch.isfinite(whole[name]).all(), name
    forces = whole["forces"][size.nodes :]
    assert torch.equal(forces, torch.zeros_like(forces))


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("structures", STRUCTURES.values(), ids=STRUCTURES)
def test_structures(structures: list[Any], flags: dict[str, bool]) -> None:
    check(mace(), batch_of(structures), flags)


@pytest.mark.parametrize("stress", [False, True], ids=["forces", "stress"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_models(options: dict[str, Any], stress: bool) -> None:
    batch = batch_of(STRUCTURES["isolated atom among others"])
    check(mace(**options), batch, {"compute_stress": True} if stress else {})


@pytest.mark.parametrize("stress", [False, True], ids=["forces", "stress"])
def test_heads(stress: bool) -> None:
    """Each structure has its own."""
    batch = batch_of(headed([ice(1), water(), ice(2)], "bab"), heads=("a", "b"))
    assert batch["head"].tolist() == [1, 0, 1]
    check(two_headed(), batch, {"compute_stress": True} if stress else {})


def test_further_inputs() -> None:
    """Charges and spins of whole structures, numbers of atoms."""
    specs = {
        "total_charge": {"type": "categorical", "per": "graph", "num_classes": 11, "emb_dim": 3,
                         "offset": 5},
        "weights": {"type": "continuous", "per": "node", "in_dim": 1, "emb_dim": 2},
    }  # fmt: skip
    model = mace(embedding_specs=specs, use_embedding_readout=True)
    batch = batch_of([ice(1), water()])
    batch["total_charge"] = torch.tensor([-5.0, 3.0], dtype=torch.float64)
    batch["weights"] = torch.rand(len(batch["positions"]), dtype=torch.float64)
    check(model, batch, {"compute_stress": True})


def test_plain_mace() -> None:
    """The class without scale and shift."""
    from mace.modules.models import MACE

    model = mace()
    plain = object.__new__(MACE)
    plain.__dict__ = {**model.__dict__}
    check(plain, batch_of([ice(), water()]), {"compute_stress": True})


@pytest.mark.parametrize(
    "capacity",
    [Capacity(40, 700, 9, 1), Capacity(64, 2048, 2 + 5, 30), Capacity(32, 666, 4, 5)],
    ids=str,
)
def test_any_capacity(capacity: Capacity) -> None:
    """One dummy node that is its own neighbour, many dummy graphs, hardly any dummies."""
    batch = batch_of([ice(1), water(), ice(2)])
    size = size_of(batch)
    assert capacity.nodes - capacity.reserved >= size.nodes
    assert capacity.edges >= size.edges
    check(mace(), batch, {"compute_stress": True}, capacity)


def test_float32() -> None:
    """Dummies are finite there, too; ZBL has high powers of their length."""
    model = mace(pair_repulsion=True, num_polynomial_cutoff=8).float()
    batch = {
        k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in batch_of([ice()]).items()
    }
    size = size_of(batch)
    rows, whole = padded(model, fresh(batch), size, Capacity.of(size), {"compute_stress": True})
    assert all(torch.isfinite(tensor).all() for tensor in whole.values())
    expected = model(fresh(batch), compute_stress=True)
    torch.testing.assert_close(rows["forces"], expected["forces"], rtol=1e-4, atol=1e-5)


def test_rows_become_dummies_again() -> None:
    """Buffers that held a larger batch hold what new ones would."""
    large = batch_of(headed([ice(1, repeat=2), water()], "bb"), heads=("a", "b"))
    small = batch_of(headed([ice(2)], "b"), heads=("a", "b"))
    capacity = Capacity.of(size_of(large))
    inputs = [{name: batch[name] for name in AXES if name in batch} for batch in (large, small)]
    static, new = (
        StaticInputs(dummies(inputs[0], AXES, capacity, CUTOFF, {}), AXES, capacity)
        for _ in range(2)
    )
    static.load(inputs[0], size_of(large))
    static.load(inputs[1], size_of(small))
    new.load(inputs[1], size_of(small))
    same_tensors(static, new)
    assert static.tensors["head"].tolist() == [1, 0, 0]
    ends = torch.bincount(static.tensors["batch"], minlength=capacity.graphs).cumsum(0)
    assert torch.equal(ends, static.tensors["ptr"][1:])


def same_tensors(found: StaticInputs, expected: StaticInputs) -> None:
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, expected.tensors[name]), name


def sizes_in_turns() -> tuple[list[dict[str, torch.Tensor]], list[Size], Capacity]:
    """Inputs of one to three structures, some of which differ in a few edges alone."""
    found = []
    for structures in ([ice(1), ice(2), ice(3)], [ice(4)], [ice(5, repeat=2), water()]):
        batch = batch_of(structures)
        inputs = {name: batch[name] for name in AXES if name in batch}
        found.append(inputs)
        fewer = {name: inputs[name].narrow(AXES[name].dim, 0, len(inputs["shifts"]) - 4)
                 for name in ("edge_index", "shifts", "unit_shifts")}  # fmt: skip
        found.append(inputs | fewer)
    return found, [size_of(inputs) for inputs in found], Capacity(40, 2000, 6, 5)


@pytest.mark.parametrize("together", [1 << 15, 20], ids=["few edges", "many edges"])
def test_sizes_that_come_and_go(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any other size, buffers hold what new ones would."""
    monkeypatch.setattr(copying, "COPIED_TOGETHER", together)
    inputs, sizes, capacity = sizes_in_turns()
    empty = dummies(inputs[0], AXES, capacity, CUTOFF, {})
    static = StaticInputs(empty, AXES, capacity)
    order = [0, 1, 0, 2, 3, 4, 5, 4, 2, 2, 0, 5, 3]
    for n in order:
        new = StaticInputs(empty, AXES, capacity)
        for loaded in (static, new):
            loaded.load(inputs[n], sizes[n])
        same_tensors(static, new)


def test_the_same_size_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What copies to where the last batch of that size lay serves the next, unless one lies in pieces."""
    inputs, sizes, capacity = sizes_in_turns()
    empty = dummies(inputs[0], AXES, capacity, CUTOFF, {})
    made: list[int] = []
    served: list[int] = []

    def copies_to(targets: list[torch.Tensor]) -> copying.Copy:
        made.append(len(targets))

        def copy(sources: Any) -> None:
            served.append(len(sources))
            copying.copy_all(targets, sources)

        return copy

    monkeypatch.setattr(buffers, "copies_to", copies_to)
    static = StaticInputs(empty, AXES, capacity)
    # every second batch's edges lie in pieces
    for n, (many, few) in ((0, (0, 0)), (0, (1, 0)), (0, (1, 1)), (1, (1, 1)), (1, (2, 1)), (1, (2, 1)), (0, (2, 1)),
                           (0, (3, 1)), (0, (3, 2)), (2, (3, 2)), (2, (4, 2)), (2, (4, 3))):  # fmt: skip
        drawn = {
            name: torch.randn_like(t) if t.is_floating_point() else t.clone()
            for name, t in inputs[n].items()
        }
        if n == 1:
            drawn["edge_index"] = drawn["edge_index"].T.contiguous().T
        new = StaticInputs(empty, AXES, capacity)
        static.load(drawn, sizes[n])
        new.load(drawn, sizes[n])
        same_tensors(static, new)
        assert (len(made), len(served)) == (many, few), n
    parts = len(inputs[0]) + 1  # edge_index has two
    assert set(made) == set(served) == {parts}


def test_a_load_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of it in the next."""
    inputs, sizes, capacity = sizes_in_turns()
    empty = dummies(inputs[0], AXES, capacity, CUTOFF, {})
    for first, interrupted, last in ((0, 2, 0), (2, 0, 2), (0, 1, 1), (1, 0, 0), (2, 2, 3)):
        static, new = (StaticInputs(empty, AXES, capacity) for _ in range(2))
        static.load(inputs[first], sizes[first])
        with monkeypatch.context() as patch:

            def some(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
                copying.copy_all(targets[::2], sources[::2])
                raise KeyboardInterrupt

            patch.setattr(buffers, "copy_all", some)
            with pytest.raises(KeyboardInterrupt):
                static.load(inputs[interrupted], sizes[interrupted])
        for loaded in (static, new):
            loaded.load(inputs[last], sizes[last])
        same_tensors(static, new)


def test_a_step_copies_in_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each dtype, though edges have come and gone."""
    inputs, sizes, capacity = sizes_in_turns()
    static = StaticInputs(dummies(inputs[0], AXES, capacity, CUTOFF, {}), AXES, capacity)
    static.load(inputs[0], sizes[0])
    calls: list[int] = []
    together = torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda a, b: (calls.append(len(a)), together(a, b))
    )
    inputs[1]["edge_index"] = inputs[1]["edge_index"].contiguous()
    static.load(inputs[1], sizes[1])
    floats, integers = 5 + 2, 3 + 2 + 2
    assert calls == [floats, integers]
    calls.clear()
    static.load(inputs[1], sizes[1])
    assert calls == [5, 3 + 2]


def test_dummies() -> None:
    """What the description of the dummy graph says."""
    batch = batch_of(headed([ice(1)], "b"), heads=("a", "b"))
    capacity = Capacity(50, 900, 3, 7)
    inputs = {name: batch[name] for name in AXES if name in batch}
    found = dummies(inputs, AXES, capacity, CUTOFF, {})
    assert {name: len(tensor) for name, tensor in found.items() if AXES[name].of == "graphs"} == {
        "cell": 9,
        "ptr": 4,
        "head": 3,
    }
    assert torch.equal(found["head"], torch.zeros(3, dtype=torch.int64))
    assert torch.equal(found["batch"], torch.full((50,), 2))
    cell = found["cell"].view(-1, 3, 3)
    assert (torch.linalg.det(cell) > CUTOFF**3).all()
    edges = found["edge_index"]
    assert int(edges.min()) == 43
    assert int(edges.max()) == 49
    degree = torch.bincount(edges[1])[43:]
    assert int(degree.max() - degree.min()) <= 1
    assert bool((found["unit_shifts"] != 0).any(1).all())
    lengths = found["shifts"].norm(dim=1)
    assert (lengths > CUTOFF).all()
    again = torch.einsum("be,bec->bc", found["unit_shifts"], cell[found["batch"][edges[0]]])
    assert torch.equal(again, found["shifts"])
    assert torch.equal(found["node_attrs"].sum(1), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("nodes", [1, 2, 9, 64, 100, 1000, 5000, 100_000])
@pytest.mark.parametrize("edges", [0, 1, 63, 64, 3000, 46_000, 10_000_000])
def test_sizes(nodes: int, edges: int) -> None:
    """Room for dummies and some more edges, little waste, and no growth of what was made for it."""
    size = Size(nodes, edges, 1)
    made = Capacity.of(size)
    assert made.takes(size)
    assert made.reserved >= 4
    assert made.nodes <= max(nodes + 10, 1.10 * nodes + 2)
    assert made.edges <= max(edges + 128, 1.06 * edges, edges + edges // 32 + 2 * edges**0.5)
    assert made.takes(Size(nodes, edges + edges // 64 + isqrt(edges), 1))
    assert made.takes(Size(nodes, edges - edges // 16, 1))
    assert not made.takes(Size(nodes, edges, 2))
    assert not made.takes(Size(made.nodes, edges, 1))
    assert not made.takes(Size(nodes, made.edges + 1, 1))
    assert not Capacity.of(Size(4 * nodes + 64, 4 * edges + 512, 1)).takes(size)


def test_axis() -> None:
    assert Axis("graphs", each=3).length(Size(1, 2, 4)) == 12
    assert Axis("graphs", extra=1).length(Capacity(1, 2, 4, 1)) == 5


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda data: [data["positions"]], "returned a list"),
        (lambda data: {"novel": data["positions"]}, "gives 'novel' as a result"),
        (lambda data: {"energy": data["positions"]}, "energy has shape"),
        (lambda data: {"energy": 1.0}, "gives 'energy' as a result"),
        (lambda data: data.update(more=data["ptr"]) or {}, "gives 'more' into the batch"),
    ],
)
def test_results_of_which_nothing_is_known(forward: Any, why: str) -> None:
    capacity = Capacity(10, 20, 2, 2)
    inputs = {"positions": torch.zeros(10, 3), "ptr": torch.zeros(3)}
    with pytest.raises(NotCapturable, match=why):
        produce(forward, inputs, capacity)
