import asyncio
import base64
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.types import Message

from app import errors
from app.api.http import picture_queue, upload_memory, uploads
from app.api.http.picture_fields import Base64, multipart_schema
from app.api.http.requests import ClientGoneError
from app.api.http.uploads import MAX_ESCAPES, MAX_PARTS, MAX_STRINGS, MAX_TEXT_BYTES, ImageReader
from app.engine.job import Pixels
from app.settings import Settings
from app.tasks.fields import WHOLE
from app.tasks.picture_files import PictureError
from app.tasks.pictures import decode, decode_mask
from app.tasks.sampling import TimedFields as TimedRequest
from tests.app.picture_samples import DRAWING, animation, encode, grey

LIMIT = 4 * 2**20
PNG = encode(grey(), "PNG")
NOISE = encode(grey(np.random.default_rng(0).integers(0, 255, (20, 20), np.uint8)), "PNG")
JSON = "application/json"
FORM = "multipart/form-data; boundary=xx"


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    image: Base64
    mask: Base64 | None = Field(default=None, json_schema_extra={"contentEncoding": "base64"})
    images: list[Base64] = []
    prompts: list[str] = []
    few: list[str] = Field(default=[], max_length=3)
    digit: Annotated[int, Field(ge=0, le=9), WHOLE] | None = None
    noise_std: float | None = None
    invert: bool | Literal["auto"] = "auto"
    name: str = "none"


IMAGES = ("image", "mask", "images")
Result = tuple[Fields, dict[str, list[Pixels]]]
Conversion = Callable[[Fields, Pixels], Pixels]


class Client:
    """Sends a body in chunks. Then it stays connected, or disconnects if `leaves` is true."""

    def __init__(
        self, body: bytes, content_type: str, *, leaves: bool = False, size: int = 2**16, address: str = "192.0.2.1"
    ) -> None:
        chunks = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
        self.taken, self._leaves = 0, leaves
        self._messages: Iterator[Message] = iter(
            [{"type": "http.request", "body": each, "more_body": i < len(chunks) - 1} for i, each in enumerate(chunks)]
        )
        self.request = Request(
            {
                "type": "http",
                "method": "POST",
                "path": "/",
                "client": (address, 1),
                "headers": [(b"content-type", content_type.encode())],
            },
            self.receive,
        )

    async def receive(self) -> Message:
        self.taken += 1
        message = next(self._messages, None)
        if message is None and not self._leaves:
            message = await asyncio.get_running_loop().create_future()
        return message or {"type": "http.disconnect"}


def same(fields: BaseModel, picture: Pixels) -> Pixels:
    return picture


def readers(convert: Any = same) -> dict[str, Callable[[Any, bytes], Pixels]]:
    """Returns the function that decodes and converts the files of each image field."""
    return dict.fromkeys(IMAGES, lambda fields, data: convert(fields, decode(data)))


def waiting_for(event: threading.Event) -> Conversion:
    """Returns a conversion that keeps its worker busy until the event is set."""

    def convert(fields: Fields, picture: Pixels) -> Pixels:
        event.wait(30)
        return picture

    return convert


def read(body: bytes, content_type: str = JSON, **settings: Any) -> Result:
    async def main() -> Result:
        reader = ImageReader(Settings(**settings))
        try:
            return await reader.read(Client(body, content_type).request, Fields, readers())
        finally:
            reader.close()

    return asyncio.run(main())


def as_json(**fields: Any) -> bytes:
    encoded = {
        name: base64.b64encode(each).decode() if isinstance(each, bytes) else each for name, each in fields.items()
    }
    return json.dumps(encoded).encode()


def as_form(*parts: tuple[str, bytes]) -> bytes:
    """Returns a multipart body with the boundary xx."""
    lines: Iterable[bytes] = (
        b'--xx\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, content in parts
    )
    return b"".join([*lines, b"--xx--\r\n"])


def refusal(body: bytes, content_type: str = JSON, **settings: Any) -> errors.InvalidFields:
    with pytest.raises(errors.InvalidFields) as refused:
        read(body, content_type, **settings)
    json.dumps(refused.value.problem("id"))
    return refused.value


# Both content types


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (as_json(image=PNG, digit=7, noise_std=2.5, invert=True, prompts=["a", "b"]), JSON),
        (
            as_form(
                *(("image", PNG), ("digit", b"7"), ("noise_std", b"2.5"), ("invert", b"true")),
                *(("prompts", b"a"), ("prompts", b"b")),
            ),
            FORM,
        ),
    ],
    ids=["JSON", "multipart"],
)
def test_both_content_types_give_the_same_fields_and_pictures(body: bytes, content_type: str) -> None:
    fields, pictures = read(body, content_type)
    assert fields == Fields(image="", digit=7, noise_std=2.5, invert=True, prompts=["a", "b"])
    assert list(pictures) == ["image"]
    (picture,) = pictures["image"]
    np.testing.assert_array_equal(picture, DRAWING)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (as_json(image=PNG, images=[base64.b64encode(each).decode() for each in (PNG, animation("GIF", 1))]), JSON),
        (as_form(("image", PNG), ("images", PNG), ("images", animation("GIF", 1))), FORM),
    ],
    ids=["JSON", "multipart"],
)
def test_list_of_pictures_keeps_its_order(body: bytes, content_type: str) -> None:
    fields, pictures = read(body, content_type)
    assert [picture.shape for picture in pictures["images"]] == [DRAWING.shape, (4, 4)]
    assert fields.images == ["", ""]


@pytest.mark.parametrize("is_form", [False, True])
def test_error_of_a_list_of_pictures_names_the_index(is_form: bool) -> None:
    files = [PNG, NOISE, b"text", b"text"]
    encoded = [base64.b64encode(each).decode() for each in files]
    form = as_form(("image", PNG), *(("images", each) for each in files))
    error = refusal(form if is_form else as_json(image=PNG, images=encoded), FORM if is_form else JSON)
    assert (error.code, error.errors[0]["loc"]) == ("invalid_image", ["body", "images", 2])


def test_picture_that_cannot_be_converted_gives_invalid_image() -> None:
    def refuse_large(fields: Fields, picture: Pixels) -> Pixels:
        if picture.shape != DRAWING.shape:
            raise PictureError("too large")
        return picture

    async def main() -> None:
        reader = ImageReader(Settings())
        bodies: list[tuple[bytes, list[Any]]] = [(as_form(("image", NOISE)), ["image"])]
        bodies.append((as_form(("image", PNG), ("images", PNG), ("images", NOISE)), ["images", 1]))
        for body, location in bodies:
            with pytest.raises(errors.InvalidImage, match="too large") as refused:
                await reader.read(Client(body, FORM).request, Fields, readers(refuse_large))
            assert refused.value.errors[0]["loc"] == ["body", *location]
        reader.close()

    asyncio.run(main())


@pytest.mark.parametrize(("body", "content_type"), [(as_json(digit=7), JSON), (as_form(("digit", b"7")), FORM)])
def test_missing_picture_is_an_invalid_field(body: bytes, content_type: str) -> None:
    error = refusal(body, content_type)
    assert error.code == "invalid_request"
    assert error.errors == [{"loc": ["body", "image"], "msg": "Field required"}]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(as_json(image=PNG, mask=b"text"), JSON), (as_form(("image", PNG), ("mask", b"text")), FORM)],
)
def test_error_of_a_file_that_is_no_picture_names_its_field(body: bytes, content_type: str) -> None:
    error = refusal(body, content_type)
    assert (error.status, error.code) == (422, "invalid_image")
    assert error.errors[0]["loc"] == ["body", "mask"]
    assert "not a PNG, JPEG, WebP or GIF picture" in error.detail


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (as_json(image=PNG, other=1), JSON),
        (as_form(("image", PNG), ("other", b"1")), FORM),
        (as_form(("image", PNG), ("other", PNG)), FORM),  # a file in a field with a wrong name
    ],
)
def test_unknown_field_is_refused(body: bytes, content_type: str) -> None:
    assert refusal(body, content_type).errors == [
        {"loc": ["body", "other"], "msg": "Unknown field"},
    ]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"image": "", "digit": 1, "digit": 2}', JSON),
        (as_form(("image", PNG), ("digit", b"1"), ("digit", b"2")), FORM),
        (as_form(("image", PNG), ("image", PNG)), FORM),
    ],
)
def test_repeated_field_is_refused(body: bytes, content_type: str) -> None:
    assert "occurs more than once" in refusal(body, content_type).detail


@pytest.mark.parametrize("content_type", ["", "text/plain", "image/png", "multipart/mixed; boundary=xx"])
def test_other_content_type_is_not_read(content_type: str) -> None:
    client = Client(PNG, content_type)

    async def main() -> None:
        await ImageReader(Settings()).read(client.request, Fields, readers())

    with pytest.raises(errors.UnsupportedMediaType) as refused:
        asyncio.run(main())
    assert refused.value.detail == "Content-Type must be application/json or multipart/form-data"
    assert client.taken == 0


def test_body_over_the_limit_for_pictures_is_refused_while_it_arrives() -> None:
    with pytest.raises(errors.BodyTooLarge):
        read(as_form(("image", bytes(2000))), FORM, max_image_bytes=1000)
    assert refusal(as_form(("image", bytes(2000))), FORM, max_body_bytes=1000).code == "invalid_image"


# Fields of a multipart body


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("7.0", 7), ("007", None), ("+7", None), ("seven", None), ("", None), ("1e400", None)]
)
def test_number_in_a_part_has_the_syntax_of_json(text: str, value: int | None) -> None:
    body = as_form(("image", PNG), ("digit", text.encode()))
    if value is None:
        assert refusal(body, FORM).errors[0]["loc"][:2] == ["body", "digit"]
    else:
        assert read(body, FORM)[0].digit == value


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("auto", "auto")])
def test_boolean_or_word_in_a_part_is_read(text: str, value: Any) -> None:
    assert read(as_form(("image", PNG), ("invert", text.encode())), FORM)[0].invert == value


@pytest.mark.parametrize("text", ["7", "true", "sieben Ümläute"])
def test_text_field_remains_text(text: str) -> None:
    assert read(as_form(("image", PNG), ("name", text.encode())), FORM)[0].name == text


@pytest.mark.parametrize("content", [b"\xff", b"7" * (MAX_TEXT_BYTES + 1)])
def test_long_or_undecodable_text_field_is_refused(content: bytes) -> None:
    assert refusal(as_form(("image", PNG), ("digit", content)), FORM).errors[0]["loc"] == ["body", "digit"]


def test_file_name_and_type_of_a_part_are_ignored() -> None:
    body = as_form(("image", PNG)).replace(
        b'name="image"', b'name="image"; filename="../a.svg"\r\nContent-Type: image/svg+xml'
    )
    assert read(body, FORM)[1]["image"][0].shape == DRAWING.shape


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", FORM),
        (as_form(("image", PNG))[:-10], FORM),
        (b"text " + as_form(("image", PNG)), FORM),
        (as_form(("image", PNG)).replace(b"form-data", b"attachment"), FORM),
        (as_form(("image", PNG)), "multipart/form-data"),
        (as_form(("image", PNG)), "multipart/form-data; boundary=" + "x" * 71),
        (as_form(("image", PNG)), 'multipart/form-data; boundary=""'),
    ],
)
def test_malformed_multipart_body_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(errors.MalformedRequest) as refused:
        read(body, content_type)
    assert "multipart/form-data" in refused.value.detail or "boundary" in refused.value.detail


MOST_PARTS = MAX_PARTS + 3  # one for each element of the list whose length is limited


@pytest.mark.parametrize("num_parts", [MOST_PARTS + 1, 1000])
def test_many_parts_are_refused(num_parts: int) -> None:
    assert f"more than {MOST_PARTS} parts" in refusal(as_form(*[("prompts", b"a")] * num_parts), FORM).detail


def test_permitted_number_of_parts_is_accepted() -> None:
    body = as_form(("image", PNG), *[("few", b"a")] * 3, *[("prompts", b"a")] * (MAX_PARTS - 1))
    fields, _ = read(body, FORM)
    assert (len(fields.few), len(fields.prompts)) == (3, MAX_PARTS - 1)


def test_part_with_long_headers_is_refused() -> None:
    assert "headers" in refusal(b"--xx\r\nX: " + b"a" * LIMIT, FORM, max_image_bytes=2 * LIMIT).detail


# Base64


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(NOISE).decode(),
        base64.urlsafe_b64encode(NOISE).decode(),
        base64.b64encode(NOISE).decode().rstrip("="),
        base64.encodebytes(NOISE).decode(),
        base64.encodebytes(NOISE).decode().replace("\n", "\r\n "),
        "data:image/png;base64," + base64.b64encode(NOISE).decode(),
        "DATA:;charset=utf-8;base64," + base64.b64encode(NOISE).decode(),
    ],
)
def test_every_usual_form_of_base64_is_decoded(text: str) -> None:
    assert read(json.dumps({"image": text}).encode())[1]["image"][0].shape == (20, 20)


def test_alphabets_differ_in_the_test_data() -> None:
    assert base64.b64encode(NOISE) != base64.urlsafe_b64encode(NOISE)
    assert base64.b64encode(NOISE).endswith(b"=")


@pytest.mark.parametrize("text", ["%%%%", "AAA A=A", "ÄÖÜ", "A", "data:image/png,AAAA", "\ud800"])
def test_invalid_base64_is_refused(text: str) -> None:
    error = refusal(json.dumps({"image": text}).encode())
    assert error.code == "invalid_image"
    assert "base64" in error.detail


@pytest.mark.parametrize("value", [None, 7, {}, True, [1]])
def test_picture_that_is_no_string_is_an_invalid_field(value: Any) -> None:
    error = refusal(as_json(image=value))
    assert (error.code, error.errors[0]["loc"][:2]) == ("invalid_request", ["body", "image"])


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"7", b"null"])
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    assert refusal(body).detail == "body: Input should be an object"


# JSON that is expensive to parse

ROOM = LIMIT - 100
BOMBS = {
    "arrays": b'{"a": [' + b"[]," * (ROOM // 3) + b"[]]}",
    "nesting": b"[" * ROOM,
    "objects": b'{"a":' * (ROOM // 5),
    "digits": b'{"digit": ' + b"7" * ROOM + b"}",
    "white space": b"{" + b" " * ROOM + b"}",
    "quotes": b'"' * ROOM,
    "names": b"{" + b'"a":1,' * (ROOM // 6) + b'"a":1}',
    "escapes": b'{"image": "' + b"\\n" * (ROOM // 2) + b'"}',
    "after an escaped quote": b'{"a": "\\"", "b": ' + b"[" * ROOM,
}


@pytest.mark.parametrize("name", BOMBS)
def test_json_bomb_is_refused_before_it_is_parsed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    monkeypatch.setattr(uploads, "parse_json", parsed.append)
    error = refusal(BOMBS[name])
    assert "The JSON has more than" in error.detail
    assert error.errors[0]["loc"] == ["body"]
    assert parsed == []


def test_json_at_the_limits_is_parsed() -> None:
    text = base64.b64encode(PNG).decode()
    escaped = "\\n" * (MAX_ESCAPES // 2) + "\\r" * (MAX_ESCAPES // 2)
    body = f'{{"image": "{text}{escaped}", "name": "{"[{," * 10_000}"}}{" " * 10_000}'
    assert read(body.encode())[1]["image"][0].shape == DRAWING.shape


@pytest.mark.parametrize("length", [MAX_STRINGS, MAX_STRINGS + 1])
def test_number_of_strings_is_limited(length: int) -> None:
    body = json.dumps({"prompts": [""] * (length - 1)}).encode()
    assert ("strings" in refusal(body).detail) == (length > MAX_STRINGS)


@pytest.mark.parametrize(
    ("body", "outside"),
    [
        (b"", 0),
        (b"{}", 2),
        (b'{"a": "b"}', 4),
        (b'{"a\\"[[[": 1}', 5),
        (b'{"a\\\\": 1}', 5),
        (b'{"a\\\\\\"[[[": 1}', 5),
        (b'{"open [[[', 1),
    ],
)
def test_bytes_outside_of_strings_are_counted(body: bytes, outside: int) -> None:
    assert uploads._bytes_outside_strings(body) == outside


# Load


async def start(reader: ImageReader, client: Client, convert: Any = same) -> asyncio.Task[Result]:
    """Begins to read a request, and returns after its body has arrived."""
    task = asyncio.ensure_future(reader.read(client.request, Fields, readers(convert)))
    for _ in range(20):
        await asyncio.sleep(0)
    return task


def test_at_most_two_requests_are_decoded_at_a_time() -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()
    running: list[int] = []

    def convert(fields: Fields, picture: Pixels) -> Pixels:
        running.append(1)
        begun.release()
        go_on.wait(30)
        return picture

    async def main() -> None:
        reader = ImageReader(Settings())
        tasks = [await start(reader, Client(as_json(image=PNG), JSON), convert) for _ in range(5)]
        for _ in range(2):
            await asyncio.to_thread(begun.acquire, timeout=30)
        await asyncio.sleep(0.05)
        assert len(running) == 2
        tasks[-1].cancel()  # this request is waiting, so it never runs
        await asyncio.wait([tasks[-1]])
        go_on.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(each, asyncio.CancelledError) for each in done] == [False] * 4 + [True]
        assert len(running) == 4
        reader.close()
        assert reader._memory.size == 0

    asyncio.run(main())


def test_small_request_is_read_between_the_pictures_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each picture the event loop has time to answer, as it has while real pictures are decoded.

    20 pictures of this size are a large request.
    """
    monkeypatch.setattr(picture_queue, "NUM_WORKERS", 1)
    begun, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    async def turn() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def main() -> None:
        loop, reader = asyncio.get_running_loop(), ImageReader(Settings())

        def convert(fields: Fields, picture: Pixels) -> Pixels:
            order.append(fields.name)
            begun.set()
            go_on.wait(30)
            asyncio.run_coroutine_threadsafe(turn(), loop).result(30)
            return picture

        pictures = [base64.b64encode(encode(Image.new("L", (256, 256)), "PNG")).decode()] * 20
        large = await start(reader, Client(as_json(image=PNG, images=pictures, name="large"), JSON), convert)
        await asyncio.to_thread(begun.wait, 30)
        small = await start(reader, Client(as_json(image=PNG, name="small"), JSON), convert)
        go_on.set()
        await asyncio.gather(large, small)
        reader.close()

    asyncio.run(main())
    assert order.index("small") <= 4  # its body is parsed, and then its picture is decoded, after a picture each
    assert len(order) == 22


def test_queue_is_given_the_work_of_each_picture_and_the_timeout_of_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class TimedFields(TimedRequest, Fields):
        pass

    submitted: list[tuple[list[int], float]] = []

    async def main() -> None:
        reader = ImageReader(Settings(request_timeout=20))
        submit = reader._queue.submit

        def record(steps: list[Any], timeout: float) -> Any:
            submitted.append(([step.work for step in steps], timeout))
            return submit(steps, timeout)

        monkeypatch.setattr(reader._queue, "submit", record)
        sides = [28, 60, 256, 512]
        pictures = [base64.b64encode(encode(Image.new("L", (side, side)), "PNG")).decode() for side in sides]
        body = as_json(image=PNG, images=pictures, timeout_seconds=7.0)
        await reader.read(Client(body, JSON).request, TimedFields, readers())
        reader.close()

    asyncio.run(main())
    (_, parse_timeout), ((_, own, small, medium, large), timeout) = submitted
    assert parse_timeout == 20
    assert 0 < timeout < 7  # parsing has taken a part of it
    assert 10 * own < small < medium < large  # a picture of 28 x 28 pixels is hardly converted
    assert large - medium == 512**2 - 256**2  # the fit of a larger picture does not take more time


def test_timeout_of_a_request_limits_the_time_to_decode_its_pictures() -> None:
    class TimedFields(TimedRequest, Fields):
        pass

    go_on = threading.Event()

    async def main() -> None:
        reader = ImageReader(Settings())
        client = Client(as_json(image=PNG, timeout_seconds=0.05), JSON)
        with pytest.raises(errors.DeadlineExceeded):
            await reader.read(client.request, TimedFields, readers(waiting_for(go_on)))
        go_on.set()
        reader.close()

    asyncio.run(main())


def test_disconnect_while_a_request_waits_raises_client_gone_error() -> None:
    go_on = threading.Event()
    convert = waiting_for(go_on)

    async def main() -> None:
        reader = ImageReader(Settings())
        busy = [await start(reader, Client(as_json(image=PNG), JSON), convert) for _ in range(2)]
        with pytest.raises(ClientGoneError):
            await reader.read(Client(as_json(image=PNG), JSON, leaves=True).request, Fields, readers(convert))
        go_on.set()
        await asyncio.gather(*busy)
        reader.close()

    asyncio.run(main())


def test_request_that_waits_until_its_deadline_is_answered() -> None:
    go_on = threading.Event()
    convert = waiting_for(go_on)

    async def main() -> None:
        reader = ImageReader(Settings(request_timeout=0.05))
        with pytest.raises(errors.DeadlineExceeded) as late:
            await reader.read(Client(as_json(image=PNG), JSON).request, Fields, readers(convert))
        assert "decoded" in late.value.detail
        go_on.set()
        reader.close()

    asyncio.run(main())


def stalled(size: int, address: str) -> Client:
    """Returns a client whose body of this size arrives except for its last byte."""
    client = Client(bytes(size), JSON, size=size - 1, address=address)
    client._messages = iter([next(client._messages)])
    return client


async def cancel(tasks: list[asyncio.Task[Result]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def test_bodies_that_arrive_at_the_same_time_have_a_common_limit() -> None:
    async def main() -> None:
        reader = ImageReader(Settings(max_image_bytes=1000))
        clients = [stalled(1000, f"192.0.2.{i}") for i in range(uploads.MAX_BODIES + 1)]
        tasks = [await start(reader, client) for client in clients]
        assert [task.done() for task in tasks] == [False] * uploads.MAX_BODIES + [True]
        with pytest.raises(errors.Overloaded) as refused:
            tasks[-1].result()
        assert refused.value.headers == {"Retry-After": "1"}
        await cancel(tasks)
        assert reader._memory.size == 0
        reader.close()

    asyncio.run(main())


def test_file_of_a_list_is_freed_before_the_next_one_is_decoded() -> None:
    size, held = 100_000, list[int]()

    def measure(fields: Fields, data: bytes) -> Pixels:
        assert len(data) == size
        held.append(tracemalloc.get_traced_memory()[0])
        return decode(PNG)

    async def main() -> None:
        reader = ImageReader(Settings())
        content = base64.b64encode(PNG.ljust(size, b"\0")).decode()
        client = Client(as_json(image=content, images=[content] * 8), JSON)
        tracemalloc.start()
        try:
            await reader.read(client.request, Fields, {"images": measure})
        finally:
            tracemalloc.stop()
        reader.close()

    asyncio.run(main())
    assert held[0] - held[-1] > 6 * size


def test_client_cannot_use_the_memory_of_other_clients() -> None:
    async def main() -> None:
        reader = ImageReader(Settings(max_image_bytes=1000))
        tasks = [await start(reader, stalled(1000, "192.0.2.1")) for _ in range(uploads.MAX_BODIES)]
        assert [task.done() for task in tasks].count(True) == uploads.MAX_BODIES // 2
        other = Client(as_json(image=PNG), JSON, address="192.0.2.2")
        assert (await reader.read(other.request, Fields, readers()))[1]["image"]
        await cancel(tasks)
        reader.close()

    asyncio.run(main())


@pytest.mark.parametrize("num_addresses", [1, 2, 16])
@pytest.mark.parametrize("is_known", [False, True])
def test_small_picture_is_read_beside_16_stalled_uploads(
    num_addresses: int, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of the small picture has another address than the others, or the same."""
    monkeypatch.setattr(upload_memory, "STALL_SECONDS", 0)

    async def main() -> None:
        reader = ImageReader(Settings(max_image_bytes=1000))
        tasks = [await start(reader, stalled(1000, f"192.0.2.{i % num_addresses}")) for i in range(16)]
        client = Client(as_json(image=PNG), JSON, address="192.0.2.0" if is_known else "198.51.100.7")
        assert (await reader.read(client.request, Fields, readers()))[1]["image"]
        for task in tasks:
            if task.done():
                assert isinstance(task.exception(), errors.RequestTimeout)
        await cancel(tasks)
        assert reader._memory.size == 0
        reader.close()

    asyncio.run(main())


def test_request_that_is_cancelled_while_it_waits_frees_its_body() -> None:
    go_on = threading.Event()
    convert = waiting_for(go_on)

    async def main() -> None:
        reader = ImageReader(Settings())
        busy = [await start(reader, Client(as_json(image=PNG), JSON), convert) for _ in range(2)]
        waiting = await start(reader, Client(as_json(image=PNG), JSON), convert)
        assert reader._memory.size == 3 * len(as_json(image=PNG))
        await cancel([waiting])
        assert reader._memory.size == 2 * len(as_json(image=PNG))
        go_on.set()
        await asyncio.gather(*busy)
        reader.close()
        assert reader._memory.size == 0

    asyncio.run(main())


def test_transparent_pixels_of_a_mask_are_black() -> None:
    opaque = np.zeros((4, 4, 4), np.uint8)
    opaque[:3] = 255  # white, and the last row is transparent
    mask = encode(Image.fromarray(opaque), "PNG")

    async def main() -> None:
        reader = ImageReader(Settings())
        client = Client(as_json(image=mask), JSON)
        _, pictures = await reader.read(client.request, Fields, {"image": lambda fields, data: decode_mask(data)})
        assert pictures["image"][0].tolist() == [[255] * 4] * 3 + [[0] * 4]
        reader.close()

    asyncio.run(main())


def read_leniently(body: bytes, content_type: str) -> Fields:
    async def main() -> Fields:
        reader = ImageReader(Settings())
        fields, _ = await reader.read(Client(body, content_type).request, Fields, readers(), lenient=True)
        reader.close()
        return fields

    return asyncio.run(main())


def test_lenient_reader_ignores_brackets_and_text_parts_without_content() -> None:
    body = as_form(("image[]", PNG), ("digit", b""), ("noise_std", b""), ("name", b""), ("invert", b"true"))
    fields = read_leniently(body, FORM)
    assert (fields.digit, fields.noise_std, fields.name, fields.invert) == (None, None, "none", True)
    assert {error["loc"][1] for error in refusal(body.replace(b"image[]", b"image"), FORM).errors} == {
        "digit",
        "noise_std",
    }


def test_lenient_reader_refuses_a_picture_without_content() -> None:
    with pytest.raises(errors.InvalidImage, match="The file is empty"):
        read_leniently(as_form(("image", PNG), ("mask", b"")), FORM)


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_lenient_reader_parses_every_other_content_type_as_json(content_type: str) -> None:
    assert read_leniently(as_json(image=PNG, digit=7), content_type).digit == 7


def test_failed_request_releases_its_bytes() -> None:
    async def main() -> None:
        reader = ImageReader(Settings(max_image_bytes=1000))
        for body, content_type in ((bytes(5000), JSON), (b"{", JSON), (b"", FORM), (as_json(image=b"text"), JSON)):
            with pytest.raises(errors.UnfogError):
                await reader.read(Client(body, content_type, size=100).request, Fields, readers())
        await asyncio.sleep(0.05)
        assert reader._memory.size == 0
        reader.close()

    asyncio.run(main())


# OpenAPI


def test_multipart_schema_has_files_where_the_json_schema_has_base64() -> None:
    schema = Fields.model_json_schema()
    properties = multipart_schema(schema)["properties"]
    assert schema["properties"]["image"]["contentEncoding"] == "base64"
    assert properties["image"] == {
        "contentMediaType": "application/octet-stream",
        "title": "Image",
        "type": "string",
    }
    assert properties["images"]["items"]["contentMediaType"] == "application/octet-stream"
    assert properties["digit"] == schema["properties"]["digit"]
