"""A captured training step against an eager one, once, before anything of it is used.

Whatever a capture took from its inputs on the host (a number of neighbours, an order) would be wrong for every
other input of the same size. So the two are compared on other inputs than those it was captured on: the same
structures with their edges in reverse order, atoms displaced by a hundredth of an angstrom, elements the other
way round. Results, and gradients of random combinations of them, by everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from e3nn_accel.graphs.eligibility import Request
from e3nn_accel.graphs.outputs import NotCapturable
from e3nn_accel.graphs.training import TrainingStep

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
"""By the positions' dtype (MACE sums some of a float32 model's energies in float64), norm-wise, of a tensor; of
one that cancels, of the largest of its kind."""
CANCELLED = 1e-3
DISPLACED = 0.01
REVERSED = ("edge_index", "shifts", "unit_shifts", "node_attrs")


def check(
    step_for: Callable[[Request], TrainingStep],
    replay: Callable[[TrainingStep], list[torch.Tensor]],
    request: Request,
) -> None:
    """Compare.

    Args:
        step_for: Makes a step of a request.
        replay: Its results.
        request: That the step was captured for.

    Raises:
        NotCapturable: A replay gives something else, or is of a precision that isn't known here.
    """
    dtype = request.inputs["positions"].dtype
    if dtype not in TOLERANCE:
        raise NotCapturable(f"positions are {dtype}")
    generator = torch.Generator(request.inputs["positions"].device).manual_seed(0)
    step = step_for(replace(request, inputs=_others(request, generator)))
    replayed = replay(step)
    derivative = step.derivative
    like = [replayed[n] for n in derivative.places]
    grads = [torch.empty_like(t).normal_(generator=generator) for t in like]
    found = step.gradients(grads)
    leaves = [step.request.inputs[name] for name in derivative.leaves if name in request.inputs]
    for leaf in leaves:
        leaf.requires_grad_(True)
    results, expected = step.eagerly(grads, differentiable=False)
    _compare("results", like, results, TOLERANCE[dtype])
    _compare("gradients", found, expected, TOLERANCE[dtype])


def _others(request: Request, generator: torch.Generator) -> dict[str, torch.Tensor]:
    found = {name: tensor.detach() for name, tensor in request.inputs.items()}
    for name in REVERSED:
        if name in found:
            found[name] = found[name].flip(request.axes[name].dim)
    away = torch.empty_like(found["positions"]).normal_(generator=generator)
    found["positions"] = found["positions"] + DISPLACED * away
    return found


def _compare(
    kind: str,
    found: Sequence[torch.Tensor | None],
    expected: Sequence[torch.Tensor | None],
    tolerance: float,
) -> None:
    if [t is None for t in found] != [t is None for t in expected]:
        raise NotCapturable(f"a replay's {kind} are others than an eager call's")
    pairs = [
        (f, e) for f, e in zip(found, expected, strict=True) if f is not None and e is not None
    ]
    if not pairs:
        return
    norms = torch.stack([e.detach().norm() for _, e in pairs])
    errors = torch.stack([(f - e).detach().norm() for f, e in pairs])
    limit = tolerance * torch.maximum(norms, CANCELLED * norms.max())
    if not bool((errors <= limit).all()):
        worst = float((errors / limit).max()) * tolerance
        raise NotCapturable(f"a replay's {kind} differ from an eager call's by {worst:.1e}")
