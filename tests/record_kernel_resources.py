"""Compile the kernels of every recorded plan, and make what they take the limit of the tests.

python tests/record_kernel_resources.py             all of them (a few minutes), after a change of a kernel
python tests/record_kernel_resources.py "MACE*"     those plans; the rest stays
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from fnmatch import fnmatch

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 reads a pickle

import torch
from kernel_resources import COMPILATIONS, TABLE, Table, compiled, entries, recorded, text_of

from e3nn_accel.compile import Toolchain
from e3nn_accel.nvrtc import bindings_compiler


def main(pattern: str = "*") -> None:
    """Record the plans that the pattern matches, and say what changed."""
    torch.set_default_dtype(torch.float64)
    toolchain = Toolchain(replace(bindings_compiler(), native=True))
    before = recorded().uses if TABLE.exists() else {}
    wanted = {name for plan, sm in COMPILATIONS for name in entries(plan, sm)}
    after = {name: use for name, use in before.items() if name in wanted}
    for plan, architecture in COMPILATIONS:
        if fnmatch(plan, pattern):
            started = time.perf_counter()
            after |= compiled(plan, architecture, toolchain)
            print(f"{plan}, sm_{architecture}: {time.perf_counter() - started:.1f} s", flush=True)
    TABLE.write_text(text_of(Table(toolchain.compiler.version, after)))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            print(f"{name}\n  was {before.get(name)}\n  is  {after.get(name)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
