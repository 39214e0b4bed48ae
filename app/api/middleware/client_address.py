"""The sender of a request: the address for logs and traces, and the name for the rate limit."""

import ipaddress

from starlette.types import Scope

UNKNOWN = "unknown"
SUBSCRIBER_PREFIX = 64  # bits of an IPv6 address: a customer chooses all bits after them

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def client_address(scope: Scope) -> str:
    """Returns the client's address in its standard form, without a port; `unknown` if there is none."""
    return str(_parse(scope) or UNKNOWN)


def key_name(place: int) -> str:
    """Returns the name under which the rate limit counts the requests of an API key."""
    return f"key:{place}"


def address_name(scope: Scope) -> str:
    """Returns the name under which the rate limit counts an address. For IPv6 this is the customer's network.

    A trusted proxy may forward text that is not an address. All such requests share one name: if the text were
    the name, callers could choose a new one for each request, or one that is another caller's.
    """
    address = _parse(scope)
    if isinstance(address, ipaddress.IPv6Address):
        return f"address:{ipaddress.ip_network((address.packed, SUBSCRIBER_PREFIX), strict=False)}"
    return f"address:{address or UNKNOWN}"


def _parse(scope: Scope) -> Address | None:
    """Parses the client's address; None for a socket without addresses and for what is not an address.

    The address may come from X-Forwarded-For, where some proxies write a port (`192.0.2.7:1234`, `[2001:db8::1]:80`).
    Older versions of uvicorn leave the port in place.
    """
    host = str((scope.get("client") or ("",))[0])
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])  # a zone has no length limit
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address
