"""Importing e3nn_accel costs next to nothing until it is used."""

from __future__ import annotations

import json
from pathlib import Path

import fresh_python
import pytest

HEAVY = {
    "torch",
    "e3nn",
    "numpy",
    "cupy",
    "pluggy",
    "mace",
    "importlib.metadata",
    "rich",
    "asyncio",
}
SHOW = "import json, sys; print(json.dumps(sorted(sys.modules)))"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> fresh_python.FreshPython:
    """A Python that sees the project."""
    return fresh_python.make(tmp_path_factory.mktemp("python"), start_files=False)


def modules_after(python: fresh_python.FreshPython, code: str) -> set[str]:
    """What is imported once the code has run."""
    return set(json.loads(python.run("-c", f"{code}\n{SHOW}").stdout))


@pytest.mark.parametrize(
    "code",
    [
        "import e3nn_accel",
        "import e3nn_accel.auto",
        "import e3nn_accel; e3nn_accel.enable()",
        "import e3nn_accel; e3nn_accel.enable(); e3nn_accel.disable()",
        "import e3nn_accel; assert e3nn_accel.is_enabled() is False",
        "import e3nn_accel; str(e3nn_accel.report())",
        "import e3nn_accel; e3nn_accel.AccelError; e3nn_accel.Config.from_env(); dir(e3nn_accel)",
    ],
)
def test_nothing_heavy_is_imported(python: fresh_python.FreshPython, code: str) -> None:
    """Neither torch nor e3nn nor CuPy nor pluggy, also where it is enabled already."""
    assert modules_after(python, code) & HEAVY == set()


def test_it_would_be_noticed(python: fresh_python.FreshPython) -> None:
    """The modules looked for are in this environment, so their absence above says something."""
    code = "import torch, pluggy, e3nn_accel.dispatch"
    assert {"torch", "numpy", "pluggy"} <= modules_after(python, code)


def test_enabling_after_e3nn_brings_no_cuda(python: fresh_python.FreshPython) -> None:
    """Enabling where e3nn is imported loads the plugins, but no CuPy and no CUDA context."""
    code = (
        "import torch, e3nn.o3, e3nn_accel; e3nn_accel.enable(strict=True)\n"
        "assert not torch.cuda.is_initialized()"
    )
    found = modules_after(python, code)
    assert "e3nn_accel.dispatch" in found
    assert found & {"cupy", "mace", "rich"} == set()


def test_every_public_name_is_there() -> None:
    """What `__all__` names can be had, is documented, and nothing else is offered."""
    import e3nn_accel

    for name in e3nn_accel.__all__:
        assert getattr(e3nn_accel, name).__doc__, name
    assert sorted(e3nn_accel.__all__) == dir(e3nn_accel)
    with pytest.raises(AttributeError, match="has no attribute 'enabel'"):
        e3nn_accel.enabel


def test_type_checkers_and_the_loader_agree() -> None:
    """The names under TYPE_CHECKING are those that are found lazily."""
    import ast

    import e3nn_accel

    tree = ast.parse(Path(str(e3nn_accel.__file__)).read_text())
    imports = {
        (alias.asname, node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if alias.asname
    }
    assert imports == {(name, f"e3nn_accel.{home}") for name, home in e3nn_accel._HOMES.items()}
