"""Settings, read once from UNFOG_* variables at the edge and handed down."""

import os
from pathlib import Path
from typing import Annotated, Literal

from limits import RateLimitItem
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app import settings_values as config_values
from app.engine.job import DEFAULT_MODEL, FAST_MODEL
from model.checkpoint import SHIPPED, SHIPPED_FAST
from model.compiled.compiler import default_cache

PREFIX = "UNFOG_"
KEYS_VARIABLE = "UNFOG_API_KEYS"
SECRETS = Path("/run/secrets")  # where Docker puts files of secrets: unfog_api_keys is UNFOG_API_KEYS


class SettingsError(Exception):
    """A variable has a wrong value; one sentence that names it."""


Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(config_values.keys)]
RateLimits = Annotated[tuple[RateLimitItem, ...], NoDecode, BeforeValidator(config_values.rate_limits)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(config_values.origins)]
Networks = Annotated[tuple[str, ...], NoDecode, BeforeValidator(config_values.networks)]


class Settings(BaseSettings):
    """What an operator decides. `auto` settings that change pixels are decided from facts, never from timings."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        arbitrary_types_allowed=True,  # a RateLimitItem
        secrets_dir=SECRETS if SECRETS.is_dir() else None,
    )

    checkpoint: Path = SHIPPED
    # A second model, `fast`, that draws in few steps. `auto`: the shipped one beside the shipped default.
    fast_checkpoint: Literal["auto", "none"] | Path = "auto"
    device: Annotated[str, AfterValidator(config_values.device)] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # float16 on a GPU only
    # `auto`: on a CPU compiled, where a compiled step lies in the cache or a C++ compiler can make one.
    compile: Literal["auto", "on", "off"] = "auto"
    cache_dir: Path = Field(default_factory=default_cache)  # of compiled code: nobody else may write there
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None  # compute threads on a CPU; torch decides
    # Rows a step. None is `auto`: chosen from the step times measured while warming up (app.batcher).
    max_batch: Annotated[Annotated[int, Field(ge=1, le=4096)] | None, BeforeValidator(config_values.rows_a_step)] = None
    queue_capacity: Count = 1024  # images waiting
    max_count: Count = 64  # images a request
    max_body_bytes: Count = 16 * 1024
    request_timeout: Seconds = 30.0
    drain_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 25.0
    watchdog_seconds: Seconds = 10.0
    # For how long the engine may be failed or stuck before the process ends, for its orchestrator to start it anew.
    give_up_seconds: Annotated[Seconds | None, BeforeValidator(config_values.seconds_or_never)] = 30.0
    read_timeout: Seconds = 10.0  # for a request's head, then for its body
    write_timeout: Seconds = 30.0  # for a client to take what was sent
    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: Keys = ()  # each opens; empty: no key is asked for
    rate_limit: RateLimits = ()  # requests a key, or an address where there is no key
    cors_origins: Origins = ()  # whose pages may call
    trusted_proxies: Networks = ()  # peers whose X-Forwarded-For is trusted
    docs: Literal["on", "off"] = "on"  # /docs and /openapi.json
    traces: Literal["on", "off"] = "off"  # by OpenTelemetry, which has variables of its own

    @property
    def largest_request(self) -> int:
        """Images of a request that can be admitted at all."""
        return min(self.max_count, self.queue_capacity)

    @property
    def model_names(self) -> list[str]:
        """What is served, by the names that a request may say."""
        return [DEFAULT_MODEL, FAST_MODEL] if self.fast_path else [DEFAULT_MODEL]

    @property
    def fast_path(self) -> Path | None:
        """The second checkpoint, where one is to be served."""
        if isinstance(self.fast_checkpoint, Path):
            return self.fast_checkpoint
        beside_its_teacher = self.checkpoint.resolve() == SHIPPED.resolve()
        return SHIPPED_FAST if self.fast_checkpoint == "auto" and beside_its_teacher else None


def unknown_variables() -> list[str]:
    """UNFOG_* variables that are no setting: mistyped, or of another release."""
    return sorted(name for name in os.environ if name.upper().startswith(PREFIX) and not _is_setting(name))


def load_settings() -> Settings:
    """The settings of this process; SettingsError for the first variable, or file of a secret, that is wrong."""
    _check_secrets()
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        field, reason = first["loc"][0], first["msg"].removeprefix("Value error, ")
        name, value = f"{PREFIX}{field}".upper(), "" if field == "api_keys" else f"={first['input']!r}"
        also = {"max_batch": ", or auto", "give_up_seconds": ", or never"}.get(str(field), "")
        raise SettingsError(f"{name}{value} is wrong: {reason}{also}") from error


def _check_secrets() -> None:
    """A file, or an empty variable, that is passed over would be a door that somebody believes shut."""
    if os.environ.get(KEYS_VARIABLE) == "":
        raise SettingsError(f"{KEYS_VARIABLE} is set and empty: unset it, or give it a key")
    folder = Settings.model_config.get("secrets_dir")
    for path in sorted(Path(str(folder)).iterdir()) if folder else ():
        if path.name.upper().startswith(PREFIX):
            if not _is_setting(path.name):
                raise SettingsError(f"{path} is no setting of this release")
            try:
                if not path.read_text().strip():
                    raise SettingsError(f"{path} is empty")
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or "it is no text"
                raise SettingsError(f"{path} cannot be read: {reason}") from error


def _is_setting(name: str) -> bool:
    return name.upper() in {f"{PREFIX}{field}".upper() for field in Settings.model_fields}
