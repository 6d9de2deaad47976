"""Enabling works before and after e3nn is imported; the import waiter leaves no trace of itself."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import threading
from importlib import resources
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path

import fresh_python
import pytest

from e3nn_accel._start import _e3nn_accel_boot as boot
from e3nn_accel.errors import E3nnAccelWarning

NAME = "awaited_package.inner"


@pytest.fixture
def waiter(monkeypatch):
    """A waiter of this test's own, in place of the one that the process may be using."""
    waiter = boot._Waiter()
    monkeypatch.setattr(sys, boot._SHARED, waiter, raising=False)
    yield waiter
    if waiter in sys.meta_path:
        sys.meta_path.remove(waiter)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes `awaited_package.inner` with a given body, not imported yet."""
    folder = tmp_path / "awaited_package" / "inner"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def make(body: str = "value = 1") -> Path:
        (folder / "__init__.py").write_text(body)
        importlib.invalidate_caches()
        return folder

    make()
    yield make
    for name in [n for n in sys.modules if n.startswith("awaited_package")]:
        del sys.modules[name]


class Calls(list):
    """A callback that notes what it sees of the package when it is called."""

    def __call__(self) -> None:
        self.append(getattr(sys.modules["awaited_package"].inner, "value", None))

    __hash__ = object.__hash__


def test_called_after_the_body_has_run(waiter, package):
    calls = Calls()
    boot.when_imported({NAME: calls})
    importlib.import_module("awaited_package")
    assert calls == []
    importlib.import_module(NAME)
    assert calls == [1]


def test_called_at_once_if_imported(waiter, package):
    importlib.import_module(NAME)
    calls = Calls()
    boot.when_imported({NAME: calls})
    assert calls == [1]
    assert waiter not in sys.meta_path


def test_finder_leaves_when_nothing_is_awaited(waiter, package):
    cancel = boot.when_imported({NAME: Calls(), "never_imported": Calls()})
    assert sys.meta_path.count(waiter) == 1
    importlib.import_module(NAME)
    assert waiter in sys.meta_path
    cancel()
    assert waiter not in sys.meta_path


def test_a_cancelled_callback_is_not_called(waiter, package):
    calls, other = Calls(), Calls()
    boot.when_imported({NAME: calls})()
    boot.when_imported({NAME: other})
    importlib.import_module(NAME)
    assert (calls, other) == ([], [1])


def test_the_same_callback_is_called_once(waiter, package):
    calls = Calls()
    boot.when_imported({NAME: calls})
    boot.when_imported({NAME: calls})
    importlib.import_module(NAME)
    assert calls == [1]


def test_finding_is_not_importing(waiter, package):
    calls = Calls()
    boot.when_imported({NAME: calls})
    assert importlib.util.find_spec(NAME) is not None
    assert importlib.util.find_spec("awaited_package.absent") is None
    assert calls == []
    importlib.import_module(NAME)
    assert calls == [1]


def test_loader_is_the_one_it_would_have_been(waiter, package):
    folder = package("def function():\n    return 1\n")
    (folder / "data.txt").write_text("data")
    stock = importlib.util.find_spec(NAME)
    boot.when_imported({NAME: Calls()})
    module = importlib.import_module(NAME)
    loader = module.__loader__
    assert type(loader) is SourceFileLoader
    assert vars(loader) == vars(stock.loader)
    assert type(module.__spec__) is ModuleSpec
    assert module.__spec__.submodule_search_locations == stock.submodule_search_locations
    assert loader.is_package(NAME)
    assert loader.get_source(NAME) == (folder / "__init__.py").read_text()
    assert inspect.getsource(module.function).startswith("def function")
    assert (resources.files(module) / "data.txt").read_text() == "data"
    assert importlib.reload(module) is module


def test_a_failed_body_is_waited_for_again(waiter, package):
    package("raise RuntimeError('body')")
    calls = Calls()
    boot.when_imported({NAME: calls})
    with pytest.raises(RuntimeError, match="body"):
        importlib.import_module(NAME)
    assert calls == []
    package("value = 2")
    importlib.import_module(NAME)
    assert calls == [2]


def test_registered_by_the_module_that_is_being_imported(waiter, package, monkeypatch):
    """The callback waits for the end of an import further up the same stack."""
    calls = Calls()
    monkeypatch.setattr(boot, "calls", calls, raising=False)
    package(
        f"from {boot.__name__} import calls, when_imported\n"
        "when_imported({__name__: calls})\n"
        "when_imported({__name__: calls})\n"
        "seen_too_early = list(calls)\n"
        "value = 3\n"
    )
    module = importlib.import_module(NAME)
    assert module.seen_too_early == []
    assert calls == [3]
    assert type(module.__spec__) is ModuleSpec
    assert waiter not in sys.meta_path


def test_registered_while_another_thread_imports(waiter, package, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(boot, "events", (started, go_on), raising=False)
    package(
        f"from {boot.__name__} import events\n"
        "events[0].set()\n"
        "assert events[1].wait(30)\n"
        "value = 4\n"
    )
    thread = threading.Thread(target=importlib.import_module, args=(NAME,))
    thread.start()
    assert started.wait(30)
    calls = Calls()
    boot.when_imported({NAME: calls})
    assert calls == []
    go_on.set()
    thread.join(30)
    assert calls == [4]


def test_many_threads_one_call(waiter, package):
    package("import time; time.sleep(0.05); value = 5")
    calls = Calls()
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        if number % 2:
            boot.when_imported({NAME: calls})
        importlib.import_module(NAME)

    boot.when_imported({NAME: calls})
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # A thread that registers after the first call is answered at once: at most one call each.
    assert 1 <= len(calls) <= 5
    assert set(calls) == {5}
    assert waiter not in sys.meta_path


def test_registered_by_a_callback(waiter, package):
    """`enable()`, called because the module is there, finds that it is there."""
    inner = Calls()
    boot.when_imported({NAME: lambda: boot.when_imported({NAME: inner}) and None})
    importlib.import_module(NAME)
    assert inner == [1]


class SharedLoader:
    """One loader object, or its class, for several modules, as in some frozen applications."""

    bodies: dict[str, str] = {}  # noqa: RUF012

    @classmethod
    def create_module(cls, spec):
        return None

    @classmethod
    def exec_module(cls, module):
        exec(cls.bodies[module.__name__], vars(module))


class LoaderWithoutDictionary:
    __slots__ = ()
    create_module = SharedLoader.create_module
    exec_module = SharedLoader.exec_module


@pytest.mark.parametrize("loader", [SharedLoader(), SharedLoader, LoaderWithoutDictionary()])
def test_unusual_loaders(waiter, package, monkeypatch, loader):
    bodies = {NAME: "import awaited_package.inner.part\nvalue = 6", NAME + ".part": "value = 7"}
    monkeypatch.setattr(SharedLoader, "bodies", bodies)

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return ModuleSpec(name, loader, is_package=True) if name in bodies else None

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    before = dict(vars(SharedLoader))
    calls = Calls()
    boot.when_imported({NAME: calls})
    importlib.import_module(NAME)
    assert calls == [6]
    assert dict(vars(SharedLoader)) == before
    assert not getattr(loader, "__dict__", None) or isinstance(loader, type)


def test_another_import_hook_that_starts_over(waiter, package, monkeypatch):
    """Hooks of tracers look for the spec from the first finder again, and wrap its loader."""

    class Restarting:
        busy = False

        def find_spec(self, name, path=None, target=None):
            if self.busy or name != NAME:
                return None
            self.busy = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.busy = False

    for position in (0, 1):
        calls = Calls()
        boot.when_imported({NAME: calls})
        hook = Restarting()
        sys.meta_path.insert(position, hook)
        try:
            importlib.import_module(NAME)
        finally:
            sys.meta_path.remove(hook)
        assert calls == [1]
        del sys.modules[NAME]


def _fail() -> None:
    raise ValueError("why")


def test_an_exception_warns_and_the_import_goes_on(waiter, package, monkeypatch):
    monkeypatch.delenv("E3NN_ACCEL", raising=False)
    after = Calls()
    boot.when_imported({NAME: _fail})
    boot.when_imported({NAME: after})
    with pytest.warns(E3nnAccelWarning, match="stays off: ValueError: why") as caught:
        assert importlib.import_module(NAME).value == 1
    assert caught[0].filename == importlib.__file__  # who imports: here, import_module
    assert after == [1]


@pytest.mark.parametrize("by_variable", [True, False])
def test_strict_raises(waiter, package, monkeypatch, by_variable):
    monkeypatch.setenv("E3NN_ACCEL", "strict" if by_variable else "1")
    boot.when_imported({NAME: _fail}, strict=None if by_variable else True)
    with pytest.raises(ValueError, match="why"):
        importlib.import_module(NAME)


def test_two_copies_share_one_waiter(waiter, package):
    spec = importlib.util.spec_from_file_location("another_copy_of_boot", boot.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    calls, other = Calls(), Calls()
    boot.when_imported({NAME: calls})
    copy.when_imported({NAME: other})
    assert sys.meta_path.count(waiter) == 1
    assert sum(type(finder).__name__ == "_Waiter" for finder in sys.meta_path) == 1
    importlib.import_module(NAME)
    assert (calls, other) == ([1], [1])


# From here on the real e3nn, in processes of their own.

CHECK = """
import sys, torch
linear = o3.Linear("2x0e+1x1o", "3x0e+1x1o")
linear(torch.randn(4, 5))
import e3nn_accel
assert e3nn_accel.is_enabled()
assert "Linear" in str(e3nn_accel.report()), str(e3nn_accel.report())
assert not any(type(f).__name__ == "_Waiter" and "e3nn.o3" in f.awaited for f in sys.meta_path)
"""

ORDERS = {
    "enable, then import": "import e3nn_accel; e3nn_accel.enable(); from e3nn import o3",
    "auto, then import": "import e3nn_accel.auto; from e3nn import o3",
    "import, then enable": "from e3nn import o3; import e3nn_accel; e3nn_accel.enable()",
    "import, then auto": "from e3nn import o3; import e3nn_accel.auto",
    "import names, then enable": (
        "from e3nn.o3 import Linear; import e3nn_accel; e3nn_accel.enable()\n"
        "class o3: Linear = Linear"
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return fresh_python.make(tmp_path_factory.mktemp("plain"), start_files=False)


@pytest.mark.parametrize("order", ORDERS)
def test_orders(plain, order):
    plain.run("-W", "error:e3nn_accel:UserWarning", "-c", ORDERS[order] + CHECK)


def test_importing_us_imports_neither_torch_nor_e3nn(plain):
    plain.run(
        "-c",
        "import sys, e3nn_accel, e3nn_accel.auto\n"
        "assert e3nn_accel.is_enabled()\n"
        "heavy = {'torch', 'e3nn', 'mace', 'cupy', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n",
    )


def test_disabled_before_the_import(plain):
    plain.run(
        "-c",
        "import e3nn_accel.auto, sys; e3nn_accel.disable()\n"
        "from e3nn import o3\n"
        "import torch\n"
        "assert '__call__' not in vars(o3.Linear)\n"
        "assert not any(type(f).__name__ == '_Waiter' for f in sys.meta_path)\n",
    )
