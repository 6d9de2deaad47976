"""What a comparison with stock e3nn came to: a tree of frozen records, and its verdict."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from e3nn_accel.config import Precision
from e3nn_accel.criteria import Row
from e3nn_accel.reporting import Row as ModuleRow


@dataclass(frozen=True)
class StructureParity:
    """One structure in one dtype.

    Attributes:
        name: Its place among the structures, and its formula.
        atoms: How many.
        edges: How many neighbours within the cutoff.
        rows: Every number compared.
    """

    name: str
    atoms: int
    edges: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class DtypeParity:
    """All structures in one dtype.

    Attributes:
        dtype: "float32" or "float64".
        structures: In the order given.
        modules: Modules of supported classes in the model.
        accelerated: How many of them never ran on stock e3nn.
        fallbacks: The others, with the reason.
        asked: The precision that was asked for, if it is less than the dtype's.
        rounded: Whether a plan ran that takes it.
    """

    dtype: str
    structures: tuple[StructureParity, ...]
    modules: int
    accelerated: int
    fallbacks: tuple[ModuleRow, ...]
    asked: Precision | None = None
    rounded: bool = False

    @property
    def cost(self) -> str:
        """What the precision that was asked for costs, in a line; the tolerances stay those of the dtype."""
        if self.asked is None:
            return ""
        if not self.rounded:
            return f"{self.asked} was asked for, but nothing here has kernels that take it"
        worst = max((row for row in self.rows if row.quantity == "forces"), key=lambda r: r.margin)
        where = "within" if worst.passed else "beyond"
        return (
            f"{self.asked}, as asked for: forces off by {worst.error:.1e} ({worst.unit}), "
            f"{where} {self.dtype}'s tolerance of {worst.tolerance:.1e}"
        )

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of every structure."""
        return tuple(row for structure in self.structures for row in structure.rows)

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)


@dataclass(frozen=True)
class Parity:
    """The outcome of `compare`; ``to_json`` is a document for bug reports."""

    model: str
    versions: dict[str, str]
    dtypes: tuple[DtypeParity, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every number compared."""
        return tuple(row for dtype in self.dtypes for row in dtype.rows)

    @property
    def passed(self) -> bool:
        """Whether every number is close enough to stock."""
        return all(dtype.passed for dtype in self.dtypes)

    @property
    def verdict(self) -> str:
        """One line."""
        failed = sum(not row.passed for row in self.rows)
        fallen = max((len(dtype.fallbacks) for dtype in self.dtypes), default=0)
        numbers = f"{len(self.rows)} numbers compared with stock e3nn"
        outcome = "PASSED: all within tolerance" if not failed else f"FAILED: {failed} off"
        ran = [
            f"{d.accelerated} of {d.modules} modules accelerated in {d.dtype}" for d in self.dtypes
        ]
        return f"{outcome}, {numbers}; {', '.join(ran)}" + (
            f"; {fallen} fell back" if fallen else ""
        )

    def to_json(self) -> str:
        """Everything, as JSON; numbers that aren't finite become null (and have failed)."""
        document: dict[str, Any] = asdict(self)
        document |= {"passed": self.passed, "verdict": self.verdict}
        for dtype, plain in zip(self.dtypes, document["dtypes"], strict=True):
            plain |= {"passed": dtype.passed, "cost": dtype.cost}
            for structure, entry in zip(dtype.structures, plain["structures"], strict=True):
                for row, fields in zip(structure.rows, entry["rows"], strict=True):
                    fields["passed"] = row.passed
        return json.dumps(_finite(document), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value
