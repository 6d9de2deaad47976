"""Calls captured for inference: gradients may be written over what they are gradients of, or may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from e3nn_accel.graphs.record import of_inference
from e3nn_accel.overwriting import differentiated_once, may_overwrite


class Running:
    """A lane that runs what it is to record."""

    def record(self, run: Any, derivative: Any = None) -> Any:
        return run()


def write_and_read(w: torch.Tensor) -> torch.Tensor:
    """Something keeps w for its gradient, which is written to before where that is allowed."""
    loss = w.square().sum()
    if may_overwrite():
        with torch.no_grad():
            w.mul_(3)
    return torch.autograd.grad(loss, w)[0]


def test_inference_overwrites() -> None:
    seen = []
    of_inference(Running(), lambda: seen.append(may_overwrite()))  # type: ignore[arg-type]
    assert seen == [True]
    assert not may_overwrite()


def test_once_more_without_where_that_fails() -> None:
    """With torch's own error, and the right gradient."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    found: Any = of_inference(Running(), lambda: write_and_read(x * 1))  # type: ignore[arg-type]
    assert torch.equal(found, torch.tensor([2.0, 4.0]))


def test_other_errors_are_whose_they_are() -> None:
    calls = []

    def run() -> Any:
        calls.append(may_overwrite())
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        of_inference(Running(), run)  # type: ignore[arg-type]
    assert calls == [True]


def test_only_within() -> None:
    with differentiated_once(), differentiated_once():
        pass
    assert not may_overwrite()
