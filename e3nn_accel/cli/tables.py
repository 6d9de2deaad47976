"""Tables and progress for people: rich ones on a terminal, aligned text otherwise and without rich.

Nothing here writes to standard output but `show`, so that ``--json`` has it for itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "FAILED": "bold red"}
"""Colours of words that stand alone in a cell."""


@dataclass(frozen=True)
class Table:
    """Rows under titles.

    Attributes:
        columns: Titles; a column of numbers (all but its empty cells) is aligned to the right.
        rows: Cells, as text.
        title: A line above it, or empty.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


def show(*parts: Table | str) -> None:
    """Print tables and lines to standard output."""
    for part in parts:
        if isinstance(part, str):
            print(part)
        elif _is_rich(sys.stdout):
            _show_rich(part)
        else:
            print("\n".join(plain(part)))


def show_json(document: Any) -> None:
    """Print one JSON document to standard output; numbers that aren't finite must be gone."""
    print(json.dumps(document, indent=1, allow_nan=False))


def plain(table: Table) -> list[str]:
    """Its lines as aligned text."""
    lines = [list(table.columns), *[list(row) for row in table.rows]]
    widths = [max(len(line[n]) for line in lines) for n in range(len(table.columns))]
    right = [_is_numeric(table, n) for n in range(len(table.columns))]
    text = [
        "  ".join(
            cell.rjust(width) if to_the_right else cell.ljust(width)
            for cell, width, to_the_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]
    return ([table.title] if table.title else []) + ["  " + line for line in text]


@contextlib.contextmanager
def progress(title: str, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A line on a terminal that shows the present step; nothing where standard error is none."""
    if quiet or not _is_rich(sys.stderr):
        yield lambda step: None
        return
    from rich.console import Console

    with Console(stderr=True).status(title) as status:
        yield lambda step: status.update(f"{title}: {step}")


def _is_rich(stream: Any) -> bool:
    return bool(stream.isatty()) and importlib.util.find_spec("rich") is not None


def _show_rich(table: Table) -> None:
    import rich.box
    import rich.console
    import rich.table
    from rich.text import Text

    drawn = rich.table.Table(title=table.title or None, title_justify="left", box=rich.box.SIMPLE)
    for n, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if _is_numeric(table, n) else "left")
    for row in table.rows:  # as Text: brackets in a reason are no markup
        drawn.add_row(*[Text(cell, style=STYLES.get(cell, "")) for cell in row])
    rich.console.Console().print(drawn)


def _is_numeric(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows if row[column]]
    return bool(cells) and all(cell[0].isdigit() or cell == "-" for cell in cells)
