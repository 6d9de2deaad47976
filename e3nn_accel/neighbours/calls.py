"""The calls of every calculator that is accelerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from e3nn_accel import generation
from e3nn_accel.interception import suspended
from e3nn_accel.neighbours.changes import plain_changes
from e3nn_accel.neighbours.results import results_of
from e3nn_accel.neighbours.state import CalculatorState
from e3nn_accel.runner import Runner

REPLACED = ("_atoms_to_batch", "calculate", "check_state")
SHORT_CUT = ("_clone_batch", "_create_result_tensors", "_slice_real_outputs")
"""Steps of MACE's `calculate` that ours takes in one."""


class CalculatorCalls:
    """The calls of every calculator.

    Attributes:
        stock: MACE's own methods by name, those that are replaced and those of `SHORT_CUT`.
        ours: What they are replaced by.
        models: Classes of models whose results are known.
    """

    def __init__(self, runner_for: Callable[[Any], Runner]) -> None:
        self.runner_for = runner_for
        self.stock: dict[str, Callable[..., Any]] = {}
        self.ours: dict[str, Callable[..., Any]] = {}
        self.models: tuple[type, ...] = ()
        self._states: WeakKeyDictionary[Any, CalculatorState] = WeakKeyDictionary()

    def batch(self, calculator: Any, atoms: Any) -> Any:
        """MACE's Batch of a structure."""
        state = self._state(calculator)
        if state is None:
            return self.stock["_atoms_to_batch"](calculator, atoms)
        return state.batch(calculator, atoms)

    def changes(self, calculator: Any, atoms: Any, tolerance: float) -> Any:
        """What ASE says has changed since the last results."""
        found = None
        if self._state(calculator) is not None:
            found = plain_changes(calculator, atoms, tolerance)
        if found is None:
            return self.stock["check_state"](calculator, atoms, tolerance)
        return found

    def calculate(self, calculator: Any, atoms: Any, *rest: Any) -> None:
        """Set ``calculator.results``."""
        state = self._state(calculator)
        if state is None or atoms is None or not self._plain(calculator):
            self.stock["calculate"](calculator, atoms, *rest)
            return
        tensors = state.tensors(calculator, atoms)
        if tensors is None:
            with state.declined():
                self.stock["calculate"](calculator, atoms, *rest)
            return
        from ase.calculators import calculator as ase_calculator

        base: Any = ase_calculator.Calculator
        base.calculate(calculator, atoms)
        [model] = calculator.models
        # the very arguments of MACE's own call
        out = model(
            tensors,
            compute_stress=True,
            training=False,
            compute_edge_forces=False,
            compute_atomic_stresses=False,
        )
        calculator.results = results_of(calculator, out, tensors)

    def clear(self) -> None:
        """Forget every list."""
        self._states.clear()

    def _state(self, calculator: Any) -> CalculatorState | None:
        """Where a call isn't MACE's own from the start."""
        if suspended():
            return None
        state = self._states.get(calculator)
        if state is None or state.generation != generation.current.name:
            runner = self.runner_for(calculator)
            state = CalculatorState(runner, self.stock["_atoms_to_batch"])
            self._states[calculator] = state
        return None if state.off else state

    def _plain(self, calculator: Any) -> bool:
        """Whether its `calculate` is MACE's for one model, and of numbers of one precision."""
        cls = type(calculator)
        return (
            len(calculator.models) == calculator.num_models == 1
            and calculator.model_type == "MACE"
            and not calculator.compute_atomic_stresses
            and type(calculator.models[0]) in self.models
            and str(next(calculator.models[0].parameters()).dtype)
            == f"torch.{calculator.default_dtype}"
            and all(getattr(cls, name) is self.stock[name] for name in SHORT_CUT)
            and vars(calculator).keys().isdisjoint({*SHORT_CUT, *REPLACED})
            and all(getattr(cls, name) is self.ours[name] for name in REPLACED)
        )
