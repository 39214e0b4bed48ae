"""Determines the client of a request: its address for logs and traces, and its name in the rate limiter."""

import ipaddress
from functools import lru_cache

from starlette.types import Scope

UNKNOWN = "unknown"
# Number of leading bits of an IPv6 address that identify a subscriber, who can use all addresses with these bits.
SUBSCRIBER_PREFIX = 64

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def client_address(scope: Scope) -> str:
    """Returns the client's address in canonical form, without a port, or `unknown`."""
    return str(_parse(scope) or UNKNOWN)


def key_name(position: int) -> str:
    """Returns the name of an API key in the rate limiter."""
    return f"key:{position}"


def address_name(scope: Scope) -> str:
    """Returns the name of the client's address in the rate limiter. For IPv6 it is the /64 network.

    A trusted proxy can forward text that is not an address. All such requests share one name. If the text were the
    name, a client could send a new name with each request, or the name of another client.
    """
    address = _parse(scope)
    if isinstance(address, ipaddress.IPv6Address):
        return f"address:{ipaddress.ip_network((address.packed, SUBSCRIBER_PREFIX), strict=False)}"
    return f"address:{address or UNKNOWN}"


def _parse(scope: Scope) -> Address | None:
    """Parses the client's address. Returns None for Unix sockets and for text that is not an address."""
    return _parse_text(str((scope.get("client") or ("",))[0]))


@lru_cache(maxsize=256)  # Every request needs its address several times.
def _parse_text(host: str) -> Address | None:
    """Parses an address. Returns None for other text.

    The address can come from X-Forwarded-For. Some proxies add a port (`192.0.2.7:1234`, `[2001:db8::1]:80`), which
    older versions of uvicorn do not remove.
    """
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        # Remove an IPv6 zone such as %eth0, because its length is unlimited.
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address
