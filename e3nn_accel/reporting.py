"""What ran where, and why not: the report of a process, and the explanation of one model."""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from e3nn_accel import switch
from e3nn_accel._version import __version__
from e3nn_accel.active import active
from e3nn_accel.config import Config, Precision
from e3nn_accel.errors import FallbackWarning
from e3nn_accel.graphs import MODEL_CALL
from e3nn_accel.neighbours import NEIGHBOURS

AROUND_OPERATIONS = (MODEL_CALL, NEIGHBOURS)
"""What is reported besides operations."""


@dataclass(frozen=True)
class Row:
    """Modules that share a fate.

    Attributes:
        path: The module's name in its model (`explain`), or empty (`report`).
        cls: Class name.
        operation: linear, tensor_product, convolution, contraction, radial_mlp, spherical_harmonics,
            radial_embedding or reshape_irreps; empty where it wasn't reached; "model" for whole calls of a
            model on a GPU, "neighbours" for the batches of a calculator.
        backend: The backend that runs it, or "e3nn"; of a model "graph" or "eager", of batches "verlet" or "mace".
        detail: The plan's strategy, or the reason of the fallback.
        modules: How many modules.
        calls: How many calls.
        seconds: Time in those calls, 0 unless profiling.
    """

    path: str
    cls: str
    operation: str
    backend: str
    detail: str
    modules: int
    calls: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """Rows with a heading; ``str()`` is a plain table, `to_json` a document for bug reports.

    Attributes:
        by_choice: Lines for modules that stock e3nn has by choice, and why; no fallbacks, and not among the rows.
    """

    heading: str
    rows: tuple[Row, ...]
    by_choice: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([self.heading, *_table(self.rows), *self.by_choice])

    def to_json(self) -> str:
        """Heading and rows as JSON."""
        content: dict[str, Any] = {"heading": self.heading}
        content["rows"] = [asdict(row) for row in self.rows]
        if self.by_choice:
            content["by_choice"] = self.by_choice
        return json.dumps(content, indent=1)

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        """The rows that ran, or would run, on stock e3nn."""
        return tuple(row for row in self.rows if row.backend == "e3nn")


def report() -> Report:
    """What has run since enabling (or ran before disabling), by class, backend and reason.

    Modules that are gone by now are among it.
    """
    dispatcher = active.dispatcher or active.previous
    if dispatcher is None:
        return Report(f"e3nn_accel {__version__}: {_state()}", ())
    import torch  # not in every process that ends

    from e3nn_accel.runner import Total, Totals, total

    totals, gone, called = Totals(Total), dispatcher.departed, set()
    for key, of_gone in list(gone.totals.items()):
        totals[key].add(of_gone, of_gone.modules)
    for module, runner in list(dispatcher.runners.items()):
        if runner.usage:
            called |= {id(module)} if isinstance(module, torch.nn.Module) else set()
            total(totals, type(module).__name__, runner)
    rows = [
        Row("", *key, found.modules, found.calls, found.seconds) for key, found in totals.items()
    ]
    rows.sort(key=lambda row: (row.backend == "e3nn", row.cls, row.operation, -row.calls))
    operations = [row for row in rows if row.operation not in AROUND_OPERATIONS]
    accelerated = sum(row.calls for row in operations if row.backend != "e3nn")
    calls = sum(row.calls for row in operations)
    seen = gone.modules + len(called | {id(module) for module in active.seen})
    return Report(
        f"e3nn_accel {__version__}: {_state()}; {seen} modules seen, {gone.modules + len(called)} called, "
        f"{accelerated} of {calls} calls accelerated",
        tuple(rows),
    )


def explain(model: Any) -> Report:
    """Where every supported module of a model runs, or would run, and why.

    Modules that were called show what happened; the others are planned for the dtype and device of
    the model's parameters, without being called. Works whether enabled or not.

    Args:
        model: Any ``torch.nn.Module``.
    """
    if active.dispatcher is None and "e3nn.o3" in sys.modules:
        with switch.enabled():
            return explain(model)
    if active.dispatcher is None:  # a model without e3nn, which was never imported
        return Report(f"{type(model).__name__}: 0 operations, 0 accelerated, 0 on e3nn", ())
    rows: list[Row] = []
    by_choice: Counter[str] = Counter()
    for path, module in model.named_modules():
        reason = _by_choice(model, module)
        if reason:
            by_choice[f"{type(module).__name__} on stock e3nn by choice: {reason}"] += 1
        else:
            rows.extend(_explain_module(model, path, module))
    fallbacks = sum(row.backend == "e3nn" for row in rows)
    name = type(model).__name__
    return Report(
        f"{name}: {len(rows)} operations, {len(rows) - fallbacks} accelerated, {fallbacks} on e3nn",
        tuple(rows),
        tuple(f"  {count} {line}" for line, count in by_choice.items()),
    )


def _by_choice(model: Any, module: Any) -> str:
    """Why stock e3nn has this module's calls by choice, or an empty string; as `Dispatcher.call_for` decides."""
    dispatcher = active.dispatcher
    assert dispatcher is not None
    found = dispatcher.target_of(module)
    if found is None or not found[0].backend:
        return ""
    runner = dispatcher.runners.get(module) or dispatcher.runner_for(module, found[1])
    if runner.config is None or runner.usage:
        return ""
    return dispatcher.left_by_choice(found[0], runner, _tensor_of(model, module))


def _tensor_of(model: Any, module: Any) -> Any:
    """One of a module's floating-point parameters, or else of its model's."""
    import torch

    return next(
        (t for t in [*module.parameters(), *model.parameters()] if t.is_floating_point()),
        torch.empty(0),
    )


def precision(model: Any) -> tuple[Precision | None, bool]:
    """What a model's products of float32 are asked to be rounded to, if to anything, and whether a plan does so."""
    dispatcher = active.dispatcher
    found = [dispatcher.runners.get(module) for module in model.modules()] if dispatcher else []
    runners = [runner for runner in found if runner is not None]
    wanted = [runner.config.precision for runner in runners if runner.config is not None]
    plans = [outcome.plan for runner in runners for outcome in runner.outcomes.values()]
    rounded = any(plan is not None and plan.rounded_to is not None for plan in plans)
    return next((one for one in wanted if one != "float32"), None), rounded


def _explain_module(model: Any, path: str, module: Any) -> list[Row]:
    dispatcher = active.dispatcher
    assert dispatcher is not None
    found = dispatcher.target_of(module)
    if found is None:
        return []
    target, stock_forward = found
    runner = dispatcher.runners.get(module) or dispatcher.runner_for(module, stock_forward)
    if runner.usage:
        return [
            Row(path, type(module).__name__, operation, backend, reason or runner.strategy(operation), 1,
                usage.calls, usage.seconds)
            for (operation, backend, reason), usage in runner.usage.items()
        ]  # fmt: skip
    tensor = _tensor_of(model, module)
    operation = "convolution" if _fused_by_its_block(model, path) else target.operation
    backend, detail = dispatcher.explain(module, runner, operation, tensor.dtype, tensor.device)
    return [Row(path, type(module).__name__, operation, backend, detail, 1, 0, 0.0)]


def _fused_by_its_block(model: Any, path: str) -> bool:
    block, _, name = path.rpartition(".")
    return name == "conv_tp" and bool(getattr(model.get_submodule(block), "conv_fusion", False))


def at_exit(config: Config) -> None:
    """Print or write the report as E3NN_ACCEL_REPORT asks; warn where nothing at all was accelerated."""
    result = report()
    operations = [row for row in result.rows if row.operation not in AROUND_OPERATIONS]
    if operations and len(result.fallbacks) == len(operations):
        top = max(operations, key=lambda row: row.calls)
        warnings.warn(
            f"e3nn_accel accelerated nothing; most calls: {top.cls}: {top.detail}",
            FallbackWarning,
            stacklevel=1,
        )
    if config.report == "1":
        sys.stderr.write(f"{result}\n")
    elif config.report not in ("", "0"):
        Path(config.report).write_text(result.to_json())


def _state() -> str:
    config = active.config
    if config is None:
        return f"off, {len(active.models)} modules accelerated singly" if active.models else "off"
    return "on, strict" if config.strict else "on"


def _table(rows: tuple[Row, ...]) -> list[str]:
    """Aligned columns; those that say nothing are left out."""
    if not rows:
        return []
    columns = ["path", "cls", "operation", "backend", "modules", "calls", "seconds", "detail"]
    columns = [name for name in columns if any(getattr(row, name) for row in rows)]
    if all(row.modules == 1 for row in rows):
        columns.remove("modules")
    titles = {"cls": "class", "seconds": "ms"}
    cells = [[titles.get(name, name) for name in columns]]
    for row in rows:
        cells.append(
            [
                f"{row.seconds * 1e3:.1f}" if name == "seconds" else str(getattr(row, name))
                for name in columns
            ]
        )
    widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
