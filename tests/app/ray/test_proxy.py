"""Tests the middleware of Ray's proxies, as Ray applies it, with applications that behave like the replicas."""

import asyncio
import json
import warnings
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any

import pytest
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.middleware.unread_body import UnreadBody
from app.errors import UnfogError
from app.ray import proxy
from app.ray.proxy import LostReplicas

pytestmark = pytest.mark.skipif(not find_spec("ray"), reason="needs the extra ray")
Answer = Callable[[Scope, Receive, Send], Awaitable[None]]
SEEDED = json.dumps({"digit": 7, "seed": 1}).encode()


class FakeProxy:
    """Answers the n-th attempt with the n-th of `answers`, like Ray's proxy. Keeps the headers and bodies."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await self._answers.pop(0)(scope, receive, send)


async def dies(scope: Scope, receive: Receive, send: Send) -> None:
    """What the proxy does if the replica dies: nothing."""


async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
    """A stream of a replica that dies."""
    headers = [(b"content-type", b"text/event-stream"), (b"x-request-id", b"of-replica")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"event: accepted\n\n", "more_body": True})


async def succeeds(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(b"digits", headers={"x-request-id": "of-replica"})(scope, receive, send)


def answers_itself(status: int) -> Answer:
    """Returns an answer of the proxy, which has no id of the service."""
    return PlainTextResponse("text of Ray", status)


def behind_middleware(app: ASGIApp) -> ASGIApp:
    """Returns the application with the middleware, which Ray itself adds, as in its proxies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's code
        from ray.serve._private.http_util import _apply_middlewares
    return _apply_middlewares(app, proxy.middleware())


async def request(
    app: ASGIApp, body: bytes = b"", method: str = "POST", path: str = "/generate", **headers: str
) -> tuple[int, dict[str, str], bytes, list[Message]]:
    """Sends a request in two pieces. Returns status, headers and body of the response, and all messages."""
    middle = len(body) // 2
    pieces = [
        {"type": "http.request", "body": body[:middle], "more_body": True},
        {"type": "http.request", "body": body[middle:], "more_body": False},
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return pieces.pop(0) if pieces else await asyncio.get_running_loop().create_future()

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    await app(scope, receive, send)
    start = sent[0] if sent else {"status": 0, "headers": []}
    received = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], received, b"".join(message.get("body", b"") for message in sent[1:]), sent


def run(app: ASGIApp, *args: Any, **kwargs: Any) -> tuple[int, dict[str, str], bytes, list[Message]]:
    return asyncio.run(request(behind_middleware(app), *args, **kwargs))


def test_answer_of_a_replica_passes_with_its_own_id_only() -> None:
    status, headers, body, sent = run(FakeProxy(succeeds), SEEDED, x_request_id="mine")
    assert (status, headers["x-request-id"], body) == (200, "of-replica", b"digits")
    assert [name for name, _ in sent[0]["headers"]].count(b"x-request-id") == 1


def test_request_with_a_seed_is_sent_again_with_the_same_body_and_id() -> None:
    ray = FakeProxy(dies, dies, succeeds)
    status, _, body, _ = run(ray, SEEDED)
    assert (status, body) == (200, b"digits")
    assert ray.bodies == [SEEDED] * 3
    assert len({headers["x-request-id"] for headers in ray.headers}) == 1


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (b"", {"method": "GET", "path": "/v1/models"}),
        (b"", {"method": "GET", "path": "/v1/batches/batch_1"}),
        (b"{}", {"idempotency_key": "order-1"}),
        (b'{"inputs": [{"name": "digit"}, {"name": "seed", "data": [3]}]}', {"path": "/v2/models/default/infer"}),
        (
            b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n3\r\n--x--\r\n',
            {"content_type": "multipart/form-data; boundary=x", "path": "/denoise"},
        ),
    ],
)
def test_request_whose_result_is_fixed_is_sent_again(body: bytes, options: dict[str, str]) -> None:
    assert run(FakeProxy(dies, succeeds), body, **options)[0] == 200


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (b'{"digit": 7}', {}),
        (b'{"digit": 7, "prompt": "seed"}', {}),
        (b'{"digit": 7, "seed": null}', {}),
        (b'["seed"]', {}),
        (b'{"inputs": [{"name": "digit"}, "seed"]}', {}),
        (b"[" * 10_000, {}),
        (b"\xff", {}),
        (SEEDED, {"path": "/v1/batches"}),
        (b"{}", {"path": "/v1/files", "idempotency_key": "order-1"}),
        (b"--x--\r\n", {"content_type": "multipart/form-data; boundary=x"}),
        (b"", {"method": "DELETE", "path": "/v1/models"}),
        (SEEDED + b" " * proxy.MOST_REPEATED_BYTES, {}),
    ],
)
def test_other_request_is_answered_with_replica_lost(body: bytes, options: dict[str, str]) -> None:
    ray = FakeProxy(dies, succeeds)
    status, headers, content, _ = run(ray, body, **options)
    assert (status, headers["retry-after"]) == (502, "1")
    assert b"The replica that worked on this request has stopped" in content
    assert len(ray.bodies) == 1


def test_request_is_sent_at_most_three_times() -> None:
    ray = FakeProxy(*[dies] * 9)
    status, headers, body, _ = run(ray, SEEDED, x_request_id="mine")
    problem = json.loads(body)
    assert (status, problem["code"], problem["request_id"]) == (502, "replica_lost", "mine")
    assert headers["x-request-id"] == "mine"
    assert len(ray.bodies) == proxy.MOST_ATTEMPTS


def test_error_has_the_format_of_the_protocol() -> None:
    _, _, body, _ = run(FakeProxy(dies), b'{"prompt": "7"}', path="/v1/images/generations")
    assert json.loads(body)["error"]["code"] == "replica_lost"


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
def test_stream_that_breaks_ends_with_an_error_event(path: str) -> None:
    ray = FakeProxy(breaks, succeeds)
    status, _, body, sent = run(ray, SEEDED, path=path)
    events = body.decode().split("\n\n")
    assert (status, events[0], events[2:]) == (200, "event: accepted", [""])
    name, data = events[1].split("\n")
    assert (name, "replica_lost" in data) == ("event: error", True)
    assert not sent[-1].get("more_body")
    assert len(ray.bodies) == 1, "the client would get the first events twice"


def test_other_response_that_breaks_stays_incomplete() -> None:
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"100"), (b"x-request-id", b"of-replica")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    _, _, body, sent = run(FakeProxy(half), SEEDED)
    assert body == b"half"
    assert sent[-1]["more_body"]


@pytest.mark.parametrize(
    ("of_ray", "status", "code"),
    [(429, 429, "overloaded"), (503, 503, "no_replica"), (404, 503, "no_replica"), (408, 504, "deadline_exceeded")],
)
def test_answer_of_the_proxy_becomes_a_problem_document(of_ray: int, status: int, code: str) -> None:
    got, headers, body, _ = run(FakeProxy(answers_itself(of_ray)), SEEDED)
    assert (got, json.loads(body)["code"]) == (status, code)
    assert headers["content-type"] == "application/problem+json"
    assert status == 504 or int(headers["retry-after"]) == 5


def test_paths_of_the_proxy_are_not_changed() -> None:
    status, _, body, _ = run(FakeProxy(answers_itself(503)), method="GET", path="/-/healthz")
    assert (status, body) == (503, b"text of Ray")


def test_headers_that_change_the_proxy_are_removed() -> None:
    ray = FakeProxy(succeeds)
    run(ray, SEEDED, x_request_disconnect_disabled="?1", x_request_timeout_seconds="1", accept="image/png")
    (headers,) = ray.headers
    assert set(headers) == {"accept", "x-request-id"}


@pytest.mark.parametrize("given", ["not valid", "x" * 129, ""])
def test_invalid_request_id_is_replaced(given: str) -> None:
    ray = FakeProxy(succeeds)
    run(ray, SEEDED, x_request_id=given)
    assert len(ray.headers[0]["x-request-id"]) == 32


def test_body_beyond_the_limit_is_413_and_is_not_sent_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "MOST_BYTES", 10)
    ray = FakeProxy(dies, succeeds)
    status, _, body, _ = run(ray, SEEDED, content_length=str(len(SEEDED)))
    assert (status, json.loads(body)["code"]) == (413, "body_too_large")
    assert len(ray.bodies) == 1
    assert len(ray.bodies[0]) <= 10
    monkeypatch.setattr(proxy, "MOST_FILE_BYTES", len(SEEDED))
    assert run(FakeProxy(succeeds), SEEDED, path="/v1/files")[0] == 200


def test_bodies_that_are_too_long_together_are_429_until_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "MOST_BYTES_OF_ALL", 2 * len(SEEDED))

    async def main() -> list[tuple[int, dict[str, str], bytes, list[Message]]]:
        end = asyncio.Event()

        async def waits(scope: Scope, receive: Receive, send: Send) -> None:
            await end.wait()
            await succeeds(scope, receive, send)

        app = behind_middleware(FakeProxy(waits, waits, dies, succeeds, succeeds))
        first = [asyncio.create_task(request(app, SEEDED)) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await request(app, SEEDED)
        without_body = await request(app)
        end.set()
        return [refused, without_body, *await asyncio.gather(*first), await request(app, SEEDED)]

    answers = asyncio.run(main())
    assert [answer[0] for answer in answers] == [429, 200, 200, 200, 200]
    _, headers, body, _ = answers[0]
    assert (json.loads(body)["code"], headers["retry-after"]) == ("overloaded", "5")


def test_answer_before_the_end_of_the_body_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica refuses the request and reads on, so that the client does not lose the answer."""
    monkeypatch.setattr(proxy, "MOST_BYTES", 20)
    read = []

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"x-request-id", b"of-replica")]
        await send({"type": "http.response.start", "status": 415, "headers": headers})
        await send({"type": "http.response.body", "body": b"no", "more_body": True})
        while (message := await receive())["more_body"]:
            read.append(message["body"])
        read.append(message["body"])
        await send({"type": "http.response.body", "body": b"pe"})

    status, headers, body, _ = run(refuse, SEEDED, content_length=str(len(SEEDED)))
    assert (status, headers["connection"], body) == (415, "close", b"nope")
    assert read == [SEEDED[: len(SEEDED) // 2], b""]


def test_ray_reads_no_more_of_a_body_whose_end_the_replica_does_not_need() -> None:
    """Ray's proxy reads in a task of its own, which it cancels after the answer, also beyond the end of the body."""
    num_read = 0

    async def endless() -> Message:
        nonlocal num_read
        num_read += 1
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"1234", "more_body": True}

    async def too_late(error: UnfogError) -> bool:
        return False

    async def main() -> list[Message]:
        body = proxy._Body(endless, 5, proxy._Bodies(), too_late)
        messages = [await body.receive(), await body.receive()]
        further = asyncio.create_task(body.receive())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not further.done()
        further.cancel()
        return messages

    assert [message["more_body"] for message in asyncio.run(main())] == [True, False]
    assert num_read == 2


def test_client_receives_the_413_before_the_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "MOST_BYTES", 5)
    pieces: list[Message] = [{"type": "http.request", "body": b"12345678", "more_body": True}] * 3
    pieces.append({"type": "http.request", "body": b"9", "more_body": False})
    sent: list[Message] = []
    unread_at_the_end = []

    async def receive() -> Message:
        return pieces.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            unread_at_the_end.append(len(pieces))

    app = behind_middleware(FakeProxy(dies))
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [(b"transfer-encoding", b"chunked")]}
    asyncio.run(app(scope, receive, send))
    assert (sent[0]["status"], dict(sent[0]["headers"])[b"connection"]) == (413, b"close")
    assert unread_at_the_end == [0]


def test_client_that_leaves_is_neither_answered_nor_repeated() -> None:
    ray = FakeProxy(dies, succeeds)

    async def leave() -> list[Message]:
        messages = [{"type": "http.request", "body": SEEDED, "more_body": True}, {"type": "http.disconnect"}]
        sent: list[Message] = []

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        await LostReplicas(ray)({"type": "http", "method": "POST", "path": "/generate", "headers": []}, receive, send)
        return sent

    assert asyncio.run(leave()) == []
    assert len(ray.bodies) == 1


def test_other_protocols_pass() -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def never() -> Message:
        raise AssertionError

    async def ignore(message: Message) -> None:
        raise AssertionError

    asyncio.run(LostReplicas(app)({"type": "lifespan"}, never, ignore))
    assert seen == ["lifespan"]


def test_ray_loads_the_middleware() -> None:
    assert [each.cls for each in proxy.middleware()] == [LostReplicas, UnreadBody]
