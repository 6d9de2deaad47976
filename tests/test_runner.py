"""`python -m e3nn_accel` runs programs as python does; `run` and `hook` do what they say."""

from __future__ import annotations

import sys
import zipfile

import fresh_python
import pytest

from e3nn_accel import cli

pytestmark = pytest.mark.once

SHOW = """
import os, pickle, sys

class Pickled:
    pass

assert type(pickle.loads(pickle.dumps(Pickled()))) is Pickled
main = sys.modules["__main__"]
assert vars(main) is globals()
if __spec__ is not None:
    print(__spec__.name, __spec__.origin)
print(__name__, globals().get("__file__"), __package__, type(__loader__).__name__)
print(sys.argv, [os.path.abspath(path) for path in sys.path[:2]])
print(__doc__, sorted(name for name in globals() if name.startswith("_")))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python without start files."""
    return fresh_python.make(tmp_path_factory.mktemp("python"), start_files=False)


@pytest.fixture(scope="module")
def programs(python):
    """The same program as a script, a link to it, a package, a folder and an archive."""
    folder = python.folder / "programs"
    (folder / "package" / "inner").mkdir(parents=True)
    for name in ("script.py", "package/__init__.py", "package/__main__.py", "package/part.py"):
        (folder / name).write_text(SHOW)
    (folder / "package" / "__init__.py").write_text("")
    (python.folder / "linked.py").symlink_to(folder / "script.py")
    with zipfile.ZipFile(folder / "archive.pyz", "w") as archive:
        archive.writestr("__main__.py", SHOW)
    (python.folder / "top.py").write_text(SHOW)
    return folder


@pytest.mark.parametrize(
    "program",
    [
        ["programs/script.py", "-v", "--strict", "x"],
        ["linked.py"],
        ["./top.py", "info"],
        ["programs/package"],
        ["programs/archive.pyz", "1"],
        ["-m", "top", "-c", "x"],
        ["-mtop"],
        ["-m", "programs.package", "a"],
        ["-m", "programs.package.part", "-h"],
        ["-c", SHOW, "-x", "y"],
        ["-c" + SHOW],
    ],
    ids=lambda program: " ".join(program)[:24],
)
def test_runs_as_python_does(python, programs, program):
    stock = python.run(*program)
    ours = python.run("-m", "e3nn_accel", *program)
    assert ours.stdout == stock.stdout
    assert ours.stderr == stock.stderr == ""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is new in 3.11")
@pytest.mark.parametrize("program", [["programs/script.py"], ["-c", SHOW], ["programs/package"]])
def test_safe_path(python, programs, program):
    ours = python.run("-P", "-m", "e3nn_accel", *program)
    assert ours.stdout == python.run("-P", *program).stdout


@pytest.mark.parametrize(
    "program",
    [
        ["-c", "import sys; sys.exit(3)"],
        ["-c", "import sys; sys.exit('message')"],
        ["-c", "raise ValueError('uncaught')"],
        ["-c", "def broken("],
        ["-m", "no_such_module"],
        ["no_such_file.py"],
        ["-c"],
        ["-m"],
    ],
    ids=lambda program: " ".join(program),
)
def test_exit_codes(python, program):
    stock = python.run(*program, check=False)
    ours = python.run("-m", "e3nn_accel", *program, check=False)
    assert stock.returncode != 0
    assert (ours.returncode, ours.stdout) == (stock.returncode, stock.stdout)
    assert bool(ours.stderr) == bool(stock.stderr)


def test_missing_script_is_one_line(python):
    done = python.run("-m", "e3nn_accel", "absent.py", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m e3nn_accel: error: can't open file ")
    assert done.stderr.count("\n") == 1


ENABLED = "import os, e3nn_accel; print(e3nn_accel.is_enabled(), os.environ['E3NN_ACCEL'])"


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ([], None, "1"),
        ([], "0", "1"),
        ([], "verify", "verify"),
        ([], "strict", "strict"),
        (["--strict"], "1", "strict"),
    ],
)
def test_enables_and_sets_the_variable_for_children(python, options, before, after):
    done = python.run("-m", "e3nn_accel", *options, "-c", ENABLED, E3NN_ACCEL=before)
    assert done.stdout == f"True {after}\n"


def test_profile_prints_the_report_at_the_end(python):
    code = (
        "import torch; from e3nn import o3\n"
        "linear = o3.Linear('2x0e', '2x0e'); linear(torch.ones(3, 2)); print('done')"
    )
    done = python.run("-m", "e3nn_accel", "--profile", "-c", code)
    assert done.stdout == "done\n"
    assert "Linear" in done.stderr
    assert python.run("-m", "e3nn_accel", "-c", "print('done')").stderr == ""


def test_a_script_with_the_name_of_a_command(python):
    (python.folder / "info").write_text("print('the script')")
    assert python.run("-m", "e3nn_accel", "./info").stdout == "the script\n"
    done = python.run("-m", "e3nn_accel", "--strict", "info", check=False)
    assert done.returncode == 2
    assert "./info" in done.stderr


def test_help_names_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: e3nn-accel {name}")


def test_version_and_unknown_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("e3nn_accel ")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--fast", "script.py"])
    assert stop.value.code == 2


def test_importing_the_command_line_is_light(python):
    code = (
        "import sys; from e3nn_accel import cli; cli.main([])\n"
        "heavy = {'torch', 'e3nn', 'mace', 'numpy', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    python.run("-c", code)


@pytest.fixture
def own(tmp_path):
    """A Python of this test's own, without start files."""
    return fresh_python.make(tmp_path / "own", start_files=False)


PRINT_VARIABLE = "import os, sys; print(os.environ['E3NN_ACCEL'], *sys.argv[1:])"


def test_run(own):
    own.add_start_files()
    run = ("-m", "e3nn_accel", "run")
    command = (own.executable, "-c", PRINT_VARIABLE, "--flag", "--", "x")
    assert own.run(*run, "--", *command).stdout == "1 --flag -- x\n"
    assert own.run(*run, *command).stdout == "1 --flag -- x\n"
    assert own.run(*run, "--strict", "--", *command).stdout == "strict --flag -- x\n"
    failing = own.run(*run, "--", own.executable, "-c", "raise SystemExit(7)", check=False)
    assert failing.returncode == 7


def test_run_reaches_the_command(own):
    own.add_start_files()
    code = "import sys; print('_e3nn_accel_boot' in sys.modules)"
    done = own.run("-m", "e3nn_accel", "run", "--", own.executable, "-c", code)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["--", "no-such-command"], 127, "no-such-command: command not found"),
        (["--", "."], 126, "Permission denied"),
        (["--"], 2, "no command given"),
        ([], 2, "no command given"),
    ],
)
def test_run_that_cannot(own, command, code, message):
    own.add_start_files()
    done = own.run("-m", "e3nn_accel", "run", *command, check=False)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_run_without_start_files_says_what_to_do(own):
    done = own.run("-m", "e3nn_accel", "run", "--", own.executable, "-c", "pass", check=False)
    assert done.returncode == 2
    assert "hook install" in done.stderr
    assert "python -m e3nn_accel script.py" in done.stderr


def test_hook_installs_and_removes(own):
    def hook(action, code=0):
        done = own.run("-m", "e3nn_accel", "hook", action, check=False)
        assert done.returncode == code, done.stderr
        assert str(own.executable) in done.stdout
        return done.stdout

    booted = ("-c", "import sys; print('_e3nn_accel_boot' in sys.modules)")
    before = sorted(own.site_packages.iterdir())
    assert "not installed" in hook("status", code=1)
    assert str(own.site_packages) in hook("install")
    assert hook("status").count("installed") == len(fresh_python.START_FILES)
    assert own.run(*booted, E3NN_ACCEL="1").stdout == "True\n"
    (own.site_packages / "_e3nn_accel_boot.py").write_text("def main(): pass")
    assert "of another version" in hook("status")
    hook("install")
    assert "of another version" not in hook("status")
    hook("remove")
    assert own.run(*booted, E3NN_ACCEL="1").stdout == "False\n"
    left = [path for path in own.site_packages.iterdir() if path.name != "__pycache__"]
    assert sorted(left) == before
    assert "nothing to remove" in hook("remove")


def test_hook_that_cannot_write(own):
    (own.site_packages / "_e3nn_accel_boot.py").mkdir()  # in the way, also for root
    done = own.run("-m", "e3nn_accel", "hook", "install", check=False)
    assert done.returncode == 1
    assert f"can't write to {own.site_packages}" in done.stderr
    assert "import e3nn_accel.auto" in done.stderr
    assert done.stderr.count("\n") == 1
