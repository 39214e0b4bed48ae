"""Tests of the input that is discarded after a response."""

import asyncio

from starlette.types import Message, Receive, Scope, Send

from app.api.middleware.unread_body import LINGER_BYTES, UnreadBody

PIECE = 1024 * 1024


def sent_and_number_read(num_pieces: int) -> tuple[list[Message], int]:
    """Sends a request with a body of `num_pieces` pieces to an application that refuses it without reading it.

    Returns the messages of the response, and how many pieces were read from the client.
    """
    sent: list[Message] = []
    num_read = 0

    async def receive() -> Message:
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": bytes(PIECE), "more_body": num_read < num_pieces}

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body", "body": b"too large"})

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"transfer-encoding", b"chunked")]}
    asyncio.run(UnreadBody(refuse)(scope, receive, send))
    return sent, num_read


def test_response_precedes_the_discarded_input_and_its_end_follows() -> None:
    sent, num_read = sent_and_number_read(num_pieces=3)
    assert num_read == 3
    assert (b"connection", b"close") in sent[0]["headers"]
    assert [(message.get("body"), message.get("more_body")) for message in sent[1:]] == [
        (b"too large", True),
        (None, None),
    ]


def test_endless_input_is_discarded_up_to_the_limit_of_bytes() -> None:
    _, num_read = sent_and_number_read(num_pieces=10**9)
    assert num_read == LINGER_BYTES // PIECE
