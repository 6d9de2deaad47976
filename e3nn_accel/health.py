"""The checks of ``e3nn-accel doctor`` that ship with e3nn_accel; plugins add theirs by a hook."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import warnings
from importlib import resources
from typing import Any, Literal

import torch

from e3nn_accel import switch
from e3nn_accel.active import active
from e3nn_accel.compat import WRITTEN_FOR, version_of, within
from e3nn_accel.config import Config
from e3nn_accel.errors import E3nnAccelWarning
from e3nn_accel.hookspecs import HealthCheck
from e3nn_accel.interception import suspend
from e3nn_accel.registry import Registry, load

Finding = tuple[Literal["ok", "warn", "fail"], str]
UNPICKLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def registry() -> Registry:
    """The registry in use, or the one that enabling would load."""
    if active.dispatcher is not None:
        return active.dispatcher.registry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", E3nnAccelWarning)  # the check of the variables tells
        return load(Config.from_env())


def _versions() -> Finding:
    """Versions of what a plan stands on, within what it was written for."""
    wanted = {(name, WRITTEN_FOR[name]) for name in ("python", "torch")}
    wanted |= {(target.distribution, target.versions) for target in registry().targets()}
    found, outside = [], []
    for distribution, versions in sorted(wanted):
        installed = _python() if distribution == "python" else version_of(distribution)
        if installed is None:
            found.append(f"{distribution} not installed")
        elif within(installed, versions):
            found.append(f"{distribution} {installed}")
        else:
            outside.append(f"{distribution} {installed} is not {versions}")
    # Not refused: the self-check decides whether a plan is right.
    return ("warn", "; ".join(outside)) if outside else ("ok", ", ".join(found))


def _python() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def _e3nn() -> Finding:
    """Whether e3nn can be imported by itself."""
    import importlib

    try:
        importlib.import_module("e3nn.o3")
    except pickle.UnpicklingError:
        if not _import_with_pickles():
            return "fail", f"e3nn can't be imported, not even with {UNPICKLE}=1"
        reason = "its constants are a pickle, which this torch refuses to load"
        return "warn", f"e3nn {version_of('e3nn')} can't be imported by itself: {reason}"
    except Exception as error:
        return "fail", f"{type(error).__name__}: {error}"
    return "ok", f"e3nn {version_of('e3nn')} is importable"


def _import_with_pickles() -> bool:
    """Import e3nn as MACE does; the variable is put back."""
    before = os.environ.get(UNPICKLE)
    os.environ[UNPICKLE] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("e3nn.o3")
    except Exception:
        return False
    finally:
        if before is None:
            del os.environ[UNPICKLE]
        else:
            os.environ[UNPICKLE] = before
    return True


def _start_file() -> Finding:
    """Whether E3NN_ACCEL=1 works, and by the files of this version."""
    from e3nn_accel.cli.hook import START_FILES, installed_at

    folder = installed_at()
    if folder is None:
        return "warn", "not installed: E3NN_ACCEL=1 has no effect on this Python"
    for name in START_FILES:
        ours = (resources.files("e3nn_accel") / "_start" / name).read_text(encoding="utf-8")
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != ours:
            return "warn", f"{folder / name} is missing or of another version"
    return "ok", str(folder)


def _plugins() -> Finding:
    """Plugins that were loaded, blocked, or broken."""
    found = registry()
    found.backends()
    found.targets()
    if found.problems:
        return "fail", "; ".join(f"{name}: {why}" for name, why in sorted(found.problems.items()))
    blocked = f"; blocked: {', '.join(found.blocked)}" if found.blocked else ""
    return "ok", ", ".join(found.plugins()) + blocked


def _backends() -> Finding:
    """Every backend with the reason why it can't run here; one must."""
    answers = registry().backends()
    found = "; ".join(f"{b.name}: {'available' if a.ok else a.reason}" for b, a in answers)
    return ("ok" if any(a.ok for _, a in answers) else "fail"), found or "there is none"


def _gpu() -> Finding:
    """The device; that there is none is no fault."""
    if not torch.cuda.is_available():
        return "ok", "no CUDA device: plans run in torch operations on the CPU"
    device = torch.cuda.get_device_name()
    if importlib.util.find_spec("cupy") is None:
        return "warn", f"{device}, but CuPy is not installed"
    return "ok", device


def _variables() -> Finding:
    """Names and values of E3NN_ACCEL variables that mean nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = Config.from_env()
    if caught:
        return "warn", "; ".join(str(warning.message) for warning in caught)
    names = sorted({*config.sources.values()})
    return "ok", ", ".join(names) + " set" if names else "none set"


def _self_test() -> Finding:
    """A linear layer and a tensor product, accelerated and stock."""
    if not (
        importlib.util.find_spec("e3nn") and ("e3nn.o3" in sys.modules or _import_with_pickles())
    ):
        return "fail", "e3nn can't be imported"
    modules, inputs = _samples()
    with suspend():
        stock = [module(*x) for module, x in zip(modules, inputs, strict=True)]
    with switch.enabled(skip=(), only=()), warnings.catch_warnings():
        warnings.simplefilter("ignore", E3nnAccelWarning)
        for module, x, expected in zip(modules, inputs, stock, strict=True):
            name = type(module).__name__
            if not torch.allclose(module(*x), expected, rtol=1e-10, atol=1e-12):
                return "fail", f"o3.{name} differs from stock e3nn"
            fallbacks = _explain(module)
            if fallbacks:
                return "fail", f"o3.{name} fell back to stock e3nn: {fallbacks[0].detail}"
    return "ok", "o3.Linear and o3.TensorProduct run accelerated and equal stock e3nn"


def _samples() -> tuple[list[Any], list[tuple[torch.Tensor, ...]]]:
    from e3nn import o3

    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    with torch.random.fork_rng(devices=[]):
        linear = o3.Linear("4x0e + 3x1o", "2x0e + 5x1o").double()
        path = (0, 0, 0, "uvu", True)
        product = o3.TensorProduct("4x1o", "1x1o", "4x1e", [path], internal_weights=True).double()
    return [linear, product], [(draw(5, 13),), (draw(5, 12), draw(5, 3))]


def _explain(module: torch.nn.Module) -> tuple[Any, ...]:
    from e3nn_accel.reporting import explain

    return explain(module).fallbacks


CHECKS: tuple[HealthCheck, ...] = (
    HealthCheck(
        "versions",
        _versions,
        "it may work all the same ('e3nn-accel verify' tells); else install a version in the range",
    ),
    HealthCheck("e3nn", _e3nn, f"import mace first, or set {UNPICKLE}=1; else reinstall e3nn"),
    HealthCheck("start file", _start_file, "'e3nn-accel hook install' installs or updates it"),
    HealthCheck("plugins", _plugins, "uninstall the plugin, or block it: E3NN_ACCEL_PLUGINS=-name"),
    HealthCheck("backends", _backends, "unblock the plugin 'torch', whose backend runs anywhere"),
    HealthCheck(
        "gpu", _gpu, "pip install 'e3nn_accel[cuda12]' (or cuda13), as your driver supports"
    ),
    HealthCheck("variables", _variables, "'e3nn-accel info' lists every variable with its values"),
    HealthCheck("self-test", _self_test, "report it with the output of 'e3nn-accel info --json'"),
)
