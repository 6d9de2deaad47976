"""What the README says of variables, commands and files is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from e3nn_accel._version import __version__
from e3nn_accel.cli import COMMANDS
from e3nn_accel.config import VARIABLES

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "e3nn_accel"
TEXT = (ROOT / "README.md").read_text()


def rows_under(header: str) -> list[str]:
    """The lines of the table with this first line, without its rule."""
    return TEXT.partition(header + "\n")[2].partition("\n\n")[0].splitlines()[1:]


def test_the_table_of_variables_is_the_configuration_s() -> None:
    """Every variable in order, word for word, and no others."""
    wanted = [f"| `{v.name}` | {v.values} | {v.default} | {v.meaning} |" for v in VARIABLES]
    assert rows_under("| variable | values | default | meaning |") == wanted


def test_every_variable_it_names_exists() -> None:
    """Wherever the text names one."""
    named = set(re.findall(r"\bE3NN_ACCEL(?:_[A-Z]+)*", TEXT))
    assert named <= {v.name for v in VARIABLES}


def test_every_example_is_listed() -> None:
    """In order, each once."""
    listed = re.findall(
        r"^\| \[([^]]+)\]\(examples/", "\n".join(rows_under("| example | what it shows |")), re.M
    )
    assert listed == sorted(path.name for path in (ROOT / "examples").glob("[0-9]*_*"))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_file_it_names_exists(document: str) -> None:
    """Paths in code marks, of the repository or of the package; `NAME` stands for another."""
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`((?:[\w*]+/)*[\w*]+\.(?:py|cu|cuh|json)|(?:\w+/)+)`", text))
    generated = {"plan.cuh", "kernels/NAME.cu"}
    folders = [ROOT, PACKAGE, ROOT / "tests", ROOT / "tests/gpu", PACKAGE / "_start"]
    assert len(named) > 5
    assert {n for n in named if not any(any(f.glob(n)) for f in folders)} <= generated


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_exists(document: str) -> None:
    """Targets that a document tells to make."""
    text = (ROOT / document).read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    made = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", text, re.M))
    assert made
    assert made <= targets


def test_the_citation_is_of_this_version() -> None:
    """The version and licence of the package."""
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {__version__}" in lines
    assert "license: MIT" in lines


def test_troubleshooting_quotes_what_the_code_says() -> None:
    """Messages in the table of symptoms, in quotation marks, are in the code."""
    section = TEXT.partition("## Troubleshooting")[2].partition("\n## ")[0]
    quoted = re.findall(
        r'"([^"`]+)"', section.replace('"Linear,products.*"', "").replace('"1"', "")
    )
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert len(quoted) > 10
    said = [re.sub(r"^0 ", "", message) for message in quoted]
    assert [message for message in said if message not in code] == []


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
