"""Lists of pairs: the edges are MACE's own whenever a list says that it covers them."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from e3nn_accel import compat
from e3nn_accel.neighbours import pairs as listed
from e3nn_accel.neighbours import search as searches
from e3nn_accel.neighbours.pairs import SKIN, Edges, Pairs
from e3nn_accel.neighbours.search import by_mace, by_vesin, search
from e3nn_accel.neighbours.snapshot import Snapshot

neighborhood = pytest.importorskip("mace.data.neighborhood")
pytestmark = [pytest.mark.mace, pytest.mark.once]

CUTOFF = 4.0
EVERYWHERE, NOWHERE = (True, True, True), (False, False, False)


CPU = torch.device("cpu")


@pytest.fixture(params=["matscipy", "vesin"])
def finder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists by each of those who search; vesin's are made on a GPU, where there is one."""
    if request.param == "vesin":
        pytest.importorskip("vesin")
        monkeypatch.setattr(listed, "search", by_vesin)


class Structure(NamedTuple):
    """Where atoms start, within the cell unless that has no volume."""

    atoms: int
    cell: Any
    pbc: tuple[bool, bool, bool]


STRUCTURES = {
    "cube": Structure(60, 9.0 * np.eye(3), EVERYWHERE),
    "skewed": Structure(40, [[9, 0.4, 0], [5.5, 7, 0.3], [-3, 2, 8]], EVERYWHERE),
    "left-handed": Structure(20, [[0, 7, 0.2], [6, 0, 0], [0.3, 0, 8]], EVERYWHERE),
    "smaller than the cutoff": Structure(3, [[2.9, 0.1, 0], [1.2, 2.7, 0], [0, 0.3, 3.1]], EVERYWHERE),
    "one atom and its images": Structure(1, 2.5 * np.eye(3), EVERYWHERE),
    "layer": Structure(30, [[8, 0, 0], [2, 7, 0], [0, 0, 20]], (True, True, False)),
    "wire": Structure(15, [[15, 0, 0], [0, 3, 0], [0, 0, 15]], (False, True, False)),
    "molecule": Structure(12, np.zeros((3, 3)), NOWHERE),
    "molecule in a box": Structure(12, 9.0 * np.eye(3), NOWHERE),
    "atom": Structure(1, np.zeros((3, 3)), NOWHERE),
    "no edges": Structure(2, np.diag([40.0, 40.0, 40.0]), EVERYWHERE),
}  # fmt: skip


def placed(name: str, seed: int = 0) -> Snapshot:
    """Atoms of a structure at random, some of them outside its cell."""
    structure, random = STRUCTURES[name], np.random.default_rng(seed)
    cell = np.array(structure.cell, dtype=float)
    inside = random.uniform(-0.7, 1.6, (structure.atoms, 3))
    if name == "no edges":
        inside = np.array([[0.1, 0.1, 0.1], [0.6, 0.6, 0.6]])
    positions = inside @ (cell if cell.any() else 5.0 * np.eye(3))
    return Snapshot(positions, cell, structure.pbc)


def moved(start: Snapshot, furthest: float, seed: int = 1) -> Snapshot:
    """Each atom in a direction of its own, one of them by just so much."""
    random = np.random.default_rng(seed)
    steps = random.normal(size=start.positions.shape)
    lengths = random.uniform(0, furthest, len(steps))
    lengths[random.integers(len(steps))] = furthest
    steps *= (lengths / np.linalg.norm(steps, axis=1))[:, None]
    return Snapshot(start.positions + steps, start.cell, start.pbc)


def strained(start: Snapshot, size: float, seed: int = 2) -> Snapshot:
    """Cell and positions by one strain."""
    strain = np.eye(3) + size * np.random.default_rng(seed).uniform(-1, 1, (3, 3))
    return Snapshot(start.positions @ strain, start.cell @ strain, start.pbc)


def pairs_of(start: Snapshot) -> Pairs:
    return Pairs(start, CUTOFF, torch.float64, CPU)


def edges_of(pairs: Pairs, now: Snapshot) -> Edges:
    return pairs.edges(now, torch.from_numpy(now.positions))


def assert_those_of_mace(found: Edges, now: Snapshot) -> None:
    """The same pairs over the same boundaries, each as often, with the same shifts."""
    index, shifts, units, _ = neighborhood.get_neighborhood(
        now.positions, CUTOFF, now.pbc, now.cell.copy()
    )
    wanted = Counter(map(tuple, np.c_[index.T, units.astype(int)].tolist()))
    rows = torch.cat([found.edge_index.T, found.unit_shifts.long()], 1)
    assert Counter(map(tuple, rows.tolist())) == wanted
    by_row = dict(zip(map(tuple, np.c_[index.T, units.astype(int)].tolist()), shifts, strict=True))
    for row, shift in zip(rows.tolist(), found.shifts, strict=True):
        np.testing.assert_allclose(shift.numpy(), by_row[tuple(row)], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("furthest", [0.0, 0.1, 0.499 * SKIN])
def test_edges_after_moves_within_the_skin(name: str, furthest: float) -> None:
    """The list covers them, and they are MACE's."""
    for seed in range(4):
        start = placed(name, seed)
        pairs, now = pairs_of(start), moved(start, furthest, seed)
        assert pairs.cover(now)
        assert_those_of_mace(edges_of(pairs, now), now)


def test_structures_have_what_they_are_named_for() -> None:
    """Edges, edges to images of an atom itself, several images of one pair; or none."""
    for name in STRUCTURES:
        found = edges_of(pairs_of(placed(name)), placed(name))
        assert (found.edge_index.shape[1] == 0) == (name in ("atom", "no edges")), name
    small = edges_of(pairs_of(placed("smaller than the cutoff")), placed("smaller than the cutoff"))
    assert (small.edge_index[0] == small.edge_index[1]).any()
    assert max(Counter(map(tuple, small.edge_index.T.tolist())).values()) > 3


@pytest.mark.parametrize("name", STRUCTURES)
def test_one_atom_beyond_the_skin_ends_the_list(name: str) -> None:
    """However little the others moved."""
    start = placed(name)
    assert not pairs_of(start).cover(moved(start, 0.501 * SKIN))


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("size", [1e-4, 0.01, 0.05, 0.3])
def test_edges_after_a_strain(name: str, size: float) -> None:
    """Cells that turn into others, with moves besides: MACE's edges, or the list says that it ends."""
    covered = 0
    for seed in range(6):
        start = placed(name, seed)
        now = moved(strained(start, size, seed), 0.2, seed)
        pairs = pairs_of(start)
        if pairs.cover(now):
            covered += 1
            assert_those_of_mace(edges_of(pairs, now), now)
    periodic = STRUCTURES[name].pbc == EVERYWHERE
    if size <= 0.01:
        assert covered == (6 if periodic or not np.any(STRUCTURES[name].cell) else 0)
    if size == 0.3 and periodic:
        assert covered < 6


def test_cells_that_change_back_and_forth() -> None:
    """Shifts are those of the present cell."""
    start = placed("skewed")
    pairs = pairs_of(start)
    for size in (0.01, 0.0, -0.01, 0.0):
        now = strained(start, size)
        assert pairs.cover(now)
        assert_those_of_mace(edges_of(pairs, now), now)


def test_the_bound_is_that_of_two_atoms_head_on() -> None:
    """Just beyond the list's reach, they come within the cutoff when it ends, not before."""
    start = Snapshot(np.array([[0, 0, 0], [CUTOFF + SKIN + 1e-6, 0, 0]]), np.zeros((3, 3)), NOWHERE)
    pairs = pairs_of(start)
    assert pairs.number == 0
    for step, covered in ((0.49, True), (0.5 + 1e-6, False)):
        both = np.array([[step, 0, 0], [-step, 0, 0]]) * SKIN
        now = Snapshot(start.positions + both, start.cell, start.pbc)
        assert pairs.cover(now) == covered
        near = np.linalg.norm(now.positions[1] - now.positions[0]) < CUTOFF
        assert near != covered


@pytest.mark.parametrize(
    "change", ["wrapped", "pbc", "more atoms", "not a number", "cell of a layer"]
)
def test_what_ends_a_list(change: str) -> None:
    """Nothing is assumed of what a list wasn't made for."""
    start = placed("layer" if change == "cell of a layer" else "cube")
    positions, cell, pbc = start.positions.copy(), start.cell.copy(), start.pbc
    if change == "wrapped":
        positions[3] += cell[1]
    elif change == "pbc":
        pbc = (True, True, False)
    elif change == "more atoms":
        positions = np.r_[positions, positions[:1] + 1.0]
    elif change == "not a number":
        positions[0, 0] = np.nan
    else:
        cell[0] *= 1 + 1e-6
    assert pairs_of(start).cover(start)
    assert not pairs_of(start).cover(Snapshot(positions, cell, pbc))


def test_float32_edges_are_chosen_in_float64() -> None:
    """As MACE's, whatever the model's precision."""
    start = placed("cube")
    found = Pairs(start, CUTOFF, torch.float32, torch.device("cpu")).edges(
        start, torch.from_numpy(start.positions)
    )
    assert found.shifts.dtype == found.unit_shifts.dtype == torch.float32
    exact = edges_of(pairs_of(start), start)
    assert torch.equal(found.edge_index, exact.edge_index)
    assert torch.equal(found.shifts, exact.shifts.float())


def counted(found: searches.Found) -> Counter[tuple[int, ...]]:
    """How often each pair is there."""
    return Counter(map(tuple, torch.cat([found.edge_index.T, found.cells.long()], 1).tolist()))


@pytest.mark.parametrize("name", STRUCTURES)
def test_vesin_finds_the_same_pairs(name: str) -> None:
    """In an order of their own, whatever vesin's is."""
    pytest.importorskip("vesin")
    for seed in range(4):
        start = placed(name, seed)
        found = by_vesin(start, CUTOFF + SKIN, CPU)
        wanted = by_mace(start, CUTOFF + SKIN, CPU)
        assert counted(found) == counted(wanted)
        assert (found.edge_index.dtype, found.cells.dtype) == (torch.int64, torch.float64)
        rows = torch.cat([found.edge_index.T.double(), found.cells], 1).tolist()
        assert rows == sorted(rows)
        expected = found.cells.numpy() @ start.cell
        np.testing.assert_allclose(found.shifts.numpy(), expected, rtol=0, atol=1e-12)


class Gpu(NamedTuple):
    """What `search` asks of a device."""

    type: str = "cuda"


REASONS = {
    "absent": f"ImportError: vesin {compat.VESIN} isn't installed",
    "unknown": f"ImportError: vesin {compat.VESIN} isn't installed but 0.5.9",
    "fails": "RuntimeError: no room",
    "too many atoms": f"OverflowError: 60 atoms over [1, 1, {(1 << 30) + 1}] cells",
}


@pytest.mark.parametrize("why", REASONS)
def test_mace_searches_where_vesin_does_not(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, and the report says why; on the host always."""

    class Failing:
        def __init__(self, **options: Any) -> None:
            raise RuntimeError("no room")

    class Everything:
        def __init__(self, **options: Any) -> None:
            assert options == {"cutoff": CUTOFF, "full_list": True}

        def compute(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            pairs = torch.tensor([[0, 1], [1, 0]]).view(torch.uint64)
            return pairs, torch.tensor([[0, 0, 0], [0, 0, -(1 << 30)]], dtype=torch.int32)

    classes = {"fails": Failing, "too many atoms": Everything}
    if why in classes:
        monkeypatch.setattr(searches, "vesin_neighbor_list", lambda: classes[why])
    else:
        version = {"absent": None, "unknown": "0.5.9"}[why]
        monkeypatch.setattr(compat, "version_of", lambda name: version)
    if why == "too many atoms":
        monkeypatch.setattr(searches, "LARGEST_KEY", 1 << 31)
    asked: list[str] = []
    on_host = searches.by_vesin
    monkeypatch.setattr(
        searches,
        "by_vesin",
        lambda now, within, of: asked.append(of.type) or on_host(now, within, CPU),
    )
    monkeypatch.setattr(searches, "by_mace", lambda now, within, of: by_mace(now, within, CPU))
    start = placed("cube")
    assert (search(start, CUTOFF, CPU).by, asked) == ("matscipy", [])
    found = search(start, CUTOFF, Gpu())  # type: ignore[arg-type]
    assert found.by == f"matscipy, not vesin on the device ({REASONS[why]})"
    assert asked == ["cuda"]
    assert counted(found) == counted(by_mace(start, CUTOFF, CPU))


def test_vesin_searches_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a version is installed that is known."""
    pytest.importorskip("vesin")
    on_host = searches.by_vesin
    monkeypatch.setattr(searches, "by_vesin", lambda now, within, of: on_host(now, within, CPU))
    assert search(placed("cube"), CUTOFF, Gpu()).by == "vesin"  # type: ignore[arg-type]
    assert search(placed("cube"), CUTOFF, CPU).by == "matscipy"
