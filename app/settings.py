"""The settings. They are read once from UNFOG_* variables, command-line flags and files of secrets."""

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from limits import RateLimitItem, parse_many
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.engine.job import DEFAULT_MODEL, FAST_MODEL
from model.checkpoint import SHIPPED, SHIPPED_FAST
from model.compiled.compiler import default_cache

PREFIX = "UNFOG_"
KEYS_VARIABLE = "UNFOG_API_KEYS"
OFF = "off"
ANY = "*"
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]+)?")
_TOKEN = re.compile(r"[!-+\--~]+")  # characters that a header can have, except the comma, which separates keys
SECRETS = Path("/run/secrets")  # Docker puts secrets here: the file unfog_api_keys sets UNFOG_API_KEYS


class SettingsError(Exception):
    """A setting has a wrong value. The message is one sentence that names the setting."""


def _rows_a_step(value: Any) -> Any:
    """Returns None for `auto`, otherwise the value."""
    return None if value == "auto" else value


def _device(value: str) -> str:
    """Returns the name of a device; ValueError unless it is `auto`, `cpu`, `cuda` or `cuda:N`."""
    if not _DEVICE.fullmatch(value):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def _seconds_or_never(value: Any) -> Any:
    """Returns None for `never`, otherwise the value."""
    return None if value == "never" else value


def _keys(value: Any) -> Any:
    """Parses comma-separated API keys. No error message contains a key."""
    if not isinstance(value, str):
        return value
    parts = _parts(value)
    if not all(_TOKEN.fullmatch(part) for part in parts):
        raise ValueError("a key has a character that no header can carry; printable ASCII without spaces can")
    return tuple(SecretStr(part) for part in parts)


def _rate_limits(value: Any) -> Any:
    """Parses `off` or a limit such as `600/minute`. Of several, such as `10/second;600/minute`, each applies."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() == OFF:
        return ()
    try:
        items: list[RateLimitItem] = parse_many(value)
    except ValueError:
        raise ValueError("must be off, or a number of requests and a time like 600/minute") from None
    if any(item.amount < 1 or item.multiples < 1 for item in items):
        raise ValueError("would permit no request: must be at least one request in at least one unit of time")
    return tuple(items)


def _origins(value: Any) -> Any:
    """Parses comma-separated origins such as `https://example.com` or `http://localhost:3000`; `*` is any origin."""
    return _listed(value, _is_origin, "no origin: must be like https://example.com:8443, without a path, or *")


def _networks(value: Any) -> Any:
    """Parses comma-separated addresses and networks such as `10.0.0.0/8`, or `*`, which trusts every address."""
    if not isinstance(value, str):
        return value
    parts = [part.lower() for part in _parts(value)]
    if ANY in parts and len(parts) > 1:
        raise ValueError("* trusts every address and must stand alone")
    for part in parts:
        if part != ANY:
            _check_network(part)
    return tuple(parts)


def _listed(value: Any, is_one: Callable[[str], bool], what_it_is: str) -> Any:
    if not isinstance(value, str):
        return value
    parts = [part.lower() for part in _parts(value)]
    for part in parts:
        if part != ANY and not is_one(part):
            raise ValueError(f"{part!r} is {what_it_is}")
    return tuple(parts)


def _parts(value: str) -> list[str]:
    parts = [part.strip() for part in value.split(",")]
    if not all(parts):
        raise ValueError("has nothing before, after or between its commas")
    return parts


def _check_network(text: str) -> None:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address or a network such as 10.0.0.0/8") from None
    address = text.partition("/")[0]
    if network.network_address != ipaddress.ip_address(address):
        raise ValueError(f"{text!r} is neither one address nor a whole network. Write {address} or {network}")


def _is_origin(text: str) -> bool:
    try:
        url = urlsplit(text)
        port = url.port  # ValueError if it is not a valid port
    except ValueError:
        return False
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    written = f"{url.scheme}://{host}" + (f":{port}" if port else "")
    return url.scheme in ("http", "https") and bool(url.hostname) and text == written


Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_keys)]
RateLimits = Annotated[tuple[RateLimitItem, ...], NoDecode, BeforeValidator(_rate_limits)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)]
Networks = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_networks)]


class Settings(BaseSettings):
    """The settings of the service. An `auto` that changes pixels depends on hardware and files, never on timings."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        arbitrary_types_allowed=True,  # a RateLimitItem
        use_attribute_docstrings=True,  # the help of the command line shows them
        secrets_dir=SECRETS if SECRETS.is_dir() else None,
    )

    checkpoint: Path = SHIPPED
    """the checkpoint of the model `default`"""
    fast_checkpoint: Literal["auto", "none"] | Path = "auto"
    """the checkpoint of the model `fast`; auto: the shipped one if UNFOG_CHECKPOINT is the shipped one"""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto, cpu, cuda or cuda:N"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """the precision of the network: auto, float32, bfloat16 or float16 (float16 on a GPU only)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: compile on a CPU if a C++ compiler or a compiled step is found; on: fail without one; off: never"""
    cache_dir: Path = Field(default_factory=default_cache)
    """the folder of compiled code; no other user may write to it"""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """compute threads on a CPU"""
    max_batch: Annotated[Annotated[int, Field(ge=1, le=4096)] | None, BeforeValidator(_rows_a_step)] = None
    """rows of a step; auto: chosen from the step times measured at the start"""
    queue_capacity: Count = 1024
    """images that may wait"""
    max_count: Count = 64
    """images of a request"""
    max_body_bytes: Count = 16 * 1024
    """bytes of a request's body"""
    request_timeout: Seconds = 30.0
    """seconds until a request is answered with 504"""
    drain_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 25.0
    """seconds after SIGTERM in which admitted requests are still answered"""
    watchdog_seconds: Seconds = 10.0
    """seconds of a step after which the engine counts as stuck"""
    give_up_seconds: Annotated[Seconds | None, BeforeValidator(_seconds_or_never)] = 30.0
    """seconds of a failed or stuck engine after which the process exits, or never"""
    read_timeout: Seconds = 10.0
    """seconds for a request's head to arrive, and then for its body"""
    write_timeout: Seconds = 30.0
    """seconds for a client to take what was sent"""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto, json or console"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """debug, info, warning or error"""
    host: str = "127.0.0.1"
    """the address to listen on"""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """the port to listen on; 0: any free port"""
    api_keys: Keys = ()
    """API keys, separated by commas; other users can see the flag in the process list, the variable is safer"""
    rate_limit: RateLimits = ()
    """requests of a key, or of an address if there is no key: off, or like 600/minute or 10/second;600/minute"""
    cors_origins: Origins = ()
    """origins whose pages may call the service, separated by commas, or *"""
    trusted_proxies: Networks = ()
    """addresses and networks whose X-Forwarded-For is trusted, separated by commas, or *"""
    docs: Literal["on", "off"] = "on"
    """on or off: /docs and /openapi.json"""
    traces: Literal["on", "off"] = "off"
    """on or off: traces by OpenTelemetry, which has environment variables of its own"""

    @property
    def largest_request(self) -> int:
        """Returns the largest number of images that a request may have."""
        return min(self.max_count, self.queue_capacity)

    @property
    def model_names(self) -> list[str]:
        """Returns the names of the served models, which a request may name."""
        return [DEFAULT_MODEL, FAST_MODEL] if self.fast_path else [DEFAULT_MODEL]

    @property
    def fast_path(self) -> Path | None:
        """Returns the path of the second checkpoint; None if only one is served."""
        if isinstance(self.fast_checkpoint, Path):
            return self.fast_checkpoint
        beside_its_teacher = self.checkpoint.resolve() == SHIPPED.resolve()
        return SHIPPED_FAST if self.fast_checkpoint == "auto" and beside_its_teacher else None


def unknown_variables() -> list[str]:
    """Returns the UNFOG_* variables that are not settings: mistyped ones, or those of another release."""
    return sorted(name for name in os.environ if name.upper().startswith(PREFIX) and not _is_setting(name))


def load_settings(flags: Mapping[str, str] | None = None) -> Settings:
    """Returns the settings of this process. A flag wins over a variable, a variable over the file of a secret.

    `flags` maps names of fields to texts. SettingsError for the first setting, or file of a secret, that is wrong.
    """
    flags = flags or {}
    _check_secrets()
    try:
        return Settings(**flags)  # type: ignore[arg-type] # texts, which pydantic parses
    except ValidationError as error:
        first = error.errors()[0]
        field, reason = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
        name = flag_of(field) if field in flags else f"{PREFIX}{field}".upper()
        value = "" if field == "api_keys" else f"={first['input']!r}"
        also = {"max_batch": ", or auto", "give_up_seconds": ", or never"}.get(field, "")
        raise SettingsError(f"{name}{value} is wrong: {reason}{also}") from error


def flag_of(field: str) -> str:
    """Returns the command-line flag of a setting: `--max-batch`."""
    return f"--{field.replace('_', '-')}"


def _check_secrets() -> None:
    """Checks the variable of API keys and the files of secrets; SettingsError if one is empty, unknown or unreadable.

    If they were ignored, the operator would believe that API keys are required although they are not.
    """
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
