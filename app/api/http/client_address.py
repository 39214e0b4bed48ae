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
    return _texts_of(_host(scope))[0]


def client_name(scope: Scope, key: int | None) -> str:
    """Returns the name of a client in limits: that of its API key, or of its address if it has no valid key.

    `key` is the position of the key, from 1.
    """
    return f"key:{key}" if key else address_name(scope)


def address_name(scope: Scope) -> str:
    """Returns the name of the client's address in limits. For IPv6 it is the /64 network.

    A trusted proxy can forward text that is not an address. All such requests share one name. If the text were the
    name, a client could send a new name with each request, or the name of another client.
    """
    return _texts_of(_host(scope))[1]


def _host(scope: Scope) -> str:
    """Returns the text that should be the client's address. It is empty for Unix sockets."""
    return str((scope.get("client") or ("",))[0])


@lru_cache(maxsize=256)  # Every request needs these texts several times.
def _texts_of(host: str) -> tuple[str, str]:
    """Returns the results of `client_address` and of `address_name`."""
    address = _parse(host)
    network: object = address
    if isinstance(address, ipaddress.IPv6Address):
        network = ipaddress.ip_network((address.packed, SUBSCRIBER_PREFIX), strict=False)
    return str(address or UNKNOWN), f"address:{network or UNKNOWN}"


def _parse(host: str) -> Address | None:
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
