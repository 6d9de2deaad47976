"""The tutorial's plugin, installed as a user would: it plans what it says, and can be blocked."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fresh_python
import pytest

pytestmark = pytest.mark.once

PLUGIN = fresh_python.SOURCE / "examples" / "5_write_a_plugin"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> fresh_python.FreshPython:
    """A Python with the plugin, installed by pip from a copy of its folder."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("example")
    python = fresh_python.make(folder / "python", start_files=True)
    copy = shutil.copytree(PLUGIN, folder / "plugin")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", python.site_packages, copy],
        check=True,
        env=fresh_python.environment(),
        timeout=120,
    )
    return python


PROGRAM = """
import json, sys, torch, e3nn_accel
from e3nn import o3

torch.manual_seed(0)
net = torch.nn.ModuleDict({
    "plain": o3.Linear("8x0e+4x1o+2x0e", "3x0e+4x1o+2x2e"),
    "external": o3.Linear("2x0e", "3x0e", internal_weights=False, shared_weights=False),
    "biased": o3.Linear("8x0e+8x1o", "4x0e", biases=True),
    "product": o3.FullyConnectedTensorProduct("4x0e+2x1o", "2x0e", "3x0e+2x1o"),
}).double()
x, y, z = (torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True) for n in (22, 32, 10))
attrs = torch.randn(2, 3, 2, dtype=torch.float64)
w = torch.randn(2, 3, 6, dtype=torch.float64)

def run():
    outs = [net["plain"](x), net["plain"](x[:, :0]), net["external"](attrs, w),
            net["biased"](y), net["product"](z, attrs)]
    first = torch.autograd.grad(sum((o ** 3).sum() for o in outs), [x, y, z, *net.parameters()],
                                create_graph=True, allow_unused=True)
    first = [g for g in first if g is not None]
    second = torch.autograd.grad(sum((g ** 2).sum() for g in first), [x, y, z])
    return [*outs, *first, *second]

stock = run()
e3nn_accel.enable(**json.loads(sys.argv[1]))
for ours, expected in zip(run(), stock, strict=True):
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
rows = e3nn_accel.explain(net).rows
print(json.dumps({row.path: [row.backend, row.detail] for row in rows}))
"""


def backends(python: fresh_python.FreshPython, options: str = "{}", **variables: str) -> Any:
    """Backend and detail of each module of the program, whose numbers are compared on the way."""
    return json.loads(python.run("-c", PROGRAM, options, **variables).stdout)


def test_it_plans_what_it_says(python: fresh_python.FreshPython) -> None:
    """Linears without biases run through it; others through torch, all with stock's numbers."""
    found = backends(python, '{"strict": true}')
    assert found["plain"] == ["einsum", "one einsum a path"]
    assert {path: backend for path, (backend, _) in found.items()} == {
        "plain": "einsum",
        "external": "torch",
        "biased": "torch",
        "product": "torch",
    }


@pytest.mark.parametrize("way", ["variable", "option", "another backend by name"])
def test_it_can_be_kept_out(python: fresh_python.FreshPython, way: str) -> None:
    """Blocked by the variable or the option, or passed over for a backend asked for by name."""
    found = {
        "variable": lambda: backends(python, E3NN_ACCEL_PLUGINS="-einsum"),
        "option": lambda: backends(python, '{"blocked_plugins": ["einsum"]}'),
        "another backend by name": lambda: backends(python, '{"backend": "torch"}'),
    }[way]()
    assert {backend for backend, _ in found.values()} == {"torch"}


def test_insisting_on_it_says_why_it_cannot(python: fresh_python.FreshPython) -> None:
    """Asked for by name, it raises its reason where it doesn't plan."""
    done = python.run("-c", PROGRAM, "{}", check=False, E3NN_ACCEL_BACKEND="einsum")
    assert done.returncode == 1
    assert "einsum: does one weight for all rows only" in done.stderr


def test_the_readme_is_true(python: fresh_python.FreshPython) -> None:
    """Its program prints what it shows, and its commands name what there is."""
    text = (PLUGIN / "README.md").read_text()
    program, shown = re.findall(r"python - <<'EOF'\n(.*?)EOF\n(.*?)```", text, re.S)[0]
    assert python.run("-c", program).stdout == shown
    assert "E3NN_ACCEL_PLUGINS=-einsum" in text
    assert all((PLUGIN / name).is_file() for name in re.findall(r"^\| `([\w.]+)`", text, re.M))


def test_it_is_small_enough_to_read() -> None:
    """A tutorial, not a library."""
    lines = (PLUGIN / "e3nn_accel_einsum.py").read_text().splitlines()
    assert len(lines) < 100
    assert not list(Path(PLUGIN).glob("*.egg-info"))
