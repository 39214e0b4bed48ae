"""Tests of webhooks with a local server. The client of OpenAI checks the signatures."""

import asyncio
import json
import shutil
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa

from app.batches import webhooks as module
from app.batches.database import Database
from app.batches.webhooks import DELAYS, JITTER, MAX_HEAD_BYTES, WebhookSender, WebhookTargets, signature
from tests.app.batches.receiver import (
    HOST,
    LOCAL,
    OK,
    SECRET,
    Request,
    Resolver,
    add,
    answer_with,
    has_attempts,
    is_empty,
    make_due,
    receiving,
    sending,
    targets,
    until,
)

USAGE = "keyUsage=critical,digitalSignature,keyCertSign"  # Python 3.13 requires it


def fails_once(database: Database, resolver: Resolver, url: str, *, permits_private: bool) -> sa.Row[Any]:
    """Runs a sender until the first attempt has failed, and returns the row."""

    async def main() -> sa.Row[Any]:
        add(database, url)
        async with sending(WebhookSender(database, targets(resolver, permits_private), SECRET)):
            return (await until(database, has_attempts(1)))[0]

    return asyncio.run(main())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns the files of a certificate for HOST and of its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the program openssl")
    folder = tmp_path_factory.mktemp("certificate")
    names = ("-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}", "-addext", USAGE)
    files = ("-keyout", folder / "key.pem", "-out", folder / "cert.pem")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    subprocess.run([openssl, "req", "-x509", *key, "-days", "2", *names, *files], check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def server_tls(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def test_signature_is_that_of_the_example_of_standard_webhooks() -> None:
    found = signature(SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("kind", ["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"])
def test_delivered_event_is_signed_and_deleted(database: Database, kind: str) -> None:
    async def main() -> None:
        async with receiving() as receiver, sending(WebhookSender(database, targets(), SECRET)) as sender:
            (webhook_id,) = add(database, receiver.url(path="/hook?token=a"), kind=kind)
            sender.wake()
            await until(database, is_empty)
            (request,) = receiver.requests
            event = request.event()
            assert (event.type, event.object, event.data.id) == (kind, "event", "batch_0")
            assert event.id == json.loads(request.body)["id"]
            assert event.id.startswith("evt_")
            assert request.line == "POST /hook?token=a HTTP/1.1"
            assert request.headers["host"] == f"{HOST}:{receiver.port}"
            assert request.headers["content-type"] == "application/json"
            assert request.headers["webhook-id"] == webhook_id

    asyncio.run(main())


def test_wrong_secret_is_noticed_by_the_receiver(database: Database) -> None:
    async def main() -> None:
        other = "whsec_" + "A" * 32
        async with receiving() as receiver, sending(WebhookSender(database, targets(), other)) as sender:
            add(database, receiver.url())
            sender.wake()
            await until(database, is_empty)
            with pytest.raises(openai.InvalidWebhookSignatureError):
                receiver.requests[0].event()

    asyncio.run(main())


def test_failed_attempts_are_repeated_by_the_schedule_with_the_same_id(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> list[Request]:
        error = answer_with(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
        async with receiving(error) as receiver, sending(WebhookSender(database, targets(), SECRET)) as sender:
            add(database, receiver.url(path="/hidden"))
            for attempts, delay in enumerate((5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400), start=1):
                before = time.time()
                sender.wake()
                (row,) = await until(database, has_attempts(attempts))
                assert before + delay * (1 - JITTER) <= row.next_at <= time.time() + delay * (1 + JITTER)
                assert row.claimed_by is None
                make_due(database)
            sender.wake()
            await until(database, is_empty)
            return receiver.requests

    requests = asyncio.run(main())
    assert len(requests) == 1 + len(DELAYS)
    assert len({request.headers["webhook-id"] for request in requests}) == 1
    assert len({request.body for request in requests}) == 1
    assert all(request.event() for request in requests)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert (vars(record)["host"], vars(record)["batch"]) == (HOST, "batch_0")
    assert all("hidden" not in str(vars(each)) for each in caplog.records)


def test_event_of_a_later_attempt_is_delivered(database: Database) -> None:
    answers = [b"HTTP/1.1 503 Service Unavailable\r\n\r\n", b"", OK]

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(answers.pop(0))

    async def main() -> None:
        async with receiving(answer) as receiver, sending(WebhookSender(database, targets(), SECRET)) as sender:
            add(database, receiver.url())
            for attempts in (1, 2):
                sender.wake()
                await until(database, has_attempts(attempts))
                make_due(database)
            sender.wake()
            await until(database, is_empty)
            assert len(receiver.requests) == 3

    asyncio.run(main())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_a_failure_and_not_followed(database: Database, status: int) -> None:
    async def main() -> None:
        async with receiving() as other:
            head = f"HTTP/1.1 {status} Moved\r\nLocation: {other.url()}\r\nContent-Length: 0\r\n\r\n"
            async with receiving(answer_with(head.encode())) as receiver:
                add(database, receiver.url())
                async with sending(WebhookSender(database, targets(), SECRET)):
                    await until(database, has_attempts(1))
                assert (len(receiver.requests), len(other.requests)) == (1, 0)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", ""),
        (b"SSH-2.0-OpenSSH_9.2\r\n", ""),
        (b"HTTP/1.1 200 OK\r\nA: " + b"a" * 10 * MAX_HEAD_BYTES, "exceeds 16384 bytes"),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * MAX_HEAD_BYTES, f"exceeds {MAX_HEAD_BYTES} bytes"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", ""),
    ],
    ids=["nothing", "another protocol", "long header", "many hints", "upgrade"],
)
def test_answer_that_is_not_valid_is_a_failure(
    database: Database, caplog: pytest.LogCaptureFixture, answer: bytes, reason: str
) -> None:
    caplog.set_level("INFO")

    async def main() -> None:
        async with receiving(answer_with(answer)) as receiver:
            add(database, receiver.url())
            async with sending(WebhookSender(database, targets(), SECRET)):
                await until(database, has_attempts(1))
                assert len(receiver.requests) == 1

    asyncio.run(main())
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert reason in vars(caplog.records[0])["reason"]  # the other reasons are those of h11


def test_hints_before_the_answer_are_skipped(database: Database) -> None:
    async def main() -> None:
        async with receiving(answer_with(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", OK)) as receiver:
            add(database, receiver.url())
            async with sending(WebhookSender(database, targets(), SECRET)):
                await until(database, is_empty)

    asyncio.run(main())


def test_endless_body_is_not_read(database: Database) -> None:
    async def main() -> None:
        refused = asyncio.Event()

        async def endless(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            try:
                while True:
                    writer.write(b"a" * 65536)
                    await writer.drain()
            except ConnectionError:
                refused.set()

        async with receiving(endless) as receiver:
            add(database, receiver.url())
            async with sending(WebhookSender(database, targets(), SECRET)):
                await until(database, is_empty)
                await refused.wait()

    asyncio.run(main())


@pytest.mark.parametrize("is_started", [False, True])
def test_slow_answer_is_cut_and_repeated(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_started: bool
) -> None:
    monkeypatch.setattr(module, "LIMIT_SECONDS", 0.5)
    caplog.set_level("INFO")

    async def main() -> None:
        async def slow(writer: asyncio.StreamWriter) -> None:
            if is_started:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-")
            await asyncio.Event().wait()

        async with receiving(slow) as receiver:
            add(database, receiver.url())
            async with sending(WebhookSender(database, targets(), SECRET)):
                await until(database, has_attempts(1))

    asyncio.run(main())
    assert [vars(record)["reason"] for record in caplog.records] == ["no answer within 0.5 s"]


@pytest.mark.parametrize("resolved", [[LOCAL], ["8.8.8.8", LOCAL], ["::ffff:127.0.0.1"]])
def test_no_request_is_sent_if_an_address_is_private(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, resolved: list[str]
) -> None:
    caplog.set_level("INFO")

    async def connect(*arguments: Any, **options: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(asyncio, "open_connection", connect)
    fails_once(database, Resolver(resolved), f"https://{HOST}/", permits_private=False)
    assert [vars(record)["reason"] for record in caplog.records] == ["the host has an address that is not public"]


def test_host_that_is_not_permitted_any_more_gets_no_request(database: Database) -> None:
    resolver = Resolver([LOCAL])
    row = fails_once(database, resolver, "https://removed.example.com/", permits_private=True)
    assert (row.attempts, resolver.calls) == (1, [])


def test_host_that_cannot_be_resolved_is_tried_again(database: Database) -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise OSError(-2, "Name or service not known")

    async def main() -> None:
        add(database, f"https://{HOST}/")
        sender = WebhookSender(database, WebhookTargets([HOST], permits_private=False, resolve=unknown), SECRET)
        async with sending(sender):
            await until(database, has_attempts(1))

    asyncio.run(main())


def test_connection_uses_the_address_that_was_checked(
    database: Database, monkeypatch: pytest.MonkeyPatch, server_tls: ssl.SSLContext, certificate: tuple[Path, Path]
) -> None:
    connected, open_connection = list[str](), asyncio.open_connection

    async def connect(host: str, port: int, **options: Any) -> Any:
        connected.append(host)
        return await open_connection(LOCAL, port, **options)

    monkeypatch.setattr(asyncio, "open_connection", connect)
    resolver = Resolver(["8.8.8.8"], [LOCAL])

    async def main() -> None:
        async with receiving(tls=server_tls) as receiver:
            add(database, receiver.url("https"))
            tls = ssl.create_default_context(cafile=str(certificate[0]))
            async with sending(WebhookSender(database, targets(resolver, permits_private=False), SECRET, tls)):
                await until(database, is_empty)
            assert (connected, resolver.calls) == (["8.8.8.8"], [(HOST, receiver.port)])
            assert receiver.requests[0].event().data.id == "batch_0"

    asyncio.run(main())


def test_second_address_is_used_if_the_first_refuses(database: Database) -> None:
    async def main() -> None:
        async with receiving() as receiver:  # listens at one address only
            add(database, receiver.url())
            async with sending(WebhookSender(database, targets(Resolver(["127.0.0.2", LOCAL])), SECRET)):
                await until(database, is_empty)

    asyncio.run(main())


@pytest.mark.parametrize(("host", "is_trusted"), [(HOST, False), ("other.example.com", True)])
def test_certificate_that_is_not_valid_is_a_failure(
    database: Database,
    server_tls: ssl.SSLContext,
    certificate: tuple[Path, Path],
    caplog: pytest.LogCaptureFixture,
    host: str,
    is_trusted: bool,
) -> None:
    caplog.set_level("INFO")

    async def main() -> None:
        async with receiving(tls=server_tls) as receiver:
            add(database, receiver.url("https", host=host))
            hosts = WebhookTargets([host], permits_private=True, resolve=Resolver([LOCAL]))
            tls = ssl.create_default_context(cafile=str(certificate[0]) if is_trusted else None)
            async with sending(WebhookSender(database, hosts, SECRET, tls)):
                await until(database, has_attempts(1))
            assert receiver.requests == []

    asyncio.run(main())
    reasons = [vars(record)["reason"] for record in caplog.records if hasattr(record, "reason")]
    assert ["certificate verify failed" in reason for reason in reasons] == [True]


def test_failure_of_one_event_does_not_stop_the_others(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target_of = WebhookTargets.target_of

    def fail(self: WebhookTargets, url: str) -> Any:
        if url.endswith("/bug"):
            raise KeyError("bug")
        return target_of(self, url)

    monkeypatch.setattr(WebhookTargets, "target_of", fail)

    async def main() -> None:
        async with receiving() as receiver:
            add(database, receiver.url(path="/bug"))
            add(database, receiver.url(), 3)
            async with sending(WebhookSender(database, targets(), SECRET)):
                (row,) = await until(database, lambda rows: len(rows) == 1 and rows[0].attempts == 1)
            assert row.url.endswith("/bug")
            assert len(receiver.requests) == 3

    asyncio.run(main())
    assert [record.levelname for record in caplog.records] == ["ERROR"]
