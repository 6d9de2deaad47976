"""A device that is full and processes forked after it was used: stock's errors, and then all is well."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from small_models import build, inputs_of, same, value_and_gradients
from test_forks import agrees, in_child

import e3nn_accel

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("eager_e3nn", "float64")]
ROWS = 200_000


@pytest.mark.parametrize("name", ["Linear", "TensorProduct", "ElementwiseTensorProduct"])
def test_out_of_memory(name: str) -> None:
    """torch's error; the plan is kept, and gives stock's numbers when there is room again."""
    module = build(name).cuda()
    inputs = [x.detach().cuda().requires_grad_() for x in inputs_of(module, ROWS)]
    with e3nn_accel.interception.suspend():
        expected = value_and_gradients(module, *inputs)
    e3nn_accel.enable(backend="cuda")
    value_and_gradients(module, *inputs)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            value_and_gradients(module, *inputs)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    same(value_and_gradients(module, *inputs), expected, 1e-9)
    rows = {row.backend: row.calls for row in e3nn_accel.report().rows}
    assert rows["cuda"] == 2


def test_children_after_cuda_was_used() -> None:
    """They may use the CPU; of CUDA they hear what torch has to say."""
    module = build("Linear").cuda()
    x = torch.randn(5, module.irreps_in.dim, device="cuda")
    e3nn_accel.enable()
    module(x)

    def work() -> None:
        with pytest.raises(RuntimeError, match="re-initialize CUDA in forked subprocess"):
            build("Linear").cuda()

        linear = build("Linear")
        with torch.no_grad():
            (y,) = inputs_of(linear)
            with e3nn_accel.interception.suspend():
                expected = linear(y)
            same(linear(y), expected)

    in_child(work)
    agrees("Linear")
