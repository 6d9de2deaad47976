"""Options and environment variables: what is understood, what warns, what wins."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest

from e3nn_accel import config
from e3nn_accel.config import VARIABLES, Config
from e3nn_accel.errors import E3nnAccelWarning

pytestmark = pytest.mark.once

PARSED: list[tuple[str, str, dict[str, Any]]] = [
    ("E3NN_ACCEL", "0", {"enabled": False}),
    ("E3NN_ACCEL", "1", {"enabled": True}),
    ("E3NN_ACCEL", " on ", {"enabled": True}),
    ("E3NN_ACCEL", "off", {"enabled": False}),
    ("E3NN_ACCEL", "True", {"enabled": True}),
    ("E3NN_ACCEL", "strict", {"enabled": True, "strict": True}),
    ("E3NN_ACCEL", "STRICT", {"enabled": True, "strict": True}),
    ("E3NN_ACCEL", "verify", {"enabled": True, "verify": True}),
    ("E3NN_ACCEL_BACKEND", "torch", {"backend": "torch"}),
    ("E3NN_ACCEL_BACKEND", "mine", {"backend": "mine"}),
    ("E3NN_ACCEL_LOG", "debug", {"log": "DEBUG"}),
    ("E3NN_ACCEL_LOG", "WARNING", {"log": "WARNING"}),
    ("E3NN_ACCEL_REPORT", "0", {"report": "0"}),
    ("E3NN_ACCEL_REPORT", "1", {"report": "1"}),
    ("E3NN_ACCEL_REPORT", "a b/report.json", {"report": "a b/report.json"}),
    ("E3NN_ACCEL_PROFILE", "1", {"profile": True}),
    ("E3NN_ACCEL_PROFILE", "no", {"profile": False}),
    ("E3NN_ACCEL_SKIP", "Linear", {"skip": ("Linear",)}),
    ("E3NN_ACCEL_SKIP", " Linear , products.* ,", {"skip": ("Linear", "products.*")}),
    ("E3NN_ACCEL_ONLY", "TensorProduct", {"only": ("TensorProduct",)}),
    ("E3NN_ACCEL_PLUGINS", "-torch", {"blocked_plugins": ("torch",)}),
    ("E3NN_ACCEL_PLUGINS", "-a, -b-c", {"blocked_plugins": ("a", "b-c")}),
    ("E3NN_ACCEL_SELF_CHECK", "0", {"self_check": False}),
    ("E3NN_ACCEL_DETERMINISTIC", "0", {"deterministic": False}),
    ("E3NN_ACCEL_SELF_CHECK", "1", {"self_check": True}),
    ("E3NN_ACCEL_GRAPH", "auto", {"graph": "auto"}),
    ("E3NN_ACCEL_GRAPH", "AUTO", {"graph": "auto"}),
    ("E3NN_ACCEL_GRAPH", "0", {"graph": "0"}),
    ("E3NN_ACCEL_GRAPH", "1", {"graph": "1"}),
    ("E3NN_ACCEL_NEIGHBOURS", "AUTO", {"neighbours": "auto"}),
    ("E3NN_ACCEL_NEIGHBOURS", "0", {"neighbours": "0"}),
    ("E3NN_ACCEL_NEIGHBOURS", "1", {"neighbours": "1"}),
    ("E3NN_ACCEL_CACHE_DIR", "/a b/cache", {"cache_dir": "/a b/cache"}),
    ("E3NN_ACCEL_DUMP", "here", {"dump": "here"}),
    ("E3NN_ACCEL_PRECISION", "tf32", {"precision": "tf32"}),
    ("E3NN_ACCEL_PRECISION", "BF16", {"precision": "bf16"}),
    ("E3NN_ACCEL_PRECISION", "float32", {"precision": "float32"}),
    ("E3NN_ACCEL_CACHE_DIR", "~/a b", {"cache_dir": "~/a b"}),
    ("E3NN_ACCEL_DUMP", "dump", {"dump": "dump"}),
]

MISUNDERSTOOD = [
    ("E3NN_ACCEL", "maybe"),
    ("E3NN_ACCEL", "2"),
    ("E3NN_ACCEL_LOG", "LOUD"),
    ("E3NN_ACCEL_PROFILE", "report.json"),
    ("E3NN_ACCEL_PLUGINS", "torch"),
    ("E3NN_ACCEL_PLUGINS", "-torch,cuda"),
    ("E3NN_ACCEL_SELF_CHECK", "first"),
    ("E3NN_ACCEL_PRECISION", "fp8"),
    ("E3NN_ACCEL_GRAPH", "2"),
]


@pytest.mark.parametrize(("name", "text", "fields"), PARSED)
def test_values(name: str, text: str, fields: dict[str, Any]) -> None:
    """Each variable sets its fields and no others."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Config.from_env({name: text})
    assert found == dataclasses.replace(Config(), **fields)
    assert set(fields) <= found.sources.keys()
    assert set(found.sources.values()) == {name}


def test_every_variable_is_tested() -> None:
    """The cases above reach every row of the table."""
    assert {name for name, _, _ in PARSED} == {row.name for row in VARIABLES}


@pytest.mark.parametrize("environ", [{}, {"E3NN_ACCEL": ""}, {"PATH": "x", "E3NN": "1"}])
def test_unset_is_the_default(environ: dict[str, str]) -> None:
    """Nothing set, or set to nothing, is the default Config, which is off."""
    found = Config.from_env(environ)
    assert found == Config()
    assert not found.enabled
    assert found.sources == {}


@pytest.mark.parametrize(("name", "text"), MISUNDERSTOOD)
def test_values_that_mean_nothing_warn(name: str, text: str) -> None:
    """The warning names variable, value, what could be said, and the default that is taken."""
    row = next(row for row in VARIABLES if row.name == name)
    with pytest.warns(E3nnAccelWarning) as caught:
        found = Config.from_env({name: text})
    assert found == Config()
    assert len(caught) == 1
    message = str(caught[0].message)
    assert f"{name}={text}" in message
    assert row.values in message
    assert message.endswith(f"using {row.default}")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("E3NN_ACCEL_BACKND", "; did you mean 'E3NN_ACCEL_BACKEND'?"),
        ("E3NN_ACCEL_REPORTS", "; did you mean 'E3NN_ACCEL_REPORT'?"),
        ("E3NN_ACCELL", "; did you mean 'E3NN_ACCEL'?"),
        ("E3NN_ACCEL_QQQQQQQQQQQQQQQQQQQQQQQQQQQQQ", ""),
    ],
)
def test_unknown_variables_warn(name: str, nearest: str) -> None:
    """With the nearest name where there is one; nothing is set."""
    with pytest.warns(E3nnAccelWarning) as caught:
        assert Config.from_env({name: "1"}) == Config()
    assert [str(warning.message) for warning in caught] == [f"unknown variable {name}{nearest}"]


def test_options_overrule_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `enable` and `accelerate` are told wins over the environment; the rest stays."""
    import e3nn_accel
    from e3nn_accel import switch

    for name, text in {"BACKEND": "mine", "SKIP": "Linear", "PROFILE": "1"}.items():
        monkeypatch.setenv(f"E3NN_ACCEL_{name}", text)
    monkeypatch.setenv("E3NN_ACCEL", "0")
    e3nn_accel.enable(backend="torch", skip=())
    found = switch.active.config
    assert found is not None
    assert (found.backend, found.skip, found.profile, found.enabled) == ("torch", (), True, True)


def test_variables_are_read_when_enabling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at import: a program may set them first."""
    import e3nn_accel
    from e3nn_accel import switch

    monkeypatch.setenv("E3NN_ACCEL", "strict")
    e3nn_accel.enable()
    assert switch.active.config is not None
    assert switch.active.config.strict
    monkeypatch.delenv("E3NN_ACCEL")
    e3nn_accel.enable()
    assert not switch.active.config.strict


def test_unknown_options() -> None:
    """An option that doesn't exist is a TypeError that names the nearest."""
    with pytest.raises(TypeError, match="no option 'bakend'; did you mean 'backend'"):
        Config().replace(bakend="torch")
    with pytest.raises(TypeError, match=r"no option 'zzzzzz'$"):
        Config().replace(zzzzzz=1)
    with pytest.raises(ValueError, match=r"log must be one of .*DEBUG.*, got 'LOUD'"):
        Config().replace(log="LOUD")


@pytest.mark.parametrize("field", ["skip", "only", "blocked_plugins"])
@pytest.mark.parametrize("given", [["Linear"], ("Linear",), "Linear"])
def test_options_that_are_lists(field: str, given: object) -> None:
    """Lists, tuples and a single string mean the same, and stay hashable."""
    found = Config().replace(**{field: given})
    assert found == dataclasses.replace(Config(), **{field: ("Linear",)})
    assert hash(found) == hash(dataclasses.replace(Config(), **{field: ("Linear",)}))


def test_the_table_matches_the_readers() -> None:
    """Every variable of the table is read, every reader is in the table, every field can be set."""
    rows = [row.name for row in VARIABLES]
    assert len(rows) == len(set(rows))
    assert {variable for variable, _ in config._READERS.values()} == set(rows)
    fields = {field.name for field in dataclasses.fields(Config)} - {"sources"}
    assert config._READERS.keys() == fields


@pytest.mark.parametrize("row", VARIABLES, ids=lambda row: row.name)
def test_the_tables_defaults_are_the_defaults(row: config.Variable) -> None:
    """The documented default is what leaving the variable out gives; unset is spelt so."""
    if row.default != "unset":
        assert Config.from_env({row.name: row.default}) == Config()
    assert row.meaning
    assert row.values


@pytest.mark.parametrize(
    "row", [r for r in VARIABLES if r.default != "unset"], ids=lambda row: row.name
)
def test_the_tables_values_are_understood(row: config.Variable) -> None:
    """Each literal value that the table documents is accepted without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in row.values.split(", "):
            Config.from_env({row.name: value})


def test_config_is_frozen_and_hashable() -> None:
    """It is part of the key of every plan."""
    first, second = Config.from_env({"E3NN_ACCEL": "1"}), Config(enabled=True)
    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.strict = True  # type: ignore[misc]
