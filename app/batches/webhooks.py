"""Webhooks: events about the end of a batch, which the service sends to the URL that the batch names.

The transaction that ends a batch stores the event in a table. A sender takes it from there, and deletes it after it was
delivered. An event is therefore sent at least once, also if the process is killed meanwhile. Each attempt has the same
id, by which the receiver recognises an event that it has already handled. Form, signature and the times of the attempts
are those of Standard Webhooks (https://www.standardwebhooks.com).

A caller chooses the URL, so a request must not reach what only this machine can reach. The operator lists the permitted
hosts. The name is resolved once for each attempt, all of its addresses must be public, and the connection is made to
one of these addresses. No redirect is followed.
"""

import asyncio
import base64
import hmac
import json
import logging
import random
import re
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, IPv6Network, ip_address
from socket import SOCK_STREAM, getaddrinfo
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import h11
import sqlalchemy as sa
from sqlalchemy.engine import Row

from app.batches.database import RETRY_SECONDS, Database
from app.batches.tables import webhooks
from app.errors import FieldError, StorageFull, StorageUnavailable

log = logging.getLogger(__name__)

FIELD = "webhook_url"
MAX_URL = 2048  # characters
LIMIT_SECONDS = 10.0  # for an attempt, from the resolution of the name to the head of the answer
MAX_HEAD_BYTES = 16 * 1024  # of the answer
MOST_TOGETHER = 8  # attempts at the same time
CLAIM_SECONDS = 30.0  # for this long, no other sender takes an event that a sender has claimed
MOST_SECONDS = 60.0  # between two searches for events of other processes
# Seconds from an attempt that has failed to the next one. After these, the event is dropped.
DELAYS = (5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
JITTER = 0.1  # a delay is longer or shorter by at most this fraction
SECRET_PREFIX = "whsec_"

_LOOKUPS = ThreadPoolExecutor(MOST_TOGETHER, thread_name_prefix="webhook-lookup")
_VISIBLE = re.compile(r"[!-~]+")  # ASCII without spaces and control characters
_NAME = re.compile(r"(?=.{1,253}$)[0-9a-z_-]{1,63}(\.[0-9a-z_-]{1,63})*")
_ENTRY = re.compile(r"(.+?)(?::([0-9]+))?")
# The only IPv6 addresses of the Internet are those in 2000::/3. Of these, Teredo and 6to4 contain an IPv4 address, and
# are obsolete. The addresses of NAT64 stand for the IPv4 address in their last four bytes.
_GLOBAL_UNICAST, _NAT64 = IPv6Network("2000::/3"), IPv6Network("64:ff9b::/96")
_OBSOLETE = (IPv6Network("2001::/32"), IPv6Network("2002::/16"))


class DeliveryError(Exception):
    """An event was not delivered. The message says why."""


class Target(NamedTuple):
    """Where a request is sent. `authority` is the value of the Host header."""

    host: str  # in lower case; an IPv6 address has no brackets
    port: int
    has_tls: bool
    authority: str
    path: str  # with the query


async def resolve_host(host: str, port: int) -> list[str]:
    """Returns the addresses of a host, the best one first. Raises OSError if there are none.

    A name server that does not respond occupies a thread until the system gives up, so the lookups have their own.
    """
    lookup = partial(getaddrinfo, host, port, type=SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_LOOKUPS, lookup)
    return [str(address[0]) for *_, address in found]


def is_public(address: str) -> bool:
    """Returns True if the address belongs to the Internet, and not to this machine, its network or a special use."""
    found = ip_address(address)
    if found.version == 6:
        if found in _NAT64:
            return is_public(str(IPv4Address(found.packed[12:])))
        if found not in _GLOBAL_UNICAST or any(found in network for network in _OBSOLETE):
            return False
    return found.is_global and not found.is_multicast


class WebhookTargets:
    """Decides to which URLs and addresses events may be sent."""

    def __init__(
        self,
        hosts: Sequence[str],
        permits_private: bool,
        has_secret: bool = True,
        resolve: Callable[[str, int], Awaitable[Sequence[str]]] = resolve_host,
    ) -> None:
        """`hosts` has entries such as `example.com`, `*.example.com` and `example.com:8443`, in lower case.

        An entry without a port permits every port. Without a secret, no URL is permitted.
        """
        self._permits_private, self._has_secret, self._resolve = permits_private, has_secret, resolve
        matches = [_ENTRY.fullmatch(entry.lower()) for entry in hosts]
        self._entries = [(match[1].strip("[]"), int(match[2]) if match[2] else None) for match in matches if match]

    def check(self, url: str) -> None:
        """Raises FieldError if events must not be sent to the URL."""
        self.target_of(url)

    def target_of(self, url: str) -> Target:
        """Returns where a request to the URL is sent. Raises FieldError if events must not be sent to it."""
        if not self._entries:
            raise FieldError(FIELD, "Webhooks are off. The operator permits their hosts with UNFOG_WEBHOOK_HOSTS")
        if not self._has_secret:
            raise FieldError(FIELD, "Webhooks are off. The operator sets the secret with UNFOG_WEBHOOK_SECRET")
        target = _parse(url)
        if not target.has_tls and not self._permits_private:
            raise FieldError(FIELD, "The URL should begin with https://, unless UNFOG_WEBHOOK_PRIVATE is on")
        with suppress(ValueError):  # It is a name, whose addresses are checked before each attempt.
            if not self._permits_private and not is_public(target.host):
                raise FieldError(FIELD, "The address is not public. The operator permits it with UNFOG_WEBHOOK_PRIVATE")
        if not any(_matches(name, target.host) and port in (None, target.port) for name, port in self._entries):
            raise FieldError(FIELD, f"The host {target.authority} is not one of those in UNFOG_WEBHOOK_HOSTS")
        return target

    async def addresses(self, target: Target) -> Sequence[str]:
        """Resolves the host. Raises DeliveryError if it has no address, or one that is not permitted."""
        found = await self._resolve(target.host, target.port)
        if not found:
            raise DeliveryError("the host has no address")
        if not self._permits_private and not all(is_public(address) for address in found):
            raise DeliveryError("the host has an address that is not public")
        return found


def _matches(entry: str, host: str) -> bool:
    return host.endswith(entry[1:]) if entry.startswith("*.") else host == entry


def _parse(url: str) -> Target:
    """Splits a URL. Raises FieldError if it is not valid, or has a part that a webhook must not have."""
    if len(url) > MAX_URL:
        raise FieldError(FIELD, f"The URL should have at most {MAX_URL} characters")
    if not _VISIBLE.fullmatch(url):
        raise FieldError(FIELD, "The URL should be ASCII without spaces. Write other characters as %20 or xn--")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise FieldError(FIELD, f"The URL is not valid: {error}") from None
    if parts.scheme not in ("https", "http") or port == 0 or not _is_host(host):
        raise FieldError(FIELD, "The URL should have the form https://HOST/PATH or https://HOST:PORT/PATH")
    if "@" in parts.netloc or "#" in url:
        raise FieldError(FIELD, "The URL should have no user name, no password and no fragment (#)")
    return Target(host, port or (443 if parts.scheme == "https" else 80), parts.scheme == "https", *_request(parts))


def _request(parts: SplitResult) -> tuple[str, str]:
    """Returns the Host header and the path with the query."""
    path = parts.path or "/"
    return parts.netloc.lower(), f"{path}?{parts.query}" if parts.query else path


def _is_host(host: str) -> bool:
    if _NAME.fullmatch(host):
        return True
    with suppress(ValueError):
        return ip_address(host).version == 6 and "%" not in host
    return False


def event_row(batch_id: str, kind: str, url: str, now: float) -> dict[str, Any]:
    """Returns a row of the table `webhooks`: an event about a batch, for example `batch.completed`, which is due."""
    event = {
        "id": f"evt_{secrets.token_hex(12)}",
        "object": "event",
        "type": kind,
        "created_at": int(now),
        "data": {"id": batch_id},
    }
    return {
        "id": f"wh_{secrets.token_hex(12)}",
        "url": url,
        "event": kind,
        "batch_id": batch_id,
        "body": json.dumps(event).encode(),
        "attempts": 0,
        "next_at": now,
        "claimed_by": None,
        "claimed_until": 0.0,
    }


def signature(secret: str, webhook_id: str, timestamp: int, body: bytes) -> str:
    """Returns the value of the header webhook-signature. The secret is `whsec_` and the key in base64."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    digest = hmac.digest(key, b"%s.%d.%s" % (webhook_id.encode(), timestamp, body), "sha256")
    return f"v1,{base64.b64encode(digest).decode()}"


class WebhookSender:
    """Sends the events in the database. Only the event loop may use it."""

    def __init__(
        self, database: Database, targets: WebhookTargets, secret: str | None, tls: ssl.SSLContext | None = None
    ) -> None:
        """Without a secret, nothing is sent. `tls` replaces the certificate authorities of the system."""
        self._database, self._targets, self._secret, self._tls = database, targets, secret, tls
        self._is_woken = asyncio.Event()
        self._has_storage = True

    def wake(self) -> None:
        """Makes the sender look for events now."""
        self._is_woken.set()

    async def run(self) -> None:
        """Sends events until it is cancelled. An event that was not delivered then stays in the database."""
        if self._secret is None:
            return
        if self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)  # reads files
        client = _Client(self._targets, self._secret, self._tls)
        while True:
            try:
                await self._send_due(client)
                self._has_storage = True
            except (StorageUnavailable, StorageFull) as error:
                if self._has_storage:
                    log.warning("Webhooks wait for the database", extra={"error": error.detail})
                self._has_storage = False
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:  # A bug must not end the loop.
                log.exception("Error in the sender of webhooks, which continues")
                await asyncio.sleep(RETRY_SECONDS)

    async def _send_due(self, client: "_Client") -> None:
        """Sends events that are due, or waits until there can be some."""
        self._is_woken.clear()
        rows, seconds = list[Row[Any]](), MOST_SECONDS
        if self._database.exists:
            rows, seconds = await self._database.run(self._take)
        if rows:
            delivered = await asyncio.gather(*(client.deliver(row) for row in rows))
            await self._database.run(self._store, rows, delivered)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_woken.wait()

    def _take(self) -> tuple[list[Row[Any]], float]:
        """Claims events that are due. Returns them, and the seconds until other events can be due."""
        now, table = time.time(), webhooks.c
        free_at = sa.case((table.claimed_until > table.next_at, table.claimed_until), else_=table.next_at)
        due = sa.select(webhooks).where(table.next_at <= now, table.claimed_until <= now).order_by(table.next_at)
        with self._database.write() as connection:
            rows = list(connection.execute(due.limit(MOST_TOGETHER).with_for_update(skip_locked=True)))
            claim = webhooks.update().where(table.id.in_([row.id for row in rows]))
            connection.execute(claim.values(claimed_by=self._database.worker, claimed_until=now + CLAIM_SECONDS))
            next_at = connection.scalar(sa.select(sa.func.min(free_at)))
        return rows, MOST_SECONDS if next_at is None else min(max(next_at - now, 0.0), MOST_SECONDS)

    def _store(self, rows: Sequence[Row[Any]], delivered: Sequence[bool]) -> None:
        """Deletes events that were delivered or have failed too often. Sets the time of the next attempt of others."""
        now = time.time()
        dropped = list[Row[Any]]()
        with self._database.write() as connection:
            for row, is_delivered in zip(rows, delivered, strict=True):
                of_row = webhooks.c.id == row.id
                if is_delivered:
                    connection.execute(webhooks.delete().where(of_row))
                    continue
                own = (of_row, webhooks.c.claimed_by == self._database.worker)  # The claim may have expired.
                if row.attempts < len(DELAYS):
                    delay = DELAYS[row.attempts] * random.uniform(1 - JITTER, 1 + JITTER)
                    values = {"attempts": row.attempts + 1, "next_at": now + delay}
                    free = {"claimed_by": None, "claimed_until": 0.0}
                    connection.execute(webhooks.update().where(*own).values(values | free))
                elif connection.execute(webhooks.delete().where(*own)).rowcount:
                    dropped.append(row)
        for row in dropped:
            log.warning("Dropped a webhook after the last attempt", extra=_fields(row))


class _Client:
    """Sends one event with one request."""

    def __init__(self, targets: WebhookTargets, secret: str, tls: ssl.SSLContext) -> None:
        self._targets, self._secret, self._tls = targets, secret, tls

    async def deliver(self, row: Row[Any]) -> bool:
        """Sends an event. Returns True if the receiver has answered with a status from 200 to 299."""
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                status = await self._post(self._targets.target_of(row.url), row)
        except TimeoutError:
            reason = f"no answer within {LIMIT_SECONDS:g} s"
        except (OSError, h11.RemoteProtocolError, DeliveryError, FieldError) as error:
            reason = str(error)
        except Exception:  # A bug must not stop the other events.
            log.exception("A webhook was not sent", extra=_fields(row))
            return False
        else:
            if 200 <= status < 300:
                return True
            reason = f"status {status}"
        log.info("A webhook was not delivered", extra={**_fields(row), "reason": reason})
        return False

    async def _post(self, target: Target, row: Row[Any]) -> int:
        """Returns the status of the answer, whose body is not read."""
        now = int(time.time())
        headers = {
            "Host": target.authority,
            "User-Agent": "unfog",
            "Content-Type": "application/json",
            "Content-Length": str(len(row.body)),
            "Connection": "close",
            "webhook-id": row.id,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(self._secret, row.id, now, bytes(row.body)),
        }
        connection = h11.Connection(h11.CLIENT, MAX_HEAD_BYTES)
        request = h11.Request(method="POST", target=target.path, headers=list(headers.items()))
        reader, writer = await self._connect(target)
        try:
            for event in (request, h11.Data(data=bytes(row.body)), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            await writer.drain()
            return await _status_of(connection, reader)
        finally:
            writer.transport.abort()  # does not wait for the body, nor for the end of TLS

    async def _connect(self, target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connects to the first address that accepts. The addresses are used as they were checked."""
        tls: dict[str, Any] = {"ssl": self._tls, "server_hostname": target.host} if target.has_tls else {}
        refusal: OSError | None = None
        for address in await self._targets.addresses(target):
            try:
                return await asyncio.open_connection(address, target.port, limit=MAX_HEAD_BYTES, **tls)
            except OSError as error:
                refusal = error
        raise refusal or DeliveryError("the host has no address")


async def _status_of(connection: h11.Connection, reader: asyncio.StreamReader) -> int:
    """Reads the head of the answer. Raises DeliveryError if it is too long."""
    num_read = 0
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            return event.status_code
        if event is h11.NEED_DATA:
            if num_read >= MAX_HEAD_BYTES:
                raise DeliveryError(f"the head of the answer exceeds {MAX_HEAD_BYTES} bytes")
            received = await reader.read(MAX_HEAD_BYTES - num_read)
            num_read += len(received)
            connection.receive_data(received)


def _fields(row: Row[Any]) -> dict[str, Any]:
    """Returns fields of a log line. They contain no part of the URL except the host, because it can have a secret."""
    return {"host": urlsplit(row.url).hostname, "batch": row.batch_id, "event": row.event, "attempt": row.attempts + 1}
