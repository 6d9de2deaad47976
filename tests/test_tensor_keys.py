"""What is kept for a tensor is that tensor's alone, and goes with it."""

from __future__ import annotations

import gc

import pytest
import torch

from e3nn_accel.tensor_keys import OfTensors

pytestmark = pytest.mark.once


def test_found_by_the_object_and_not_by_what_it_holds() -> None:
    kept: OfTensors[str] = OfTensors()
    one, other = torch.zeros(3), torch.zeros(3)
    kept.put(one, "one")
    assert kept.get(one) == "one"
    assert kept.get(other) is None
    kept.put(one, "another")
    assert kept.get(one) == "another"
    assert len(kept) == 1


def test_nothing_is_kept_of_a_tensor_that_is_no_more() -> None:
    kept: OfTensors[int] = OfTensors()
    for n in range(50):
        tensor = torch.zeros(3)  # often where the one before was
        assert kept.get(tensor) is None
        kept.put(tensor, n)
    assert len(kept) == 1
    del tensor
    assert len(kept) == 0


def test_a_tensor_that_only_torch_holds_comes_back_with_its_value() -> None:
    kept: OfTensors[str] = OfTensors()
    leaf = torch.zeros(3, requires_grad=True)
    kept.put(leaf, "leaf")
    out = leaf * 2
    del leaf
    gc.collect()
    assert kept.get(out.grad_fn.next_functions[0][0].variable) == "leaf"  # type: ignore[union-attr]
    del out
    assert len(kept) == 0
