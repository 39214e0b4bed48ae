"""Tests of the URLs and addresses to which webhooks may be sent."""

import asyncio
import threading
from typing import Any

import pytest

from app.batches import webhooks as module
from app.batches.webhooks import MAX_URL, WebhookTargets, is_public
from app.errors import FieldError
from tests.app.batches.receiver import HOST

TIMEOUT = 60  # seconds to wait for a thread before the test fails
PRIVATE = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1"),
    *("224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fec0::1"),
    *("fc00::1", "fd12:3456::1", "ff02::1", "2001:db8::1", "100::1"),
    *("64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1.1.1.1"),
    *("2002:7f00:1::1", "2002:0a00:1::1", "2002:0808:0808::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "100.128.0.1", "172.32.0.1", "2606:4700:4700::1111", "2a00:1450:4001::1"]
PUBLIC += ["64:ff9b::8.8.8.8"]


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com",
        "https://hooks.example.com/a?token=b",
        "HTTPS://Hooks.Example.COM:8443/",
        "https://a.example.net/",
        "https://a.b.example.net:1/",
        "https://port.example.org:8443/",
        "https://port443.example.org/",
        "https://[2606:4700:4700::1111]/",
        f"https://hooks.example.com/{'a' * (MAX_URL - 26)}",
    ],
)
def test_permitted_url_is_accepted(url: str) -> None:
    hosts = ("hooks.example.com", "*.example.net", "port.example.org:8443", "port443.example.org:443")
    WebhookTargets((*hosts, "[2606:4700:4700::1111]"), permits_private=False).check(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/hook",
        "hooks.example.com",
        "https:///hook",
        "https://",
        "http://hooks.example.com/",
        "ftp://hooks.example.com/",
        "file:///etc/passwd",
        "https://example.com/",
        "https://evil-hooks.example.com/",
        "https://hooks.example.com.evil.com/",
        "https://hooks.example.com./",
        "https://example.net/",
        "https://.example.net/",
        "https://a..example.net/",
        "https://evilexample.net/",
        "https://evil.com\\.example.net/",
        "https://evil.com%2F.example.net/",
        f"https://{'a' * 64}.example.net/",
        f"https://{'a.' * 125}example.net/",
        "https://port.example.org/",
        "https://port.example.org:8444/",
        "https://user@hooks.example.com/",
        "https://user:password@hooks.example.com/",
        "https://hooks.example.com@evil.com/",
        "https://hooks.example.com\\@evil.com/",
        "https://hooks.example.com/#part",
        "https://hooks.example.com/#",
        "https://hooks.example.com:0/",
        "https://hooks.example.com:65536/",
        "https://hooks.example.com:port/",
        "https://hooks.example.com:-1/",
        "https://hooks.example.com/a b",
        "https://hooks.example.com/a\r\nHost: b",
        "https://hooks.example.com/\x00",
        " https://hooks.example.com/",
        "https://hooks.example.com/\n",
        "https://hooks.exämple.com/",
        "https://hooks\uff0eexample.com/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::1/",
        "https://[fe80::1%25eth0]/",
        f"https://hooks.example.com/{'a' * (MAX_URL - 25)}",
    ],
)
def test_url_that_is_not_permitted_is_refused(url: str) -> None:
    hosts = ("hooks.example.com", "*.example.net", "port.example.org:8443")
    with pytest.raises(FieldError) as error:
        WebhookTargets(hosts, permits_private=False).check(url)
    assert error.value.field == "webhook_url"


def test_http_is_accepted_if_private_addresses_are_permitted() -> None:
    WebhookTargets((HOST,), permits_private=True).check(f"http://{HOST}/")


@pytest.mark.parametrize(
    ("hosts", "has_secret", "variable"), [((), True, "UNFOG_WEBHOOK_HOSTS"), ((HOST,), False, "UNFOG_WEBHOOK_SECRET")]
)
def test_refusal_without_hosts_or_secret_names_the_setting(
    hosts: tuple[str, ...], has_secret: bool, variable: str
) -> None:
    with pytest.raises(FieldError, match=variable):
        WebhookTargets(hosts, permits_private=False, has_secret=has_secret).check(f"https://{HOST}/")


@pytest.mark.parametrize("url", ["https://127.0.0.1/", "https://[::1]:8443/", "https://10.0.0.1:8443/hook"])
def test_private_address_in_a_url_is_refused_unless_it_is_permitted(url: str) -> None:
    hosts = ("127.0.0.1", "[::1]", "10.0.0.1")
    WebhookTargets(hosts, permits_private=True).check(url)
    with pytest.raises(FieldError, match="UNFOG_WEBHOOK_PRIVATE"):
        WebhookTargets(hosts, permits_private=False).check(url)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_or_special_address_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


def test_name_servers_that_do_not_respond_delay_no_other_work_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()

    def getaddrinfo(*_: Any, **__: Any) -> Any:
        assert may_end.wait(TIMEOUT)
        raise OSError

    monkeypatch.setattr(module, "getaddrinfo", getaddrinfo)

    async def main() -> None:
        lookups = [asyncio.create_task(module.resolve_host("example.com", 443)) for _ in range(100)]
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(TIMEOUT / 2):
                assert await asyncio.to_thread(lambda: 1) == 1
        finally:
            may_end.set()
            await asyncio.gather(*lookups, return_exceptions=True)

    asyncio.run(main())
