"""Versions side by side: every e3nn that is supported, torch's oldest and newest, and other people's packages.

``nox -s versions`` runs what depends on e3nn or torch with each pair of them, ``nox -s others`` the tests
of packages built on e3nn. PyPI's torch brings CUDA libraries (gigabytes) on Linux; where there is no NVIDIA GPU:
``nox -s versions -- --torch-index https://download.pytorch.org/whl/cpu``. Fewer of them, and fewer tests:
``nox -s "versions(torch='2.13.0', e3nn='0.6.0')" -- tests/test_compat.py``.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["versions"]

TORCH = ["2.4.1", "2.13.0"]
"""The oldest that pyproject.toml allows, and the newest that was tried."""

E3NN = ["0.4.4", "0.5.9", "0.6.0"]

WITH_MACE = "0.4.4"
"""What mace-torch pins."""

VERSION_DEPENDENT = [
    f"tests/test_{name}.py"
    for name in (
        "as_planned", "bench_operations", "by_choice", "calculator", "checkpoints", "cli", "compat", "compile",
        "compiled_by_torch", "contraction", "convolution", "device_memory", "e3nn_networks", "eager_gathers",
        "edge_cases", "edge_modules", "enable_disable", "examples", "forks", "gathers", "gradient_wanted",
        "graph_padding", "hessian_on_host", "import_cost", "import_order", "layout", "mliap", "model_graphs",
        "neighbour_pairs", "old_files", "older_e3nn_networks", "ordinary", "out_of_memory", "overwriting", "parity",
        "parity_modules", "pickle", "prepared_by_mace", "radial_embedding_on_host", "radial_mlp", "registry",
        "replayed_batches", "report", "reshape_irreps_on_host", "selfcheck", "small_products", "species_linear",
        "spherical_harmonics_on_host", "subclasses", "tensor_keys", "threads", "torchscript", "training_graphs",
        "training_tools", "weights_change",
    )
]  # fmt: skip
"""Tests of what touches classes of e3nn and MACE, or torch's private functions: all files but those that are `once` as
a whole, and of these what is torch's or MACE's doing."""


def own_arguments(session: nox.Session) -> tuple[list[str], list[str]]:
    """What follows ``--``: an index for pip to have torch from, then pytest's arguments, tests among them."""
    given = session.posargs
    if given and given[0] == "--torch-index":
        return ["--index-url", given[1]], given[2:]
    return [], given


def install_torch(session: nox.Session, version: str) -> None:
    """First and alone: resolved together with the rest, pip may pick another build of it."""
    index, _ = own_arguments(session)
    session.install(f"torch=={version}", *index)


def run_tests(session: nox.Session, *paths: str) -> None:
    """These, unless others are given. One thread each: more would fight for the same cores."""
    _, arguments = own_arguments(session)
    if not any(Path(argument.partition("::")[0]).exists() for argument in arguments):
        arguments = [*arguments, *paths]
    session.run(
        "python", "-m", "pytest", "-q", "-m", "not slow", *arguments,
        env={"OMP_NUM_THREADS": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )  # fmt: skip


@nox.session
@nox.parametrize("e3nn", E3NN)
@nox.parametrize("torch", TORCH)
def versions(session: nox.Session, torch: str, e3nn: str) -> None:
    """The tests that depend on versions, with MACE where e3nn is its."""
    install_torch(session, torch)
    extras = "mace,cli,test" if e3nn == WITH_MACE else "cli,test"
    session.install("-e", f".[{extras}]", f"torch=={torch}", f"e3nn=={e3nn}")
    run_tests(session, *VERSION_DEPENDENT)


@nox.session
@nox.parametrize("e3nn", ["04", "06"])
def others(session: nox.Session, e3nn: str) -> None:
    """graph-pes, torch-sim, janus-core and phonopy with e3nn 0.4; sevenn and nequip with e3nn 0.6."""
    install_torch(session, TORCH[-1])
    session.install("-e", f".[test,others-e3nn{e3nn}]", f"torch=={TORCH[-1]}")
    run_tests(session, "tests/others")
