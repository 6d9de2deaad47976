# /// script
# requires-python = ">=3.10"
# dependencies = ["e3nn_accel"]
# ///
"""What isn't accelerated, and why: `explain` before anything ran, `report` after, `strict` to insist.

One of four layers is plain e3nn. Two can't be replaced: a subclass computes something else, and a
forward hook is run by stock e3nn alone. The last is left out on request.

    python examples/4_explain_fallbacks.py
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4 reads a pickle

import torch
from e3nn import o3

import e3nn_accel

IRREPS = "8x0e+8x1o"


class ClampedLinear(o3.Linear):
    """A linear with a forward of its own, which a plan for `o3.Linear` can't stand in for."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The linear's result, with limits."""
        return super().forward(features).clamp(-1, 1)


def build() -> torch.nn.Module:
    """Four linears in a row."""
    model = torch.nn.Sequential()
    model.add_module("plain", o3.Linear(IRREPS, IRREPS))
    model.add_module("subclass", ClampedLinear(IRREPS, IRREPS))
    model.add_module("hooked", o3.Linear(IRREPS, IRREPS))
    model.add_module("left_out", o3.Linear(IRREPS, IRREPS))
    model.hooked.register_forward_hook(lambda module, inputs, output: None)
    return model


def main() -> None:
    """Explain, run, report; then ask for what can't be had."""
    model = e3nn_accel.accelerate(build(), skip="left_out")

    print("before any call, by plans:")
    print(e3nn_accel.explain(model))

    model(torch.randn(10, 32))
    print("\nafter a call, what ran:")
    print(e3nn_accel.report())

    print("\nthe same for programs: reasons of what fell back")
    for row in e3nn_accel.report().fallbacks:
        print(f"  {row.cls}: {row.detail}")

    print("\nstrict, in a dtype that no backend takes:")
    with e3nn_accel.enabled(strict=True):
        try:
            o3.Linear(IRREPS, IRREPS).bfloat16()(torch.randn(10, 32, dtype=torch.bfloat16))
        except e3nn_accel.AccelError as error:
            print(error)


if __name__ == "__main__":
    main()
