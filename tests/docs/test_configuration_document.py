import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from app.api.middleware.rate_limit import MAX_CALLERS
from app.settings import Settings, SettingsError, flag_of, load_settings
from model.spec import SHIPPED
from tests.docs.document import Document, Row, codes, tables_in
from tests.docs.markdown import ROOT

CONFIGURATION = Document("configuration.md")
COLUMNS = ["Variable", "Flag", "Default", "Allowed values", "Meaning"]
ROWS = {
    row["Variable"].strip("`"): row for table in tables_in(CONFIGURATION.text) for row in table if [*row] == COLUMNS
}
NUMBERS = {
    field
    for field, info in Settings.model_fields.items()
    if re.search(r"\b(int|float)\b", str(info.annotation)) and not str(info.annotation).startswith("dict")
}
RANGE = re.compile(r"(\d+) to (\d+)|(\d+) or more|more than (\d+)")
WORDS_OF_VALIDATORS = {"device": {"auto", "cpu", "cuda"}, "max_batch": {"auto"}, "give_up_seconds": {"never"}}
FLAGS_WITHOUT_SETTING = {"--help", "--openapi", "--compile", "--model"}
INSTALLATION_VARIABLES = {"UNFOG_TORCH_INDEX"}


@pytest.fixture(autouse=True)
def without_unfog_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("UNFOG_")]:
        monkeypatch.delenv(name)


def field_of(variable: str) -> str:
    return variable.removeprefix("UNFOG_").lower()


def test_every_setting_has_exactly_one_row() -> None:
    assert sorted(map(field_of, ROWS)) == sorted(Settings.model_fields)
    assert len(re.findall(r"^\| `UNFOG_\w+` \| `--", CONFIGURATION.text, re.MULTILINE)) == len(ROWS)


@pytest.mark.parametrize(("variable", "row"), ROWS.items(), ids=ROWS)
def test_documented_flag_sets_the_same_setting_as_the_variable(variable: str, row: Row) -> None:
    assert row["Flag"] == f"`{flag_of(field_of(variable))}`"


@pytest.mark.parametrize(("variable", "row"), ROWS.items(), ids=ROWS)
def test_documented_default_equals_that_of_the_setting(
    variable: str, row: Row, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    field, default = field_of(variable), row["Default"]
    if field == "checkpoint":
        assert ROOT / default.strip("`") == SHIPPED
    elif field == "cache_dir":
        assert default == "`unfog` in `$XDG_CACHE_HOME` or in `~/.cache`"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert load_settings().cache_dir == tmp_path / "unfog"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert load_settings().cache_dir == tmp_path / ".cache" / "unfog"
    elif field == "data_dir":
        assert default == "`unfog` in `$XDG_DATA_HOME` or in `~/.local/share`"
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        assert load_settings().data_dir == tmp_path / "unfog"
        monkeypatch.delenv("XDG_DATA_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert load_settings().data_dir == tmp_path / ".local" / "share" / "unfog"
    elif codes(default):
        assert getattr(load_settings({field: default.strip("`")}), field) == getattr(load_settings(), field)
    else:  # the cell says in words that there is no default value
        assert not getattr(load_settings(), field)


@pytest.mark.parametrize(("variable", "row"), ROWS.items(), ids=ROWS)
def test_documented_words_are_accepted_and_complete(variable: str, row: Row) -> None:
    field = field_of(variable)
    words = [word for word in codes(row["Allowed values"]) if re.fullmatch("[a-z0-9]+", word)]
    for word in words:
        load_settings({field: word})
    literals = {word for word in _literals(Settings.model_fields[field].annotation) if isinstance(word, str)}
    assert literals | WORDS_OF_VALIDATORS.get(field, set()) <= set(words)


def _literals(annotation: Any) -> set[Any]:
    """Returns the values of all Literal types within a type."""
    arguments = get_args(annotation)
    return {value for part in arguments for value in (_literals(part) if get_args(part) else {part})}


@pytest.mark.parametrize("field", sorted(NUMBERS))
def test_documented_range_equals_that_of_the_setting(field: str) -> None:
    allowed = ROWS[f"UNFOG_{field.upper()}"]["Allowed values"]
    found = RANGE.search(allowed)
    assert found, allowed
    lowest, highest, or_more, more_than = found.groups()
    accepted = [lowest, highest, or_more, more_than and "0.5"]
    rejected = [
        lowest and int(lowest) - 1,
        highest and int(highest) + 1,
        or_more and int(or_more) - 1,
        more_than,
    ]
    for value in filter(None, accepted):
        load_settings({field: value})
    for value in (str(value) for value in rejected if value is not None):
        with pytest.raises(SettingsError):
            load_settings({field: value})


def test_every_documented_variable_exists() -> None:
    named = set(re.findall(r"UNFOG_[A-Z_]+", CONFIGURATION.text))
    assert named - INSTALLATION_VARIABLES <= set(ROWS)


def test_every_documented_flag_exists() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", CONFIGURATION.text))
    assert named <= set(map(flag_of, Settings.model_fields)) | FLAGS_WITHOUT_SETTING


def test_examples_in_code_blocks_are_accepted() -> None:
    examples = "".join(example.text for example in CONFIGURATION.examples("bash"))
    variables = re.findall(r"UNFOG_(\w+)=(?:'([^']+)'|(\S+))", examples)
    flags = re.findall(r"--([a-z-]+) (\S+)", examples)
    given = [(name.lower(), quoted or plain) for name, quoted, plain in variables]
    given += [(name.replace("-", "_"), value) for name, value in flags]
    assert {name for name, _ in given} >= {"max_batch", "rate_limit", "trusted_proxies", "port", "traces"}
    for name, value in given:
        load_settings({name: value})


@pytest.mark.parametrize(
    ("field", "heading"),
    [("rate_limit", "Rate limit"), ("cors_origins", "HTTP and security"), ("trusted_proxies", "HTTP and security")],
)
def test_example_values_are_accepted(field: str, heading: str) -> None:
    text = CONFIGURATION.section(heading)
    examples = codes(
        text.split("The units are")[0] if field == "rate_limit" else ROWS[f"UNFOG_{field.upper()}"]["Meaning"]
    )
    values = [example for example in examples if re.search(r"/|\*| per ", example)]
    assert values
    for value in values:
        load_settings({field: value})


@pytest.mark.parametrize("separator", [",", ";", "|"])
def test_documented_separators_of_rate_limits_are_accepted(separator: str) -> None:
    assert separator in codes(CONFIGURATION.section("Rate limit"))
    assert len(load_settings({"rate_limit": f"10/second{separator}600/minute"}).rate_limit) == 2


@pytest.mark.parametrize("unit", ["second", "minute", "hour", "day", "month", "year"])
def test_documented_units_of_rate_limits_are_accepted(unit: str) -> None:
    assert unit in codes(CONFIGURATION.section("Rate limit"))
    load_settings({"rate_limit": f"10/{unit}"})
    load_settings({"rate_limit": f"10/2 {unit}s"})


def test_number_of_remembered_callers_is_that_of_the_rate_limiter() -> None:
    assert f"remembers {MAX_CALLERS:,} callers" in CONFIGURATION.section("Rate limit")


def test_proxy_network_with_host_bits_or_star_among_others_is_rejected() -> None:
    for value in ("10.0.0.1/8", "*,10.0.0.0/8"):
        with pytest.raises(SettingsError):
            load_settings({"trusted_proxies": value})


def test_api_keys_off_sets_the_key_off() -> None:
    (key,) = load_settings({"api_keys": "off"}).api_keys
    assert key.get_secret_value() == "off"


def test_sources_of_settings_have_the_documented_priority(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "UNFOG_MAX_COUNT").write_text(" 1\n")
    monkeypatch.setitem(Settings.model_config, "secrets_dir", tmp_path)
    assert load_settings().max_count == 1
    monkeypatch.setenv("unfog_max_count", "2")
    assert load_settings().max_count == 2
    monkeypatch.setenv("UNFOG_MAX_COUNT", "")
    monkeypatch.delenv("unfog_max_count")
    assert load_settings().max_count == 1
    assert load_settings({"max_count": "3"}).max_count == 3


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["--max-batch", ""], {}),
        (["--no-such-flag", "1"], {}),
        ([], {"UNFOG_API_KEYS": ""}),
    ],
)
def test_invalid_setting_exits_with_status_2_and_one_line(arguments: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    name = next(iter(variables), arguments[0] if arguments else "")
    assert name in done.stderr
