"""Settings whose value is more than a number or a word: how each is written in a variable, and what is wrong with it.

Each function raises ValueError in words that follow "UNFOG_NAME='value' is wrong: ".
"""

import ipaddress
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from limits import RateLimitItem, parse_many
from pydantic import SecretStr

OFF = "off"
ANY = "*"
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]+)?")
_TOKEN = re.compile(r"[!-+\--~]+")  # what a header can carry, less the comma that parts keys


def rows_a_step(value: Any) -> Any:
    """`auto` is None."""
    return None if value == "auto" else value


def device(value: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    if not _DEVICE.fullmatch(value):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def seconds_or_never(value: Any) -> Any:
    """`never` is None."""
    return None if value == "never" else value


def keys(value: Any) -> Any:
    """Comma-separated; never said back, whatever is wrong with it."""
    if not isinstance(value, str):
        return value
    parts = _parts(value)
    if not all(_TOKEN.fullmatch(part) for part in parts):
        raise ValueError("a key has a character that no header can carry; printable ASCII without spaces can")
    return tuple(SecretStr(part) for part in parts)


def rate_limits(value: Any) -> Any:
    """`off`, or like `600/minute`; several, such as `10/second;600/minute`, all hold."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() == OFF:
        return ()
    try:
        items: list[RateLimitItem] = parse_many(value)
    except ValueError:
        raise ValueError("must be off, or a number of requests and a time like 600/minute") from None
    if any(item.amount < 1 or item.multiples < 1 for item in items):
        raise ValueError("would let nobody in: must be at least one request in at least one unit of time")
    return tuple(items)


def origins(value: Any) -> Any:
    """Comma-separated, each like `https://example.com` or `http://localhost:3000`; `*` is any."""
    return _listed(value, _is_origin, "no origin: must be like https://example.com:8443, without a path, or *")


def networks(value: Any) -> Any:
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
        port = url.port  # ValueError where it is none
    except ValueError:
        return False
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    written = f"{url.scheme}://{host}" + (f":{port}" if port else "")
    return url.scheme in ("http", "https") and bool(url.hostname) and text == written
