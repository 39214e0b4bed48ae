"""Tests of the client address in logs and in the rate limiter."""

import pytest

from app.api.http.client_address import address_name, client_address, client_name

ADDRESSES = [  # (host of the connection or X-Forwarded-For, address in logs, name in the rate limiter)
    ("192.0.2.7", "192.0.2.7", "address:192.0.2.7"),
    ("192.0.2.7:1234", "192.0.2.7", "address:192.0.2.7"),
    ("192.0.2.7:", "192.0.2.7", "address:192.0.2.7"),
    ("::ffff:192.0.2.7", "192.0.2.7", "address:192.0.2.7"),
    ("[::ffff:192.0.2.7]:80", "192.0.2.7", "address:192.0.2.7"),
    ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2:3:4:5:6", "address:2001:db8:1:2::/64"),
    ("2001:DB8:1:2:FFFF::1", "2001:db8:1:2:ffff::1", "address:2001:db8:1:2::/64"),
    ("[2001:db8:1:2::1]", "2001:db8:1:2::1", "address:2001:db8:1:2::/64"),
    ("[2001:db8:1:2::1]:80", "2001:db8:1:2::1", "address:2001:db8:1:2::/64"),
    ("[2001:db8:1:2::1]:eighty", "2001:db8:1:2::1", "address:2001:db8:1:2::/64"),
    ("fe80::1%eth0", "fe80::1", "address:fe80::/64"),
    ("fe80::1%" + "x" * 50_000, "fe80::1", "address:fe80::/64"),
]
NOT_ADDRESSES = ["", "unknown", "_hidden", "key:1", "key 1", "testclient", "1.2.3", "1.2.3.4.5", "[", "[]:80", "ÿ"]


@pytest.mark.parametrize(("host", "address", "name"), ADDRESSES, ids=[row[0][:30] for row in ADDRESSES])
def test_address_is_canonical_and_has_one_name(host: str, address: str, name: str) -> None:
    scope = {"type": "http", "client": (host, 1)}
    assert client_address(scope) == address
    assert address_name(scope) == name


@pytest.mark.parametrize("host", [*NOT_ADDRESSES, "x" * 50_000, "1" * 50_000, "1:" * 25_000])
def test_text_that_is_not_an_address_is_unknown(host: str) -> None:
    scope = {"type": "http", "client": (host, 1)}
    assert (client_address(scope), address_name(scope)) == ("unknown", "address:unknown")


@pytest.mark.parametrize("scope", [{"type": "http"}, {"type": "http", "client": None}])
def test_connection_without_an_address_is_unknown(scope: dict[str, object]) -> None:
    assert (client_address(scope), address_name(scope)) == ("unknown", "address:unknown")


def test_client_is_named_by_its_key_or_else_by_its_address() -> None:
    scope = {"type": "http", "client": ("192.0.2.7", 1)}
    assert client_name(scope, 2) != client_name(scope, 1)
    assert client_name(scope, None) == address_name(scope)


def test_limiter_names_of_keys_and_addresses_are_different() -> None:
    names = {address_name({"client": (host, 1)}) for host, _, _ in ADDRESSES}
    names |= {address_name({"client": (host, 1)}) for host in NOT_ADDRESSES}
    assert not names & {client_name({"type": "http"}, position) for position in range(1, 100)}
    assert all(name.startswith("address:") for name in names)
