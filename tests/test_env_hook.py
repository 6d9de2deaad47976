"""`E3NN_ACCEL=1 python anything.py` through the start files, and nothing at all without it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import fresh_python
import pytest

pytestmark = pytest.mark.once

# A stand-in for this package that only records how it is enabled; its submodules are the real ones.
STUB = f"""
__path__.append({str(fresh_python.SOURCE / "e3nn_accel")!r})
calls = []
def is_enabled(): return bool(calls)
def disable(): calls.clear()
def enable(**options):
    calls.append(options)
    {{action}}
"""


@pytest.fixture(scope="module")
def hooked(tmp_path_factory):
    """A Python with the start files and the real package."""
    return fresh_python.make(tmp_path_factory.mktemp("hooked"), start_files=True)


@pytest.fixture
def stubbed(tmp_path):
    """Makes a Python with the start files, an empty `e3nn.o3` and the stand-in."""

    def make(action: str = "pass"):
        python = fresh_python.make(tmp_path / "venv", start_files=True, see_project=False)
        for name, text in {
            "e3nn/__init__.py": "",
            "e3nn/o3/__init__.py": "class Linear: pass\n",
            "e3nn_accel/__init__.py": STUB.format(action=action),
        }.items():
            path = python.site_packages / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return python

    return make


def test_enables_the_real_thing(hooked, tmp_path):
    script = tmp_path / "md.py"
    script.write_text(
        "from e3nn.o3 import Linear\n"
        "import e3nn_accel, torch\n"
        "linear = Linear('2x0e', '2x0e')\n"
        "linear(torch.ones(3, 2))\n"
        "print(e3nn_accel.is_enabled(), type(Linear).__name__, e3nn_accel.report())\n"
    )
    off = hooked.run(script).stdout
    on = hooked.run(script, E3NN_ACCEL="1").stdout
    assert off.startswith("False")
    assert on.startswith("True")
    assert "Linear" in on
    assert "Linear" not in off


SHOW = """
import sys
booted = "_e3nn_accel_boot" in sys.modules
waiting = any(type(finder).__name__ == "_Waiter" for finder in sys.meta_path)
imported_early = "e3nn_accel" in sys.modules
from e3nn.o3 import Linear
import e3nn_accel
print(booted, waiting, imported_early, e3nn_accel.calls)
"""


@pytest.mark.parametrize("value", [None, "", "0"])
def test_off_does_nothing(stubbed, value):
    assert stubbed().run("-c", SHOW, E3NN_ACCEL=value).stdout == "False False False []\n"


@pytest.mark.parametrize("value", ["false", "OFF", " no "])
def test_off_in_other_words(stubbed, value):
    assert stubbed().run("-c", SHOW, E3NN_ACCEL=value).stdout == "True False False []\n"


@pytest.mark.parametrize("value", ["1", "strict", "verify", "on"])
def test_on_waits_for_e3nn(stubbed, value):
    assert stubbed().run("-c", SHOW, E3NN_ACCEL=value).stdout == "True True False [{}]\n"


def test_a_value_that_means_nothing_warns_and_stays_off(stubbed):
    done = stubbed().run("-c", SHOW, E3NN_ACCEL="perhaps")
    assert done.stdout == "True True False []\n"
    assert "E3NN_ACCEL=perhaps is not understood" in done.stderr


def test_enabled_once_by_the_variable_and_auto(stubbed):
    code = (
        "import e3nn_accel.auto, sys\n"
        "from e3nn_accel._start import _e3nn_accel_boot\n"
        "import _e3nn_accel_boot as root\n"
        "assert root is not _e3nn_accel_boot\n"
        "root.main(); _e3nn_accel_boot.main()\n"
        "assert sum(type(f).__name__ == '_Waiter' for f in sys.meta_path) == 1\n"
        "import e3nn.o3\n"
        "print(e3nn_accel.calls)\n"
    )
    assert stubbed().run("-c", code, E3NN_ACCEL="1").stdout == "[{}]\n"


def test_the_programs_own_options_win(stubbed):
    code = (
        "import e3nn_accel; e3nn_accel.enable(backend='torch')\n"
        "import e3nn.o3; print(e3nn_accel.calls)"
    )
    assert stubbed().run("-c", code, E3NN_ACCEL="1").stdout == "[{'backend': 'torch'}]\n"


def test_the_programs_own_disable_wins(hooked):
    code = (
        "import e3nn_accel; e3nn_accel.disable()\n"
        "from e3nn import o3; print(e3nn_accel.is_enabled(), '__call__' in vars(o3.Linear))"
    )
    assert hooked.run("-c", code, E3NN_ACCEL="1").stdout == "False False\n"


CHILDREN = """
import multiprocessing, torch

def ask(_=None):
    from e3nn import o3
    import e3nn_accel
    return e3nn_accel.is_enabled() and "__call__" in vars(o3.Linear)

class Asking(torch.utils.data.Dataset):
    def __len__(self): return 1
    def __getitem__(self, i): return float(ask())

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as pool:
        in_pool = pool.map(ask, [0])
    loader = torch.utils.data.DataLoader(Asking(), num_workers=1, multiprocessing_context="spawn")
    print(in_pool, [bool(batch) for batch in loader])
"""


@pytest.mark.parametrize(
    ("value", "follows"), [("1", True), pytest.param(None, False, marks=pytest.mark.slow)]
)
def test_children_follow(hooked, tmp_path, value, follows):
    script = tmp_path / "parent.py"
    script.write_text(CHILDREN)
    assert hooked.run(script, E3NN_ACCEL=value).stdout == f"[{follows}] [{follows}]\n"


@pytest.mark.parametrize("flags", [["-I"], ["-S"], ["-I", "-S"], ["-E", "-s"]])
def test_isolated_pythons_start_without_a_word(hooked, flags):
    done = hooked.run(*flags, "-c", "print('ran')", E3NN_ACCEL="1")
    assert (done.stdout, done.stderr) == ("ran\n", "")


def test_without_site_nothing_is_read(hooked):
    code = "import sys; print('_e3nn_accel_boot' in sys.modules)"
    assert hooked.run("-S", "-c", code, E3NN_ACCEL="1").stdout == "False\n"


BROKEN = "raise OSError('no such card')"


def test_broken_enable_warns_and_leaves_stock(stubbed):
    done = stubbed(BROKEN).run("-c", "from e3nn.o3 import Linear; print('goes on')", E3NN_ACCEL="1")
    assert done.stdout == "goes on\n"
    assert "UserWarning" not in done.stderr.replace("E3nnAccelWarning", "")
    assert "e3nn_accel stays off: OSError: no such card" in done.stderr


def test_broken_enable_raises_in_strict_mode(stubbed):
    python = stubbed(BROKEN)
    done = python.run("-c", "from e3nn.o3 import Linear", E3NN_ACCEL="strict", check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("OSError: no such card\n")


def test_start_files_left_behind_warn_and_leave_stock(stubbed):
    python = stubbed()
    (python.site_packages / "e3nn_accel" / "__init__.py").write_text(
        "raise ImportError('half gone')"
    )
    done = python.run("-c", "from e3nn.o3 import Linear; print('goes on')", E3NN_ACCEL="1")
    assert done.stdout == "goes on\n"
    assert "e3nn_accel stays off: ImportError: half gone" in done.stderr


def test_boot_imports_nothing_else(hooked):
    code = "import sys; print(*sorted(sys.modules))"
    off = set(hooked.run("-c", code).stdout.split())
    on = set(hooked.run("-c", code, E3NN_ACCEL="1").stdout.split())
    assert on - off == {"_e3nn_accel_boot"}


def _cpu_seconds(python: fresh_python.FreshPython, env: dict[str, str]) -> float:
    """User and system time of one start, which other programs on the machine change little."""
    process = subprocess.Popen([str(python.executable), "-c", "pass"], env=env)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.skipif(sys.platform == "win32", reason="needs the CPU time of one child")
def test_unset_costs_less_than_a_millisecond(hooked, tmp_path):
    """Interleaved starts with and without the start files; the best of three rounds of medians."""
    plain = fresh_python.make(tmp_path / "plain", start_files=False)
    env = fresh_python.environment()
    rounds = []
    for _ in range(3):
        pairs = [(_cpu_seconds(hooked, env), _cpu_seconds(plain, env)) for _ in range(40)]
        rounds.append(statistics.median(hook - no_hook for hook, no_hook in pairs))
        if rounds[-1] < 1e-3:
            break
    assert min(rounds) < 1e-3, rounds


def test_the_measurement_sees_a_slow_start_file(hooked, tmp_path):
    """The test above can fail: a start file that imports something real costs more than that."""
    slow = fresh_python.make(tmp_path / "slow", start_files=False)
    (slow.site_packages / "z_slow.pth").write_text("import asyncio, argparse, typing\n")
    env = fresh_python.environment()
    pairs = [(_cpu_seconds(slow, env), _cpu_seconds(hooked, env)) for _ in range(15)]
    assert statistics.median(bad - good for bad, good in pairs) > 1e-3
