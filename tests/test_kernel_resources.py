"""No kernel takes more registers, spills or shared memory than was recorded for it."""

from __future__ import annotations

import functools
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_plans import PLANS, single_matrix
from kernel_resources import COMPILATIONS, TABLE, Use, compiled, entries, recorded, text_of

from e3nn_accel.compile import Toolchain
from e3nn_accel.nvrtc import CompileError, bindings_compiler

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("eager_e3nn", "float64")]

SOURCES = Path(__file__).parents[1] / "kernels"
RECORD = "python tests/record_kernel_resources.py"


def _marked(plan: str, sm: int) -> object:
    """One architecture in .ci/run, all in .ci/full."""
    quick = sm == 90 and not PLANS[plan].takes_long
    return pytest.param(plan, sm, marks=[] if quick else pytest.mark.slow, id=f"{plan}, sm_{sm}")


@functools.cache
def toolchain() -> Toolchain | str:
    """With the NVRTC from PyPI; or why there is none."""
    try:
        return Toolchain(replace(bindings_compiler(), native=True))
    except (ImportError, RuntimeError, CompileError) as error:
        return f"no NVRTC from PyPI: {error}"


@pytest.mark.parametrize(("plan", "architecture"), [_marked(*of) for of in COMPILATIONS])
def test_no_kernel_takes_more_than_recorded(plan: str, architecture: int) -> None:
    """Where a kernel is better for taking more, record it and say why in the commit."""
    if PLANS[plan].of_mace:
        pytest.importorskip("mace", reason="MACE isn't installed")
    nvrtc = toolchain()
    if isinstance(nvrtc, str):
        pytest.skip(nvrtc)
    now, table = compiled(plan, architecture, nvrtc), recorded()
    assert sorted(now) == sorted(entries(plan, architecture))  # each with a report
    version = nvrtc.compiler.version
    if table.compiler != version:
        pytest.skip(f"they compile; recorded with NVRTC {table.compiler}, not {version}: {RECORD}")
    more = {
        name: f"{use}, recorded {table.uses[name]}"
        for name, use in now.items()
        if use.exceeds(table.uses[name])
    }
    assert more == {}, RECORD


def test_the_table_is_of_these_kernels() -> None:
    """None is missing, and none is there any more that isn't compiled."""
    pytest.importorskip("mace", reason="MACE isn't installed")
    wanted = {name for plan, sm in COMPILATIONS for name in entries(plan, sm)}
    found = recorded().uses.keys()
    assert found == wanted, f"missing {wanted - found}, stale {found - wanted}: {RECORD}"


def test_every_kernel_is_in_the_table() -> None:
    """Whatever a source defines, some recorded plan compiles."""
    defined = {
        name
        for source in SOURCES.glob("*.cu*")
        for name in re.findall(r'extern "C"[^(]*\([^)]*\)\s*(\w+)\(', source.read_text())
    }
    assert len(defined) > 20
    assert defined <= {name.split(", ")[-2] for name in recorded().uses}


def test_lots_of_products_have_registers_of_their_own() -> None:
    """Of warpgroups, in a sum of one step, without a loop: else the assembler took one lot for the other."""
    nvrtc = toolchain()
    if isinstance(nvrtc, str):
        pytest.skip(nvrtc)
    programs = single_matrix("36x0e+20x1o+4x2e", "8x2e+44x0e+132x1o")(torch.float32, 90)
    for program in (program for program in programs if program.features_of):
        options = program.compiler_options()
        ptx = nvrtc.compiler.run(program.source(), "a.cu", options, "compute_90a").binary.decode()
        lots = re.findall(r"wgmma\.mma_async[^{]*\{([^}]*)\}, \{[^}]*\}, %rd\d+, 0,", ptx)
        assert len(lots) >= 3
        assert len(set(lots)) == len(lots)


@pytest.mark.slow
def test_compiles_within_seconds() -> None:
    """MACE's largest contraction, nothing from a cache: of one core's time; several compile side by side."""
    pytest.importorskip("mace", reason="MACE isn't installed")
    nvrtc = toolchain()
    if isinstance(nvrtc, str):
        pytest.skip(nvrtc)
    programs = list(PLANS["contraction, MACE large"].all_programs(90))
    started = time.process_time()
    nvrtc.build_all(programs, 90)
    assert time.process_time() - started < 15


def test_the_table_is_as_it_is_written() -> None:
    """Sorted, a line a kernel: an edit by hand or a merge that isn't shows."""
    assert text_of(recorded()) == TABLE.read_text()


@pytest.mark.parametrize("more", [Use(41, 0, 512), Use(40, 4, 512), Use(40, 0, 513)])
def test_any_of_the_three_counts(more: Use) -> None:
    limit = Use(40, 0, 512)
    assert more.exceeds(limit)
    assert not limit.exceeds(more)
