"""`tests/gpu/train_on_two.py` on the CPU: what runs on two GPUs by NCCL, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mace", reason="MACE isn't installed")
pytestmark = [pytest.mark.slow, pytest.mark.once]

SCRIPT = Path(__file__).parent / "gpu" / "train_on_two.py"


def test_losses_are_those_of_one_process() -> None:
    """A whole MACE, its forces differentiated, in DistributedDataParallel."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
         "--nproc_per_node=2", str(SCRIPT), "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count("2 processes") == 10
