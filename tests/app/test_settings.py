import os
import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import SecretStr

from app.settings import RateLimit, Settings, SettingsError, load_settings, unknown_variables
from model.spec import SHIPPED, SHIPPED_CIFAR10, SHIPPED_FAST, SHIPPED_LETTERS, SHIPPED_MODELS


@pytest.fixture(autouse=True)
def no_unfog_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("UNFOG_"):
            monkeypatch.delenv(name)


DEFAULTS = {
    "UNFOG_CHECKPOINT": ("checkpoint", SHIPPED),
    "UNFOG_FAST_CHECKPOINT": ("fast_checkpoint", "auto"),
    "UNFOG_DEVICE": ("device", "auto"),
    "UNFOG_DTYPE": ("dtype", "auto"),
    "UNFOG_COMPILE": ("compile", "auto"),
    "UNFOG_REPRODUCIBLE": ("reproducible", "off"),
    "UNFOG_CLIP": ("clip", "auto"),
    "UNFOG_NUM_THREADS": ("num_threads", None),
    "UNFOG_MAX_BATCH": ("max_batch", None),  # auto
    "UNFOG_QUEUE_CAPACITY": ("queue_capacity", 1024),
    "UNFOG_MAX_COUNT": ("max_count", 64),
    "UNFOG_MAX_BODY_BYTES": ("max_body_bytes", 2**14),
    "UNFOG_MAX_IMAGE_BYTES": ("max_image_bytes", 2**22),
    "UNFOG_REQUEST_TIMEOUT": ("request_timeout", None),
    "UNFOG_DRAIN_TIMEOUT": ("drain_timeout", 25.0),
    "UNFOG_WATCHDOG_SECONDS": ("watchdog_seconds", 10.0),
    "UNFOG_GIVE_UP_SECONDS": ("give_up_seconds", 30.0),
    "UNFOG_READ_TIMEOUT": ("read_timeout", 10.0),
    "UNFOG_WRITE_TIMEOUT": ("write_timeout", 30.0),
    "UNFOG_API_KEYS": ("api_keys", ()),  # auth is off
    "UNFOG_RATE_LIMIT": ("rate_limit", ()),  # off
    "UNFOG_RATE_LIMIT_URL": ("rate_limit_url", None),  # each process counts alone
    "UNFOG_CORS_ORIGINS": ("cors_origins", ()),
    "UNFOG_TRUSTED_PROXIES": ("trusted_proxies", ()),
    "UNFOG_DATABASE_URL": ("database_url", None),  # SQLite
    "UNFOG_MAX_FILES": ("max_files", 1000),
    "UNFOG_MAX_FILE_BYTES": ("max_file_bytes", 200 * 2**20),
    "UNFOG_MAX_STORED_BYTES": ("max_stored_bytes", 10 * 2**30),
    "UNFOG_MAX_LINES": ("max_lines", 50_000),
    "UNFOG_FILE_DAYS": ("file_days", 30),
    "UNFOG_WEBHOOK_HOSTS": ("webhook_hosts", ()),
    "UNFOG_WEBHOOK_SECRET": ("webhook_secret", None),
    "UNFOG_WEBHOOK_PRIVATE": ("webhook_private", "off"),
    "UNFOG_DOCS": ("docs", "on"),
    "UNFOG_PAGE": ("page", "on"),
    "UNFOG_TRACES": ("traces", "off"),
    "UNFOG_LOG_FORMAT": ("log_format", "auto"),
    "UNFOG_LOG_LEVEL": ("log_level", "info"),
    "UNFOG_HOST": ("host", "127.0.0.1"),
    "UNFOG_PORT": ("port", 8000),
}


@pytest.mark.parametrize("variable", DEFAULTS)
def test_each_setting_has_its_default(variable: str) -> None:
    field, default = DEFAULTS[variable]
    assert getattr(load_settings(), field) == default


@pytest.mark.parametrize("variable", sorted(set(DEFAULTS) - {"UNFOG_API_KEYS"}))
def test_empty_variable_means_the_default(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "")
    field, default = DEFAULTS[variable]
    assert getattr(load_settings(), field) == default


def test_defaults_table_contains_every_setting() -> None:
    assert {field for field, _ in DEFAULTS.values()} | {"cache_dir", "data_dir", "models", "null_labels"} == set(
        Settings.model_fields
    )


@pytest.mark.parametrize("field", Settings.model_fields)
def test_description_states_the_default(field: str) -> None:
    info = Settings.model_fields[field]
    stated = re.search(r"\(default: ([^)]+)\)$", info.description or "")
    assert stated
    if type(info.default) in (str, int, float):
        assert stated[1] == (f"{info.default:g}" if isinstance(info.default, float) else str(info.default))


def test_default_data_folder_follows_the_xdg_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert load_settings().data_dir == tmp_path / ".local" / "share" / "unfog"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "elsewhere"))
    assert load_settings().data_dir == tmp_path / "elsewhere" / "unfog"


def test_hosts_of_webhooks_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFOG_WEBHOOK_HOSTS", "Example.com, *.example.org,[::1]:8443,10.0.0.1:80")
    assert load_settings().webhook_hosts == ("example.com", "*.example.org", "[::1]:8443", "10.0.0.1:80")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("UNFOG_WEBHOOK_SECRET", "whsec_c2hvcnQ="),
        ("UNFOG_WEBHOOK_SECRET", "hunter2-hunter2-hunter2-hunter2"),
        ("UNFOG_WEBHOOK_SECRET", "whsec_not*base64*hunter2"),
        ("UNFOG_DATABASE_URL", "mysql://user:hunter2@host/name"),
        ("UNFOG_DATABASE_URL", "user:hunter2@host"),
        ("UNFOG_RATE_LIMIT_URL", "redis://:hunter2@host:port"),
        ("UNFOG_RATE_LIMIT_URL", "memcached://:hunter2@host"),
    ],
)
def test_error_about_a_secret_setting_does_not_show_it(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=variable) as raised:
        load_settings()
    assert value not in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_url_of_redis_without_the_extra_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UNFOG_RATE_LIMIT_URL", "redis://:password@host:6379/1")
    url = load_settings().rate_limit_url
    assert url and url.get_secret_value() == "redis://:password@host:6379/1"
    monkeypatch.setattr("app.settings.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"UNFOG_RATE_LIMIT_URL is invalid: needs the extra `redis`"):
        load_settings()


def test_default_cache_folder_follows_the_xdg_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert load_settings().cache_dir == tmp_path / ".cache" / "unfog"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert load_settings().cache_dir == tmp_path / "elsewhere" / "unfog"
    monkeypatch.setenv("UNFOG_CACHE_DIR", "/opt/unfog")
    assert load_settings().cache_dir == Path("/opt/unfog")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("UNFOG_CHECKPOINT", "/tmp/a b.safetensors", Path("/tmp/a b.safetensors")),
        ("UNFOG_FAST_CHECKPOINT", "/tmp/a b.safetensors", Path("/tmp/a b.safetensors")),
        ("UNFOG_FAST_CHECKPOINT", "none", "none"),
        ("UNFOG_DEVICE", "cpu", "cpu"),
        ("UNFOG_DEVICE", "cuda", "cuda"),
        ("UNFOG_DEVICE", "cuda:1", "cuda:1"),
        ("UNFOG_DTYPE", "bfloat16", "bfloat16"),
        ("UNFOG_DTYPE", "float16", "float16"),
        ("UNFOG_COMPILE", "off", "off"),
        ("UNFOG_REPRODUCIBLE", "on", "on"),
        ("UNFOG_CLIP", "off", "off"),
        ("UNFOG_CLIP", "ViT-B-32:openai", "ViT-B-32:openai"),
        ("UNFOG_NUM_THREADS", "3", 3),
        ("UNFOG_MAX_BATCH", "auto", None),
        ("UNFOG_MAX_BATCH", "1", 1),
        ("UNFOG_QUEUE_CAPACITY", "1", 1),
        ("UNFOG_MAX_COUNT", "128", 128),
        ("UNFOG_MAX_BODY_BYTES", "100", 100),
        ("UNFOG_MAX_IMAGE_BYTES", "100", 100),
        ("UNFOG_REQUEST_TIMEOUT", "0.5", 0.5),
        ("UNFOG_DRAIN_TIMEOUT", "0", 0.0),
        ("UNFOG_WATCHDOG_SECONDS", "2", 2.0),
        ("UNFOG_GIVE_UP_SECONDS", "2.5", 2.5),
        ("UNFOG_GIVE_UP_SECONDS", "never", None),
        ("UNFOG_READ_TIMEOUT", "0.5", 0.5),
        ("UNFOG_WRITE_TIMEOUT", "5", 5.0),
        ("UNFOG_API_KEYS", "one", (SecretStr("one"),)),
        ("UNFOG_API_KEYS", " off , a=b+c/d== ", (SecretStr("off"), SecretStr("a=b+c/d=="))),
        ("UNFOG_RATE_LIMIT", "off", ()),
        ("UNFOG_RATE_LIMIT", "600/minute", (RateLimit(600, 60),)),
        ("UNFOG_RATE_LIMIT", "1 per second; 30/2 hours", (RateLimit(1, 1), RateLimit(30, 7200))),
        ("UNFOG_CORS_ORIGINS", "*", ("*",)),
        (
            "UNFOG_CORS_ORIGINS",
            "https://A.example, http://localhost:3000,http://[::1]:80",
            ("https://a.example", "http://localhost:3000", "http://[::1]:80"),
        ),
        ("UNFOG_TRUSTED_PROXIES", "10.0.0.0/8, ::1", ("10.0.0.0/8", "::1")),
        ("UNFOG_TRUSTED_PROXIES", "*", ("*",)),
        ("UNFOG_DOCS", "off", "off"),
        ("UNFOG_PAGE", "off", "off"),
        ("UNFOG_TRACES", "on", "on"),
        ("UNFOG_LOG_FORMAT", "json", "json"),
        ("UNFOG_LOG_LEVEL", "debug", "debug"),
        ("UNFOG_HOST", "::1", "::1"),
        ("UNFOG_PORT", "0", 0),
    ],
)
def test_valid_value_is_read_from_a_variable_and_from_a_flag(
    variable: str, value: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = DEFAULTS[variable][0]
    assert getattr(load_settings({field: value}), field) == expected
    monkeypatch.setenv(variable, value)
    assert getattr(load_settings(), field) == expected


@pytest.mark.parametrize(
    ("checkpoint", "fast", "served"),
    [
        (SHIPPED, "auto", SHIPPED_FAST),
        (Path(os.path.relpath(SHIPPED)), "auto", SHIPPED_FAST),
        (Path("own.safetensors"), "auto", None),
        (SHIPPED, "none", None),
        (SHIPPED, Path("own.safetensors"), Path("own.safetensors")),
        (Path("own.safetensors"), SHIPPED_FAST, SHIPPED_FAST),
    ],
)
def test_auto_serves_the_shipped_fast_checkpoint_only_with_the_shipped_one(
    checkpoint: Path, fast: Path | Literal["auto", "none"], served: Path | None
) -> None:
    paths = Settings(checkpoint=checkpoint, fast_checkpoint=fast).model_paths
    assert paths == {"default": checkpoint} | ({"fast": served} if served else {})


def test_models_are_served_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFOG_MODELS", "cars=/a/cars.safetensors, default=b=c.safetensors")
    paths = load_settings().model_paths
    assert list(paths.items()) == [("cars", Path("/a/cars.safetensors")), ("default", Path("b=c.safetensors"))]
    assert load_settings({"models": "x=y"}).model_paths == {"x": Path("y")}


@pytest.mark.parametrize("field", ["checkpoint", "fast_checkpoint"])
def test_models_and_a_checkpoint_of_the_same_source_are_refused(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SettingsError, match=f"^--models and --{field.replace('_', '-')} are both set. Set one of them$"
    ):
        load_settings({"models": "a=b", field: "c.safetensors"})
    monkeypatch.setenv("UNFOG_MODELS", "a=b")
    monkeypatch.setenv(f"UNFOG_{field.upper()}", "c.safetensors")
    with pytest.raises(SettingsError, match=f"^UNFOG_MODELS and UNFOG_{field.upper()} are both set. Set one of them$"):
        load_settings()


def test_flag_overrides_the_variables_of_the_other_way_to_name_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFOG_MODELS", "a=b")
    assert load_settings({"checkpoint": "c.safetensors"}).model_paths == {"default": Path("c.safetensors")}
    monkeypatch.delenv("UNFOG_MODELS")
    monkeypatch.setenv("UNFOG_CHECKPOINT", "c.safetensors")
    assert load_settings({"models": "a= b"}).model_paths == {"a": Path("b")}


INVALID = {
    "UNFOG_MODELS": [
        ",",
        "a",
        "a=",
        "=b",
        "a=b,",
        "a=b,a=c",
        "a b=c",
        ".a=b",
        "a/b=c",
        "a" * 65 + "=b",
        "\N{LATIN SMALL LETTER E WITH ACUTE}=b",
    ],
    "UNFOG_DEVICE": ["tpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:1", "CPU", "cuda:1:2", ":"],
    "UNFOG_DTYPE": ["fp16", "fp32"],
    "UNFOG_COMPILE": ["yes", "1"],
    "UNFOG_REPRODUCIBLE": ["auto", "1"],
    "UNFOG_NUM_THREADS": ["0", "-1", "1.5", "many", "100000"],
    "UNFOG_MAX_BATCH": ["0", "-4", "2.5", "big", "4097", "AUTO"],
    "UNFOG_QUEUE_CAPACITY": ["0", "-1", "x", "1e3"],
    "UNFOG_MAX_COUNT": ["0", "x"],
    "UNFOG_MAX_BODY_BYTES": ["0", "1MiB"],
    "UNFOG_MAX_IMAGE_BYTES": ["0", "4MiB"],
    "UNFOG_REQUEST_TIMEOUT": ["0", "-1", "nan", "inf", "30s"],
    "UNFOG_DRAIN_TIMEOUT": ["-1", "nan", "inf", "x"],
    "UNFOG_WATCHDOG_SECONDS": ["0", "nan", "inf", "x"],
    "UNFOG_GIVE_UP_SECONDS": ["0", "nan", "inf", "Never"],
    "UNFOG_READ_TIMEOUT": ["0", "nan", "never"],
    "UNFOG_WRITE_TIMEOUT": ["0", "inf", "x"],
    "UNFOG_API_KEYS": [",", " ", "one,", "one,,two", "one two", "schlüssel", "one\ntwo"],
    "UNFOG_RATE_LIMIT": ["0/minute", "600", "fast", "600/fortnight", "-1/second", "5/second\nx"],
    "UNFOG_RATE_LIMIT_URL": ["host:6379", "http://host", "redis://", "redis://host:0", "redis://host:99999"],
    "UNFOG_CORS_ORIGINS": [
        ",",
        "example.com",
        "https://a.b/",
        "https://a.b/c",
        "null",
        "ftp://a.b",
        "http://a:x",
        "https://u@a.b",
    ],
    "UNFOG_TRUSTED_PROXIES": [",", "proxy", "10.0.0.1/8", "10.0.0.0/33", "*,10.0.0.0/8", "10.0.0.0/8, *", "*,*"],
    "UNFOG_DATABASE_URL": ["mysql://user@host/name", "host/name", "sqlite:///file"],
    "UNFOG_MAX_FILES": ["0", "many"],
    "UNFOG_MAX_FILE_BYTES": ["0", "200MiB"],
    "UNFOG_MAX_STORED_BYTES": ["0", "-1"],
    "UNFOG_MAX_LINES": ["0", "1e5"],
    "UNFOG_FILE_DAYS": ["0", "0.5", "3651"],
    "UNFOG_WEBHOOK_HOSTS": ["https://example.com", "example.com/path", "*", "*.*.example.com", "a b", "x,,y"],
    "UNFOG_WEBHOOK_SECRET": ["whsec_", "whsec_c2hvcnQ=", "secret", "whsec_not*base64"],
    "UNFOG_WEBHOOK_PRIVATE": ["yes"],
    "UNFOG_DOCS": ["yes"],
    "UNFOG_PAGE": ["yes"],
    "UNFOG_TRACES": ["otlp"],
    "UNFOG_LOG_FORMAT": ["xml"],
    "UNFOG_LOG_LEVEL": ["loud", "7"],
    "UNFOG_PORT": ["-1", "65536", "http", "80.5", "8000\nx"],
}


@pytest.mark.parametrize(("variable", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_error_about_an_invalid_value_is_one_line_that_starts_with_the_variable(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as error:
        load_settings()
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(variable)
    assert "Error" not in message  # the name of a Python exception


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("*,10.0.0.0/8", r"\* trusts every address and cannot be combined"),
        ("10.0.0.1/8", r"'10\.0\.0\.1/8' has address bits .* Use 10\.0\.0\.1 or 10\.0\.0\.0/8"),
        ("2001:db8::1/32", r"Use 2001:db8::1 or 2001:db8::/32"),
        ("10.0.0.0/33", r"'10\.0\.0\.0/33' is not an IP address or a network"),
    ],
)
def test_error_about_an_invalid_proxy_list_says_what_to_use(
    value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNFOG_TRUSTED_PROXIES", value)
    with pytest.raises(SettingsError, match=reason):
        load_settings()


def test_invalid_values_cover_every_variable_that_is_validated() -> None:
    assert set(DEFAULTS) - set(INVALID) == {
        "UNFOG_CHECKPOINT",
        "UNFOG_FAST_CHECKPOINT",
        "UNFOG_CLIP",
        "UNFOG_HOST",
    }  # any text can be a path, a host name or the name of a CLIP model


def test_api_key_is_not_part_of_errors_or_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFOG_API_KEYS", "hunter2,")
    with pytest.raises(SettingsError, match="UNFOG_API_KEYS") as error:
        load_settings()
    assert "hunter2" not in str(error.value)
    monkeypatch.setenv("UNFOG_API_KEYS", "hunter2")
    assert "hunter2" not in repr(load_settings())


def test_empty_api_keys_stop_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNFOG_API_KEYS", "")
    with pytest.raises(SettingsError, match="UNFOG_API_KEYS is empty"):
        load_settings()
    monkeypatch.delenv("UNFOG_API_KEYS")
    (tmp_path / "unfog_api_keys").write_text("\n")
    monkeypatch.setitem(Settings.model_config, "secrets_dir", tmp_path)
    with pytest.raises(SettingsError, match="unfog_api_keys is empty"):
        load_settings()


def test_variable_overrides_the_secret_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "unfog_api_keys").write_text("key-of-the-file\n")
    monkeypatch.setitem(Settings.model_config, "secrets_dir", tmp_path)
    assert load_settings().api_keys == (SecretStr("key-of-the-file"),)
    monkeypatch.setenv("UNFOG_API_KEYS", "key-of-the-variable")
    assert load_settings().api_keys == (SecretStr("key-of-the-variable"),)


@pytest.mark.parametrize("name", ["unfog_api_key", "UNFOG_KEYS"])
def test_secret_file_not_named_after_a_setting_stops_the_start(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("a-key")
    (tmp_path / "secret_of_another_program").mkdir()
    monkeypatch.setitem(Settings.model_config, "secrets_dir", tmp_path)
    with pytest.raises(SettingsError, match=f"{name} is not named after a setting"):
        load_settings()


def test_unreadable_secret_file_stops_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Docker creates a folder if the file to mount is missing. Ignoring it would turn auth off without an error."""
    secret = tmp_path / "unfog_api_keys"
    secret.mkdir()
    monkeypatch.setitem(Settings.model_config, "secrets_dir", tmp_path)
    with pytest.raises(SettingsError, match="unfog_api_keys cannot be read: Is a directory"):
        load_settings()
    secret.rmdir()
    secret.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="unfog_api_keys cannot be read: not valid UTF-8"):
        load_settings()


def test_secret_file_that_links_outside_its_folder_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "elsewhere").write_text("a-key")
    (tmp_path / "secrets" / "unfog_api_keys").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setitem(Settings.model_config, "secrets_dir", tmp_path / "secrets")
    with pytest.raises(SettingsError, match="unfog_api_keys is a link to a file outside"):
        load_settings()


def test_secret_file_that_links_within_its_folder_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kubernetes mounts secrets as links of this kind."""
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "unfog_api_keys").write_text("a-key")
    (tmp_path / "unfog_api_keys").symlink_to(Path("..data") / "unfog_api_keys")
    monkeypatch.setitem(Settings.model_config, "secrets_dir", tmp_path)
    assert load_settings().api_keys == (SecretStr("a-key"),)


def test_unknown_variables_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("UNFOG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("UNFOG_PORT", "9000")
    monkeypatch.setenv("UNFOG_CHEKPOINT", "mine.safetensors")
    assert unknown_variables() == ["UNFOG_CHEKPOINT"]


def test_settings_do_not_change_after_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings()
    monkeypatch.setenv("UNFOG_PORT", "9000")
    assert settings.port == 8000
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 9000


def test_flag_overrides_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFOG_MAX_BATCH", "4")
    monkeypatch.setenv("UNFOG_PORT", "9000")
    settings = load_settings({"max_batch": "8"})
    assert (settings.max_batch, settings.port) == (8, 9000)


def test_error_about_an_invalid_flag_names_the_flag() -> None:
    with pytest.raises(SettingsError, match=r"^--max-batch='0' is invalid: .*, or auto$"):
        load_settings({"max_batch": "0"})


def test_error_about_an_invalid_api_key_does_not_contain_it() -> None:
    with pytest.raises(SettingsError) as error:
        load_settings({"api_keys": "hunter2 hunter3"})
    assert "hunter" not in str(error.value)


def test_models_are_paths_or_the_names_of_shipped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNFOG_MODELS", "letters, cars=/models/cars.safetensors,default")
    assert list(load_settings().model_paths.items()) == [
        ("letters", SHIPPED_LETTERS),
        ("cars", Path("/models/cars.safetensors")),
        ("default", SHIPPED),
    ]


def test_every_shipped_model_is_a_file() -> None:
    assert all(path.is_file() for path in SHIPPED_MODELS.values())
    assert {
        "default": SHIPPED,
        "fast": SHIPPED_FAST,
        "letters": SHIPPED_LETTERS,
        "cifar10": SHIPPED_CIFAR10,
    } == SHIPPED_MODELS


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            "cars",
            "'cars' is not a shipped model (default, fast, letters, cifar10). Use the form NAME=PATH for another one",
        ),
        ("cars=", "'cars=' has no path"),
        ("two words=x.safetensors", "'two words' is not a name of 1 to 64 letters"),
        ("fast,fast=x.safetensors", "two models have the name 'fast'"),
    ],
)
def test_invalid_models_give_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch, value: str, reason: str) -> None:
    monkeypatch.setenv("UNFOG_MODELS", value)
    with pytest.raises(SettingsError, match=re.escape(reason)):
        load_settings()
