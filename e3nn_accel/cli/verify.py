"""Compare a saved MACE model with itself on stock e3nn: energies, forces, stress, gradients.

Ends with exit code 0 if every number is close enough to stock, 1 if not. What is close enough is
listed by --tolerance-report, and is the same with E3NN_ACCEL_PRECISION, whose cost is told in a line.
The model's file is a pickle: open only files that you trust.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from e3nn_accel.cli.arguments import (
    add_device,
    add_json,
    add_structures,
    dtypes,
    model_and_structures,
    positive,
    without_warnings,
)
from e3nn_accel.cli.tables import Table, progress, show

if TYPE_CHECKING:
    from e3nn_accel.criteria import Row
    from e3nn_accel.verdict import DtypeParity, Parity

HELP = "compare a model's energies and forces with stock e3nn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and what to compare."""
    parser.add_argument("model", metavar="MODEL", help="a MACE model saved by torch.save")
    add_structures(parser)
    parser.add_argument(
        "--dtype", type=dtypes, default=("float64", "float32"), metavar="float64,float32"
    )
    parser.add_argument(
        "--train", action="store_true", help="also gradients of a loss by every parameter"
    )
    parser.add_argument(
        "--views", type=positive, metavar="N",
        help="measure float32 errors N times, turned and displaced a little "
        "(default: more often for smaller structures; 1: just as they are)",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance-report", action="store_true", help="every number, and the criteria"
    )
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, and say so."""
    model, structures = model_and_structures(args)
    from e3nn_accel.parity import compare

    with without_warnings(), progress("comparing", quiet=args.json) as step:
        parity = compare(model, structures, args.dtype, args.train, args.views, step, args.device)
    if args.json:
        show(parity.to_json())
    else:
        _show(args, parity)
    return 0 if parity.passed else 1


def _show(args: argparse.Namespace, parity: Parity) -> None:
    from e3nn_accel import criteria

    versions = ", ".join(f"{name} {version}" for name, version in parity.versions.items())
    show(f"{args.model}: {parity.model}; {versions}")
    for dtype in parity.dtypes:
        title = f"{dtype.dtype}, worst of {len(dtype.structures)} structures"
        rows = dtype.rows if args.tolerance_report else _worst(dtype)
        show("", _table(dtype.dtype if args.tolerance_report else title, rows))
        if dtype.cost:
            show(f"  {dtype.cost}")
        for row in dtype.fallbacks:
            show(f"  on stock e3nn: {row.path} ({row.cls}): {row.detail}")
    if args.tolerance_report:
        show("", (criteria.__doc__ or "").strip())
    show("", parity.verdict)


def _worst(dtype: DtypeParity) -> list[Row]:
    """Of each quantity the row nearest to its tolerance, or furthest beyond."""
    worst: dict[str, Row] = {}
    for row in dtype.rows:
        before = worst.get(row.quantity)
        if before is None or not row.margin <= before.margin:  # also where the margin is NaN
            worst[row.quantity] = row
    return list(worst.values())


def _table(title: str, rows: list[Row] | tuple[Row, ...]) -> Table:
    columns = ("quantity", "difference", "stock's own", "tolerance", "unit", "", "structure")
    cells = [
        (
            row.quantity,
            f"{row.error:.1e}",
            "-" if row.stock_error is None else f"{row.stock_error:.1e}",
            f"{row.tolerance:.1e}",
            row.unit,
            "ok" if row.passed else "FAILED",
            row.subject,
        )
        for row in rows
    ]
    return Table(columns, cells, title)
