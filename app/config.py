"""Settings, read once from UNFOG_* variables at the edge and handed down."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.checkpoint import SHIPPED, SHIPPED_FAST
from model.compiler import default_cache

PREFIX = "UNFOG_"
# Promised for a later release: whoever sets one must not believe that it protects anything.
NOT_YET = {"api_keys", "rate_limit", "cors_origins"}


class SettingsError(Exception):
    """A variable has a wrong value; one sentence that names it."""


def _max_batch(value: Any) -> Any:
    return None if value == "auto" else value


def _device(value: str) -> str:
    kind, _, number = value.partition(":")
    if (
        kind not in ("auto", "cpu", "cuda")
        or (number and (kind != "cuda" or not (number.isascii() and number.isdecimal())))
        or value[-1:] == ":"
    ):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """What an operator decides. `auto` settings that change pixels are decided from facts, never from timings."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    checkpoint: Path = SHIPPED
    # A second model, `fast`, that draws in few steps. `auto`: the shipped one beside the shipped default.
    fast_checkpoint: Literal["auto", "none"] | Path = "auto"
    device: Annotated[str, AfterValidator(_device)] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # `auto`: on a CPU compiled, where a compiled step lies in the cache or a C++ compiler can make one.
    compile: Literal["auto", "on", "off"] = "auto"
    cache_dir: Path = Field(default_factory=default_cache)  # of compiled code: nobody else may write there
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None  # compute threads on a CPU; torch decides
    # Rows a step. None is `auto`: from steps timed while warming up, and from who is there (app.limits).
    max_batch: Annotated[Annotated[int, Field(ge=1, le=4096)] | None, BeforeValidator(_max_batch)] = None
    queue_capacity: Count = 1024  # images waiting
    max_count: Count = 64  # images a request
    max_body_bytes: Count = 1024 * 1024
    request_timeout: Seconds = 30.0
    drain_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 25.0
    watchdog_seconds: Seconds = 10.0
    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: str | None = None
    rate_limit: str | None = None
    cors_origins: str | None = None

    @property
    def fast_path(self) -> Path | None:
        """The second checkpoint, where one is to be served."""
        if isinstance(self.fast_checkpoint, Path):
            return self.fast_checkpoint
        beside_its_teacher = self.checkpoint.resolve() == SHIPPED.resolve()
        return SHIPPED_FAST if self.fast_checkpoint == "auto" and beside_its_teacher else None


def unknown_variables() -> list[str]:
    """UNFOG_* variables that are no setting: mistyped, or of another release."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)


def load_settings() -> Settings:
    """The settings of this process; SettingsError for the first variable with a wrong value."""
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name, reason = f"{PREFIX}{first['loc'][0]}".upper(), first["msg"].removeprefix("Value error, ")
        also = ", or auto" if first["loc"][0] == "max_batch" else ""
        raise SettingsError(f"{name}={first['input']!r} is wrong: {reason}{also}") from error
    for field in sorted(NOT_YET):
        value = getattr(settings, field)
        if value is not None and (field, value) != ("rate_limit", "off"):
            raise SettingsError(f"{PREFIX}{field.upper()} is set, but this release does not have it yet")
    return settings
