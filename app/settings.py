"""Reads the settings once at the start: from command-line flags, UNFOG_* variables and secret files."""

import base64
import ipaddress
import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.engine.job import DEFAULT_MODEL, FAST_MODEL, LONGEST_TIMEOUT, SHORTEST_TIMEOUT
from model.compiled.private_cache import default_cache
from model.spec import SHIPPED, SHIPPED_FAST, SHIPPED_MODELS

PREFIX = "UNFOG_"
KEYS_VARIABLE = "UNFOG_API_KEYS"
SECRET_FIELDS = {"api_keys", "database_url", "rate_limit_url", "webhook_secret"}  # an error does not show their values
OFF = "off"
ANY = "*"
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]+)?")
_TOKEN = re.compile(r"[!-+\--~]+")  # printable ASCII without spaces and without the comma, which separates keys
_MODEL_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")
_HOST = re.compile(r"(\*\.)?[0-9a-z]([0-9a-z.-]*[0-9a-z])?(:[0-9]{1,5})?|\[[0-9a-f:.]+\](:[0-9]{1,5})?")
_RATE = re.compile(r"\s*([0-9]+)\s*(?:/|per)\s*([0-9]+)?\s*(second|minute|hour|day|month|year)s?\s*")
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "month": 30 * 86_400, "year": 360 * 86_400}
SECRETS = Path("/run/secrets")  # Docker mounts secrets here: the file unfog_api_keys sets UNFOG_API_KEYS


class RateLimit(NamedTuple):
    """A caller may send `amount` requests in `seconds`."""

    amount: int
    seconds: int


class SettingsError(Exception):
    """A setting is invalid. The message is one line that names the flag, the variable or the secret file."""


def _number_or_auto(value: Any) -> Any:
    """Maps `auto` to None. Other values are checked by the type of the field."""
    return None if value == "auto" else value


def _device(value: str) -> str:
    """Raises ValueError unless the value is `auto`, `cpu`, `cuda` or `cuda:N`."""
    if not _DEVICE.fullmatch(value):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def _seconds_or_never(value: Any) -> Any:
    """Maps `never` to None. Other values are checked by the type of the field."""
    return None if value == "never" else value


def _keys(value: Any) -> Any:
    """Parses comma-separated API keys. Error messages never contain a key."""
    if not isinstance(value, str):
        return value
    parts = _parts(value)
    if not all(_TOKEN.fullmatch(part) for part in parts):
        raise ValueError("each API key must consist of printable ASCII characters without spaces")
    return tuple(SecretStr(part) for part in parts)


def _rate_limits(value: Any) -> Any:
    """Parses `off` or comma-separated limits such as `10/second,600/minute`. A request must satisfy all of them."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() == OFF:
        return ()
    matches = [_RATE.fullmatch(part) for part in re.split("[,;|]", value.lower())]
    if not all(matches):
        raise ValueError("must be off, or limits such as 600/minute, separated by commas")
    parts = [match.groups() for match in matches if match]
    limits = [RateLimit(int(amount), int(times or 1) * _SECONDS[unit]) for amount, times, unit in parts]
    if any(limit.amount < 1 or limit.seconds < 1 for limit in limits):
        raise ValueError("must permit at least 1 request in at least 1 time unit, as in 600/minute")
    return tuple(limits)


def _models(value: Any) -> Any:
    """Parses comma-separated models such as `letters,cars=cars.safetensors`. A name alone is a shipped model."""
    if not isinstance(value, str):
        return value
    models: dict[str, Path] = {}
    for part in _parts(value):
        name, equals, path = part.partition("=")
        if not equals:
            if name not in SHIPPED_MODELS:
                shipped = ", ".join(SHIPPED_MODELS)
                raise ValueError(f"{part!r} is not a shipped model ({shipped}). Use the form NAME=PATH for another one")
            path = str(SHIPPED_MODELS[name])
        if not path.strip():
            raise ValueError(f"{part!r} has no path. Use the form NAME=PATH")
        if not _MODEL_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name of 1 to 64 letters, digits, dots, hyphens and underscores")
        if name in models:
            raise ValueError(f"two models have the name {name!r}")
        models[name] = Path(path.strip())
    return models


def _null_labels(value: Any) -> Any:
    """Parses comma-separated labels such as `cats=10,birds=0`, one for each model."""
    if not isinstance(value, str):
        return value
    labels: dict[str, int] = {}
    for part in _parts(value):
        name, _, label = part.partition("=")
        if not (label.strip().isascii() and label.strip().isdecimal()):
            raise ValueError(f"{part!r} is not a label. Use the form NAME=LABEL, such as cats=10")
        if name in labels:
            raise ValueError(f"two labels are given for {name!r}")
        labels[name] = int(label)
    return labels


def _origins(value: Any) -> Any:
    """Parses comma-separated origins such as `https://example.com` or `http://localhost:3000`. `*` means any origin."""
    if not isinstance(value, str):
        return value
    parts = [part.lower() for part in _parts(value)]
    for part in parts:
        if part != ANY and not _is_origin(part):
            raise ValueError(f"{part!r} is not an origin. Use the form https://example.com:8443 without a path, or *")
    return tuple(parts)


def _hosts(value: Any) -> Any:
    """Parses comma-separated hosts such as `example.com`, `*.example.com` or `example.com:8443`."""
    if not isinstance(value, str):
        return value
    parts = [part.lower() for part in _parts(value)]
    for part in parts:
        if not _HOST.fullmatch(part):
            raise ValueError(f"{part!r} is not a host. Use the form example.com, *.example.com or example.com:8443")
    return tuple(parts)


def _webhook_secret(value: SecretStr) -> SecretStr:
    """Raises ValueError unless the value is a secret of Standard Webhooks. The message does not contain it."""
    text = value.get_secret_value()
    try:
        key = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except ValueError:  # also binascii.Error
        key = b""
    if not text.startswith("whsec_") or not 24 <= len(key) <= 64:
        raise ValueError(
            'must be whsec_ and 24 to 64 bytes in base64. Generate one with: echo "whsec_$(openssl rand -base64 32)"'
        )
    return value


def _database_url(value: SecretStr) -> SecretStr:
    """Raises ValueError unless the value is the URL of a PostgreSQL database. The message does not contain it."""
    if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
        raise ValueError("must have the form postgresql://USER:PASSWORD@HOST/NAME")
    return value


def _rate_limit_url(value: SecretStr) -> SecretStr:
    """Raises ValueError unless the value is the URL of a Redis server and its client is installed.

    The message does not contain the URL.
    """
    try:
        url = urlsplit(value.get_secret_value())
        is_valid = url.scheme in ("redis", "rediss") and bool(url.hostname) and url.port != 0
    except ValueError:  # an invalid port or address
        is_valid = False
    if not is_valid:
        raise ValueError("must have the form redis://:PASSWORD@HOST:PORT/NUMBER, or rediss:// with TLS")
    if not (find_spec("limits") and find_spec("redis")):
        raise ValueError("needs the extra `redis`. Install it with: pip install -e '.[redis]'")
    return value


def default_data_dir() -> Path:
    """Returns the folder `unfog` in $XDG_DATA_HOME or ~/.local/share."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "unfog"


def _networks(value: Any) -> Any:
    """Parses comma-separated addresses and networks such as `10.0.0.0/8`, or `*`, which trusts every address."""
    if not isinstance(value, str):
        return value
    parts = [part.lower() for part in _parts(value)]
    if ANY in parts and len(parts) > 1:
        raise ValueError("* trusts every address and cannot be combined with other entries")
    for part in parts:
        if part != ANY:
            _check_network(part)
    return tuple(parts)


def _parts(value: str) -> list[str]:
    parts = [part.strip() for part in value.split(",")]
    if not all(parts):
        raise ValueError("contains an empty entry. Remove the extra comma, or set a value")
    return parts


def _check_network(text: str) -> None:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address or a network such as 10.0.0.0/8") from None
    address = text.partition("/")[0]
    if network.network_address != ipaddress.ip_address(address):
        raise ValueError(f"{text!r} has address bits after the prefix. Use {address} or {network}")


def _is_origin(text: str) -> bool:
    try:
        url = urlsplit(text)
        port = url.port  # this access raises ValueError for an invalid port
    except ValueError:
        return False
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    origin = f"{url.scheme}://{host}" + (f":{port}" if port else "")
    return url.scheme in ("http", "https") and bool(url.hostname) and text == origin


Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_keys)]
RateLimits = Annotated[tuple[RateLimit, ...], NoDecode, BeforeValidator(_rate_limits)]
Models = Annotated[dict[str, Path], NoDecode, BeforeValidator(_models)]
NullLabels = Annotated[dict[str, int], NoDecode, BeforeValidator(_null_labels)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)]
Hosts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_hosts)]
Networks = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_networks)]


class Settings(BaseSettings):
    """The settings of the service.

    An `auto` that changes pixels is resolved from hardware and files, never from timings. The text after each field is
    its description in --help.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        use_attribute_docstrings=True,  # --help shows the docstrings of the fields
        secrets_dir=SECRETS if SECRETS.is_dir() else None,
    )

    models: Models = Field(default_factory=dict)
    """models to serve, separated by commas. Each is NAME=PATH of a .safetensors file or of a folder with a pipeline of
    diffusers, NAME=hf:OWNER/NAME@COMMIT for a pipeline of the Hugging Face Hub, or a shipped model: default,
    fast, letters or cifar10. The first one is the default. They can have different classes, sizes and colours. The flag
    --model adds one model and can be repeated (default: the models of UNFOG_CHECKPOINT and UNFOG_FAST_CHECKPOINT)"""
    null_labels: NullLabels = Field(default_factory=dict)
    """labels that mean "no class" in pipelines of diffusers that were trained with one, as NAME=LABEL, separated by
    commas. They permit guidance (default: none)"""
    checkpoint: Path = SHIPPED
    """checkpoint of the model `default`, a .safetensors file, without UNFOG_MODELS (default: the checkpoint shipped
    with unfog)"""
    fast_checkpoint: Literal["auto", "none"] | Path = "auto"
    """checkpoint of the model `fast`, without UNFOG_MODELS: a .safetensors file, auto or none. auto: the shipped fast
    checkpoint if UNFOG_CHECKPOINT is the shipped one, otherwise none. none: `fast` is not served (default: auto)"""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto, cpu, cuda or cuda:N. auto: the GPU if it works, otherwise the CPU (default: auto)"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the network: auto, float32, bfloat16 or float16. float16 needs a GPU. auto: float32 for pipelines
    of diffusers; for other models bfloat16 or float16 if the hardware accelerates it, otherwise float32
    (default: auto)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compilation of the denoising step: auto, on or off. auto: on a CPU, compile if a C++ compiler or a compiled step
    in the cache is found; on a GPU, run CUDA graphs of the step without compilation. on: compile, on a GPU inside CUDA
    graphs; exit if this is not possible. off: no compilation and no CUDA graphs. On a GPU, a service with a pipeline of
    diffusers uses no CUDA graphs (default: auto)"""
    reproducible: Literal["on", "off"] = "off"
    """on or off: give the same bytes for the same seed under any load, also on a GPU. There, on pads every step to the
    size of UNFOG_MAX_BATCH (auto: 64 images), so that steps with few images take longer. On a CPU the bytes are always
    the same (default: off)"""
    cache_dir: Path = Field(default_factory=default_cache)
    """folder for compiled code. If other users can write to it, a private subfolder is used (default: unfog in
    $XDG_CACHE_HOME or ~/.cache)"""
    clip: str = "auto"
    """CLIP model for CLIP guidance and /score: auto, off, a folder in open_clip's format, ARCHITECTURE:TAG or
    ARCHITECTURE:FILE. auto: the shipped model if the extra `clip` is installed, otherwise none. off: none
    (default: auto)"""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """compute threads on a CPU, 1 to 1024 (default: the available cores, one fewer while another process keeps a core
    busy; at most 2 for float32 without compilation)"""
    max_batch: Annotated[Annotated[int, Field(ge=1, le=4096)] | None, BeforeValidator(_number_or_auto)] = None
    """maximum batch size: rows (images) per step, 1 to 4096, or auto. auto: chosen from step times that are measured at
    the start (default: auto)"""
    queue_capacity: Count = 1024
    """maximum number of images in the queue. A request that does not fit is answered with 429 (default: 1024)"""
    max_count: Count = 64
    """maximum number of images per request (default: 64)"""
    max_body_bytes: Count = 16 * 1024
    """maximum size in bytes of a request body without pictures (default: 16384)"""
    max_image_bytes: Count = 4 * 1024 * 1024
    """maximum size in bytes of a request body with pictures (default: 4194304)"""
    request_timeout: Annotated[Seconds | None, BeforeValidator(_number_or_auto)] = None
    """deadline of a request in seconds, and upper limit of timeout_seconds, or auto. A late request is answered with
    504. auto: 60 times the duration in full steps, 30 to 600; timeout_seconds up to 600 (default: auto)"""
    drain_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 25.0
    """seconds after SIGTERM to finish admitted requests. The remaining ones are then answered with 503 (default: 25)"""
    watchdog_seconds: Seconds = 10.0
    """maximum duration of a step in seconds. If it is exceeded, the engine counts as stuck and /livez answers 503
    (default: 10)"""
    give_up_seconds: Annotated[Seconds | None, BeforeValidator(_seconds_or_never)] = 30.0
    """exit with status 1 if the engine has failed or is stuck for this many seconds; never: do not exit
    (default: 30)"""
    read_timeout: Seconds = 10.0
    """seconds for the request line and headers to arrive, and again for the body. Then the request is answered with 408
    (default: 10)"""
    write_timeout: Seconds = 30.0
    """seconds for a client to accept the data that is ready to be sent. Then the connection is closed (default: 30)"""
    log_format: Literal["auto", "json", "console"] = "auto"
    """auto, json or console. auto: console on a terminal, otherwise json (default: auto)"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """minimum level of log lines: debug, info, warning or error (default: info)"""
    host: str = "127.0.0.1"
    """address to listen on (default: 127.0.0.1)"""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """port to listen on; 0: any free port (default: 8000)"""
    api_keys: Keys = ()
    """API keys, separated by commas. If set, every request needs one of them in Authorization: Bearer or X-API-Key,
    except /health, /livez, /readyz, /startupz, /metrics, GET requests below /v2, /docs, /openapi.json and the web page.
    Other users can see the flag in the process list, so use the variable or a secret file (default: no API keys, auth
    is off)"""
    rate_limit: RateLimits = ()
    """request limit per API key, or per client address without a valid key (IPv6: per /64 network): off, or limits such
    as 600/minute or 10/second,600/minute, separated by commas. Requests to /health, /livez, /readyz, /startupz,
    /metrics, /docs, /openapi.json and the web page, and GET requests below /v2, are not limited and not counted
    (default: off)"""
    rate_limit_url: Annotated[SecretStr, AfterValidator(_rate_limit_url)] | None = None
    """Redis server in which services count the requests of UNFOG_RATE_LIMIT together, as
    redis://:PASSWORD@HOST:PORT/NUMBER, or rediss:// with TLS. While it does not answer, each process counts alone.
    Needs the extra `redis`. Other users can see the flag in the process list, so use the variable or a secret file
    (default: none, each process counts alone)"""
    cors_origins: Origins = ()
    """origins whose web pages may call the service (CORS), such as https://example.com, separated by commas; * permits
    every origin (default: none)"""
    trusted_proxies: Networks = ()
    """addresses and networks of proxies whose X-Forwarded-For header is trusted, such as 10.0.0.0/8, separated by
    commas; * alone trusts every address (default: none)"""
    docs: Literal["on", "off"] = "on"
    """on or off: serve /docs and /openapi.json, which need no API key. off: they answer 404, or 401 if API keys are set
    and the request has none (default: on)"""
    data_dir: Path = Field(default_factory=default_data_dir)
    """folder of the SQLite database with files, batches and their results, if UNFOG_DATABASE_URL is not set. Only one
    process can use it (default: unfog in $XDG_DATA_HOME or ~/.local/share)"""
    database_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = None
    """PostgreSQL database of files, batches and their results, as postgresql://USER:PASSWORD@HOST/NAME. Services with
    the same database share the work. Needs the extra `postgres`. Other users can see the flag in the process list, so
    use the variable or a secret file (default: none, SQLite in UNFOG_DATA_DIR)"""
    max_files: Count = 1000
    """maximum number of uploaded files per API key (default: 1000)"""
    max_file_bytes: Count = 200 * 1024 * 1024
    """maximum size in bytes of an uploaded file (default: 209715200)"""
    max_stored_bytes: Count = 10 * 1024**3
    """maximum size in bytes of the files and results per API key. Beyond it, no file is uploaded and no batch is
    created (default: 10737418240)"""
    max_lines: Count = 50_000
    """maximum number of lines in a batch (default: 50000)"""
    file_days: Annotated[int, Field(ge=1, le=3650)] = 30
    """days after which a file expires and is deleted, unless its upload or batch sets another lifetime (default: 30)"""
    webhook_hosts: Hosts = ()
    """hosts to which webhooks of batches may be sent, such as example.com or *.example.com, separated by commas. Needs
    UNFOG_WEBHOOK_SECRET (default: none)"""
    webhook_secret: Annotated[SecretStr, AfterValidator(_webhook_secret)] | None = None
    """secret that signs webhooks as in Standard Webhooks: whsec_ and 24 to 64 random bytes in base64 (default: none)"""
    webhook_private: Literal["on", "off"] = "off"
    """on or off: permit webhooks to private addresses and without TLS (default: off)"""
    page: Literal["on", "off"] = "on"
    """on or off: serve the web page at / and its files below /static/, which need no API key (default: on)"""
    traces: Literal["on", "off"] = "off"
    """on or off: export OpenTelemetry traces. Needs the extra `traces`. The OTEL_* variables configure the export
    (default: off)"""

    @property
    def largest_request(self) -> int:
        """The maximum number of images in a request."""
        return min(self.max_count, self.queue_capacity)

    @property
    def short_timeout(self) -> float:
        """The timeout in seconds of work that is not computed by the engine, such as the decoding of pictures."""
        return self.request_timeout or SHORTEST_TIMEOUT

    @property
    def longest_timeout(self) -> float:
        """The maximum value of timeout_seconds."""
        return self.request_timeout or LONGEST_TIMEOUT

    @property
    def model_paths(self) -> dict[str, Path]:
        """The path of the checkpoint of each served model, by name. The first model is the default."""
        if self.models:
            return self.models
        fast = {FAST_MODEL: self._fast_path} if self._fast_path else {}
        return {DEFAULT_MODEL: self.checkpoint, **fast}

    def source_of(self, model: str) -> str:
        """Returns the variable that names the checkpoint of a model."""
        if self.models:
            return variable_of("models")
        return variable_of("fast_checkpoint" if model == FAST_MODEL else "checkpoint")

    @property
    def _fast_path(self) -> Path | None:
        """The path of the checkpoint of the model `fast`; None if this model is not served."""
        if isinstance(self.fast_checkpoint, Path):
            return self.fast_checkpoint
        is_shipped = self.checkpoint.resolve() == SHIPPED.resolve()
        return SHIPPED_FAST if self.fast_checkpoint == "auto" and is_shipped else None


def unknown_variables() -> list[str]:
    """Returns the UNFOG_* variables that are not settings of this release."""
    return sorted(name for name in os.environ if name.upper().startswith(PREFIX) and not _is_setting(name))


def load_settings(flags: Mapping[str, str] | None = None) -> Settings:
    """Returns the settings of this process. A flag overrides a variable, and a variable overrides a secret file.

    `flags` maps field names to their unparsed values. Raises SettingsError for the first invalid setting or file.
    """
    flags = flags or {}
    _check_secrets()
    try:
        settings = Settings(**flags)  # type: ignore[arg-type] # pydantic parses the strings
    except ValidationError as error:
        first = error.errors()[0]
        field, reason = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
        name = flag_of(field) if field in flags else variable_of(field)
        value = "" if field in SECRET_FIELDS else f"={first['input']!r}"
        also = {"max_batch": ", or auto", "request_timeout": ", or auto", "give_up_seconds": ", or never"}.get(
            field, ""
        )
        raise SettingsError(f"{name}{value} is invalid: {reason}{also}") from error
    checkpoints = settings.model_fields_set & {"checkpoint", "fast_checkpoint"}
    if not (settings.models and checkpoints):
        return settings
    if ("models" in flags) == bool(checkpoints & flags.keys()):  # the same source
        both = [flag_of(each) if "models" in flags else variable_of(each) for each in ("models", min(checkpoints))]
        raise SettingsError(f"{both[0]} and {both[1]} are both set. Set one of them")
    return settings if "models" in flags else settings.model_copy(update={"models": {}})


def flag_of(field: str) -> str:
    """Returns the command-line flag of a setting, such as `--max-batch`."""
    return f"--{field.replace('_', '-')}"


def variable_of(field: str) -> str:
    """Returns the environment variable of a setting, such as `UNFOG_MAX_BATCH`."""
    return f"{PREFIX}{field}".upper()


def _check_secrets() -> None:
    """Raises SettingsError if UNFOG_API_KEYS or a secret file is empty, or a secret file is unknown or unreadable.

    A link to a file outside of the folder is refused too, since pydantic-settings skips it. Ignoring such a file would
    start the service without the API keys that the operator has set.
    """
    if os.environ.get(KEYS_VARIABLE) == "":
        raise SettingsError(f"{KEYS_VARIABLE} is empty. Set at least one API key, or unset it to turn auth off")
    folder = Settings.model_config.get("secrets_dir")
    for path in sorted(Path(str(folder)).iterdir()) if folder else ():
        if path.name.upper().startswith(PREFIX):
            if not _is_setting(path.name):
                raise SettingsError(f"Secret file {path} is not named after a setting. Rename or remove it")
            try:
                if not path.read_text().strip():
                    raise SettingsError(f"Secret file {path} is empty. Write a value to it, or remove it")
                if not path.resolve().is_relative_to(Path(str(folder)).resolve()):
                    raise SettingsError(f"Secret file {path} is a link to a file outside {folder}. Use a regular file")
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or "not valid UTF-8"
                raise SettingsError(f"Secret file {path} cannot be read: {reason}") from error


def _is_setting(name: str) -> bool:
    return name.upper() in {variable_of(field) for field in Settings.model_fields}
