"""What the README says of variables, commands and files is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from e3nn_accel.cli import COMMANDS
from e3nn_accel.config import VARIABLES, Variable

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("row", VARIABLES, ids=lambda row: row.name)
def test_every_variable_is_in_the_table(row: Variable) -> None:
    """Name, values, default and meaning, word for word."""
    assert f"| `{row.name}` | {row.values} | {row.default} | {row.meaning} |" in TEXT


def test_every_link_leads_somewhere() -> None:
    """Links into the repository name files that are there."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_exists() -> None:
    """Subcommands that the README shows are in the command line's table."""
    shown = set(re.findall(r"e3nn-accel (\w+)", TEXT))
    assert shown
    assert shown <= set(COMMANDS)
