import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from app import errors
from app.api.http.media_types import EVENTS, FORMATS, GIF, JSON, PNG, WEBP, ZIP
from app.api.http.negotiation import negotiate
from app.api.http.requests import MAX_UNKNOWN_FIELDS, ClientGoneError, cancel_on_disconnect, parse_json, read_json
from app.api.native.generate import GenerateRequest

LIMIT, READ_SECONDS = 1000, 60.0


class Body:
    """A request body in chunks. `taken` is the number of chunks that were received."""

    def __init__(self, *chunks: bytes) -> None:
        self.taken = 0
        last = len(chunks) - 1
        self._messages: Iterator[Message] = iter(
            [{"type": "http.request", "body": chunk, "more_body": i < last} for i, chunk in enumerate(chunks)]
        )

    async def receive(self) -> Message:
        self.taken += 1
        return next(self._messages, {"type": "http.disconnect"})


def request(body: Body | None = None, **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": raw}
    return Request(scope, (body or Body(b"")).receive)


async def silence() -> Message:
    """Receives nothing: the client stays connected and sends no data."""
    message: Message = await asyncio.get_running_loop().create_future()
    return message


def read(*chunks: bytes, content_type: str = JSON) -> GenerateRequest:
    return asyncio.run(
        read_json(request(Body(*chunks), content_type=content_type), GenerateRequest, LIMIT, READ_SECONDS)
    )


def errors_of(body: str | bytes) -> list[dict[str, Any]]:
    """Returns the errors of a body that is invalid."""
    with pytest.raises(errors.InvalidRequest) as invalid:
        read(body if isinstance(body, bytes) else body.encode())
    json.dumps(invalid.value.problem("id")).encode()  # the errors can be encoded as UTF-8
    return invalid.value.errors


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("application/json", JSON),
        ("*/*", JSON),
        ("", JSON),
        (" ", JSON),
        ("image/png", PNG),
        ("IMAGE/PNG", PNG),
        ("image/*", PNG),
        ("application/*", JSON),
        ("application/zip", ZIP),
        ("text/event-stream", EVENTS),
        ("text/*", EVENTS),
        ("image/png, application/json", JSON),  # if q values are equal, the first available type is chosen
        ("image/png, */*;q=0.1", PNG),
        ("application/json;q=0.5, image/png", PNG),
        ("application/json;q=0.5, image/png;q=0.4", JSON),
        ("application/zip;q=0.9, image/*;q=0.8, */*;q=0.1", ZIP),
        ("application/json;q=0, */*", PNG),
        ("image/gif", GIF),
        ("image/webp", WEBP),
        ("image/gif, image/webp, image/png", PNG),
        ("image/gif, image/webp", WEBP),
        ("image/webp;q=0.8, image/gif;q=0.9, */*;q=0.1", GIF),
        ("image/webp, */*;q=0.8", WEBP),
        ("image/png;q=0, image/*", WEBP),
        # the default headers of browsers and of Java's HttpURLConnection name animations
        ("text/html, application/xhtml+xml, application/xml;q=0.9, image/avif, image/webp, */*;q=0.8", JSON),
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", JSON),
        ("text/html, image/gif, image/jpeg, */*; q=0.2", JSON),
        ("text/html;q=0.1, image/gif, image/png;q=0.5", PNG),
        ("image/png;q=1.0,text/html", PNG),
        # but such a header selects an animation if it allows no other format
        ("text/html, image/webp", WEBP),
        ("text/html;q=0, image/webp", WEBP),
        ("text/html, image/webp;q=0.1, image/gif", GIF),
        ("text/html, image/webp, image/png;q=0.1", PNG),
    ],
)
def test_accept_header_selects_the_format(accept: str, chosen: str) -> None:
    assert negotiate(request(accept=accept), FORMATS) == chosen


def test_format_without_accept_header_is_json() -> None:
    assert negotiate(request(), FORMATS) == JSON


def test_several_accept_headers_are_combined() -> None:
    several = request()
    several.scope["headers"] = [(b"accept", b"text/html"), (b"accept", b"image/png")]
    assert negotiate(several, FORMATS) == PNG


@pytest.mark.parametrize(
    "accept",
    [
        "text/html",
        "image/jpeg",
        "image/png;q=0",
        "*/*;q=0",
        "nonsense",
        "a/b/c",
        ";",
        "text/html, video/*",
        "text/html, image/gif;q=0",
    ],
)
def test_accept_header_that_allows_no_format_is_not_acceptable(accept: str) -> None:
    with pytest.raises(errors.NotAcceptable) as refused:
        negotiate(request(accept=accept), FORMATS)
    assert all(media_type in refused.value.detail for media_type in FORMATS)


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON ; charset=utf-8"])
def test_valid_body_is_parsed(content_type: str) -> None:
    body = read(b'{"digit": 7.0, "count"', b': 3, "guidance_scale": 2}', content_type=content_type)
    assert (body.digit, body.count, body.guidance_scale) == (7, 3, 2)
    assert isinstance(body.digit, int)


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_body_with_another_content_type_is_not_read(content_type: str) -> None:
    body = Body(b'{"digit": 7}')
    with pytest.raises(errors.UnsupportedMediaType):
        asyncio.run(read_json(request(body, content_type=content_type), GenerateRequest, LIMIT, READ_SECONDS))
    assert body.taken == 0


def test_body_over_the_limit_is_rejected_before_it_is_read_completely() -> None:
    body = Body(*[b" " * 300] * 100)
    with pytest.raises(errors.BodyTooLarge):
        asyncio.run(read_json(request(body, content_type=JSON), GenerateRequest, LIMIT, READ_SECONDS))
    assert body.taken == 4


def test_body_of_exactly_the_limit_is_accepted() -> None:
    assert read(b'{"digit": 7}'.ljust(LIMIT)).digit == 7
    with pytest.raises(errors.BodyTooLarge):
        read(b'{"digit": 7}'.ljust(LIMIT + 1))


@pytest.mark.parametrize("declared", [str(LIMIT + 1), "9" * 5000])
def test_body_whose_declared_length_is_over_the_limit_is_not_read(declared: str) -> None:
    body = Body(b"{}")
    with pytest.raises(errors.BodyTooLarge):
        of_client = request(body, content_type=JSON, content_length=declared)
        asyncio.run(read_json(of_client, GenerateRequest, LIMIT, READ_SECONDS))
    assert body.taken == 0


def test_body_whose_declared_length_is_the_limit_is_accepted() -> None:
    of_client = request(Body(b'{"digit": 7}'.ljust(LIMIT)), content_type=JSON, content_length=str(LIMIT))
    assert asyncio.run(read_json(of_client, GenerateRequest, LIMIT, READ_SECONDS)).digit == 7


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"digit=7",
        b"{'digit': 7}",
        b'{"digit": 7,}',
        b'{"digit": 7} x',
        b'{"digit": 07}',
        b'\xef\xbb\xbf{"digit": 7}',
        b'{"digit": 7, "model": "\xff"}',
        b'{"digit": 7}'.decode().encode("utf-16"),
        pytest.param(b"[" * 990, id="deep"),
        pytest.param(b"[" * 495 + b"]" * 495, id="deep-but-json"),
    ],
)
def test_body_that_is_not_json_is_malformed(body: bytes) -> None:
    if body.endswith(b"]"):  # valid JSON, but not an object
        assert errors_of(body)
        return
    with pytest.raises(errors.MalformedJSON):
        read(body)


def test_deeply_nested_body_is_rejected() -> None:
    with pytest.raises((errors.MalformedJSON, errors.InvalidRequest)):  # depends on Python's recursion limit
        asyncio.run(
            read_json(request(Body(b"[" * 999 + b"]" * 999), content_type=JSON), GenerateRequest, 10**6, READ_SECONDS)
        )


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"digit": 10}', "digit"),
        ('{"digit": -1}', "digit"),
        ('{"digit": 7.5}', "digit"),
        ('{"digit": "7"}', "digit"),
        ('{"digit": true}', "digit"),
        ('{"digit": null}', "digit"),
        ('{"digit": [7]}', "digit"),
        ('{"digit": NaN}', "digit"),
        ('{"digit": Infinity}', "digit"),
        ('{"digit": -Infinity}', "digit"),
        ('{"digit": 1e999}', "digit"),
        ('{"digit": 1e300}', "digit"),
        (f'{{"digit": {"9" * 900}}}', "digit"),
        (f'{{"digit": -{"9" * 900}}}', "digit"),
        (f'{{"digit": {"9" * 399}}}', "digit"),
        ('{"digit": 7, "count": 0}', "count"),
        ('{"digit": 7, "count": null}', "count"),
        ('{"digit": 7, "seed": -1}', "seed"),
        ('{"digit": 7, "seed": 9007199254740992}', "seed"),
        ('{"digit": 7, "seed": null}', "seed"),
        ('{"digit": 7, "num_steps": 0}', "num_steps"),
        ('{"digit": 7, "num_steps": 1001}', "num_steps"),
        ('{"digit": 7, "sampler": "heun"}', "sampler"),
        ('{"digit": 7, "sampler": null}', "sampler"),
        ('{"digit": 7, "guidance_scale": 0.5}', "guidance_scale"),
        ('{"digit": 7, "guidance_scale": 10.5}', "guidance_scale"),
        ('{"digit": 7, "guidance_scale": NaN}', "guidance_scale"),
        ('{"digit": 7, "guidance_scale": true}', "guidance_scale"),
        ('{"digit": 7, "guidance_scale": "2"}', "guidance_scale"),
        ('{"digit": 7, "guidance_scale": null}', "guidance_scale"),
        (f'{{"digit": 7, "guidance_scale": {"9" * 900}}}', "guidance_scale"),
        ('{"digit": 7, "scale": 0}', "scale"),
        ('{"digit": 7, "scale": 17}', "scale"),
        ('{"digit": 7, "model": 1}', "model"),
        ('{"digit": 7, "model": null}', "model"),
        ('{"digit": 7, "model": "\\ud800"}', "model"),
        ('{"digit": 7, "timeout_seconds": 0}', "timeout_seconds"),
        ('{"digit": 7, "timeout_seconds": -1}', "timeout_seconds"),
        ('{"digit": 7, "timeout_seconds": Infinity}', "timeout_seconds"),
        ('{"digit": 7, "timeout_seconds": null}', "timeout_seconds"),
        ('{"digit": 7, "colour": 1}', "colour"),
    ],
)
def test_error_about_an_invalid_value_names_the_field(body: str, field: str) -> None:
    found = errors_of(body)
    assert [item["loc"] for item in found] == [["body", field]]
    assert found[0]["msg"]


@pytest.mark.parametrize(
    ("name", "intended"),
    [
        ("steps", "num_steps"),
        ("Guidance", "guidance_scale"),
        ("numSteps", "num_steps"),
        ("timeout", "timeout_seconds"),
        ("colour", None),
        ("num_steps" + "_" * 60, None),  # too long to compare
    ],
)
def test_error_about_an_unknown_field_names_the_most_similar_field(name: str, intended: str | None) -> None:
    (found,) = errors_of(f'{{"digit": 7, "{name}": 1}}')
    hint = f". Did you mean {intended}?" if intended else ""
    assert found == {"loc": ["body", name], "msg": f"Unknown field{hint}"}


def test_detail_names_the_mistyped_field_before_the_others() -> None:
    with pytest.raises(errors.InvalidRequest) as invalid:
        read(b'{"count": 0, "digt": 7}')
    assert invalid.value.detail == "body.digt: Unknown field. Did you mean digit?"
    assert [item["loc"][1] for item in invalid.value.errors] == ["digt", "count"]


def test_length_of_an_echoed_field_name_is_limited() -> None:
    with pytest.raises(errors.InvalidRequest) as invalid:
        read(f'{{"digit": 7, "{"s" * 900}": 1}}'.encode())
    assert invalid.value.detail == f"body.{'s' * 200}: Unknown field"


def test_lone_surrogates_are_rejected() -> None:
    assert errors_of('{"digit": 7, "\\ud800": 1}')
    assert errors_of('{"digit": 7, "a": "\\udfff"}')


@pytest.mark.parametrize("body", ['{"digit": 7, "digit": 7}', '{"digit": 7, "seed": 1, "digit": 8}'])
def test_duplicate_field_is_rejected(body: str) -> None:
    assert errors_of(body) == [{"loc": ["body", "digit"], "msg": "Field occurs more than once. Send it once"}]


def test_error_lists_every_invalid_field() -> None:
    found = errors_of('{"digit": 10, "count": "a", "unknown": 1}')
    assert {item["loc"][1] for item in found} == {"digit", "count", "unknown"}


def test_error_lists_a_limited_number_of_unknown_fields() -> None:
    fields = ",".join(f'"f{i}":1' for i in range(3000))
    with pytest.raises(errors.InvalidRequest) as invalid:
        asyncio.run(
            read_json(
                request(Body(f'{{"digit": 10, {fields}}}'.encode()), content_type=JSON),
                GenerateRequest,
                10**6,
                READ_SECONDS,
            )
        )
    assert [item["loc"] for item in invalid.value.errors[:2]] == [["body", "digit"], ["body", "f0"]]
    assert len(invalid.value.errors) == 1 + MAX_UNKNOWN_FIELDS


@pytest.mark.parametrize("body", ["[]", '"digit"', "7", "null", "true"])
def test_body_that_is_not_an_object_is_invalid(body: str) -> None:
    found = errors_of(body)
    assert [item["loc"] for item in found] == [["body"]]
    assert "GenerateRequest" not in found[0]["msg"]


def test_body_that_does_not_end_is_a_request_timeout() -> None:
    stalled = Request({"type": "http", "headers": [(b"content-type", JSON.encode())]}, silence)
    with pytest.raises(errors.RequestTimeout, match=r"within 0\.01 s"):
        asyncio.run(read_json(stalled, GenerateRequest, LIMIT, 0.01))


def test_error_does_not_contain_the_input() -> None:
    assert "secret" not in json.dumps(errors_of('{"digit": "secret"}'))


@pytest.mark.parametrize(("num_digits", "kind"), [(17, int), (400, int), (401, float), (10_000, float)])
def test_long_integer_becomes_infinity_and_is_not_malformed(num_digits: int, kind: type) -> None:
    document = parse_json(b"[%b]" % (num_digits * b"9"))
    assert [type(number) for number in document] == [kind]
    assert (document == [math.inf]) is (kind is float)


def test_largest_seed_keeps_its_exact_value() -> None:
    assert read(b'{"digit": 7, "seed": 9007199254740991}').seed == 2**53 - 1
    assert read(b'{"digit": 7, "seed": 9007199254740991.0}').seed == 2**53 - 1


def test_missing_seed_is_chosen_at_random() -> None:
    seeds = {read(b'{"digit": 7}').seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_work_is_cancelled_when_the_client_disconnects() -> None:
    async def disconnect() -> bool:
        work = asyncio.get_running_loop().create_future()
        with pytest.raises(ClientGoneError):
            await cancel_on_disconnect(request(Body(b"", b"")), work)
        return work.cancelled()

    assert asyncio.run(disconnect())


def test_result_is_returned_while_the_client_is_connected() -> None:
    async def stay() -> str:
        return await cancel_on_disconnect(Request({"type": "http"}, silence), asyncio.sleep(0, "done"))

    assert asyncio.run(stay()) == "done"


def test_exception_of_the_work_is_raised() -> None:
    async def fail() -> None:
        work = asyncio.get_running_loop().create_future()
        work.set_exception(errors.Draining(1))
        await cancel_on_disconnect(Request({"type": "http"}, silence), work)

    with pytest.raises(errors.Draining):
        asyncio.run(fail())


def test_wait_for_a_disconnect_ends_with_the_result() -> None:
    async def main() -> int:
        await cancel_on_disconnect(Request({"type": "http"}, silence), asyncio.sleep(0, "done"))
        await asyncio.sleep(0)
        return len(asyncio.all_tasks())

    assert asyncio.run(main()) == 1


def test_work_that_is_cancelled_while_the_client_is_connected_is_no_disconnect() -> None:
    async def main() -> None:
        work = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(0.01):
            await cancel_on_disconnect(Request({"type": "http"}, silence), work)

    with pytest.raises(TimeoutError):
        asyncio.run(main())
