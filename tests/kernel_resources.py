"""What kernels take of a multiprocessor, by machine code that is compiled here and by the recorded table.

A change of a kernel that costs registers, spills or shared memory shows here, without a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kernel_plans import PLANS

from e3nn_accel.compile import Toolchain

TABLE = Path(__file__).with_suffix(".json")
COMPILATIONS = [(plan, sm) for plan, of in PLANS.items() for sm in of.architectures]


class Use(NamedTuple):
    """Registers of a thread, bytes that it spills (stored and loaded), bytes of shared memory of a block."""

    registers: int
    spilled: int
    shared: int

    def exceeds(self, limit: Use) -> bool:
        """Whether any of them is more."""
        return any(now > most for now, most in zip(self, limit, strict=True))


Uses = dict[str, Use]


class Table(NamedTuple):
    """The recorded uses, and the version of NVRTC that they are of."""

    compiler: str
    uses: Uses


def entries(plan: str, architecture: int) -> list[str]:
    """Names of a plan's kernels in the table, found without compiling."""
    return [
        _entry(plan, program.name, kernel, architecture)
        for program in PLANS[plan].all_programs()
        for kernel in program.entries
    ]


def compiled(plan: str, architecture: int, toolchain: Toolchain) -> Uses:
    """What a plan's kernels take now."""
    found: Uses = {}
    for binary in toolchain.build_all(list(PLANS[plan].all_programs()), architecture):
        for kernel, r in binary.resources.items():
            name = _entry(plan, binary.name, kernel, architecture)
            found[name] = Use(r.registers, r.spill_stores + r.spill_loads, r.shared)
    return found


def _entry(plan: str, program: str, kernel: str, architecture: int) -> str:
    return f"{plan}: {program}, {kernel}, sm_{architecture:03}"  # a width, for sorting


def recorded() -> Table:
    """The table."""
    content = json.loads(TABLE.read_text())
    uses = {name: Use(**use) for name, use in content["kernels"].items()}
    return Table(content["compiler"], uses)


def text_of(table: Table) -> str:
    """As it is kept: sorted, one line a kernel."""
    return "\n".join(_lines(table)) + "\n"


def _lines(table: Table) -> Iterable[str]:
    yield "{"
    yield f'  "compiler": {json.dumps(table.compiler)},'
    yield '  "kernels": {'
    names = sorted(table.uses)
    for name in names:
        comma = "" if name == names[-1] else ","
        yield f"    {json.dumps(name)}: {json.dumps(table.uses[name]._asdict())}{comma}"
    yield "  }"
    yield "}"
