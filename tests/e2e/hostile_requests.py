"""Generates hostile and malformed requests, each from a seed."""

import gzip
import json
import random
from collections.abc import Callable

MEGABYTE = 2**20
MAX_BODY_BYTES = 16 * 1024  # the default of UNFOG_MAX_BODY_BYTES
HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\n"
JSON_TYPE = b"Content-Type: application/json\r\n"

RequestFactory = Callable[[random.Random], bytes]


def post(body: bytes, *headers: bytes) -> bytes:
    """Returns a correctly framed POST /generate with any body and extra headers."""
    lines = b"".join(header + b"\r\n" for header in headers)
    return HEAD + JSON_TYPE + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def document(choose: random.Random, **fields: object) -> bytes:
    return json.dumps({"digit": choose.randrange(10), "num_steps": 1, **fields}).encode()


def _repeat(piece: bytes, start: bytes = b"", end: bytes = b"") -> Callable[[int], bytes]:
    return lambda size: start + piece * ((size - len(start) - len(end)) // len(piece)) + end


def _nested(size: int) -> bytes:
    return b"[" * (size // 2) + b"]" * (size // 2)


def _fields(size: int) -> bytes:
    return b"{" + b",".join(b'"f%06d":1' % i for i in range((size - 2) // 12)) + b"}"


# Bodies of at most the given size that could cost a JSON parser much time or memory.
BOMBS: dict[str, Callable[[int], bytes]] = {
    "unclosed lists": _repeat(b"["),
    "nested lists": _nested,
    "unclosed objects": _repeat(b'{"a":'),
    "a number of many digits": _repeat(b"9", b'{"digit": ', b"}"),
    "a fraction of many digits": _repeat(b"9", b'{"digit": 1.5', b"}"),
    "an exponent": _repeat(b"9", b'{"digit": 1e', b"}"),
    "lists in a list": _repeat(b"[],", b"[", b"[]]"),
    "objects in a list": _repeat(b"{},", b"[", b"{}]"),
    "many fields": _fields,
    "a repeated field": _repeat(b'"digit":1,', b"{", b'"digit":1}'),
    "a long string": _repeat(b"a", b'{"digit": "', b'"}'),
    "a long name": _repeat(b"a", b'{"', b'": 1}'),
    "escapes": _repeat(b"\\ud83d\\ude00", b'{"model": "', b'"}'),
    "a long list": _repeat(b"0,", b'{"digit": [', b"0]}"),
    "spaces": _repeat(b" ", b"", b"{}"),
}


def _bytes(choose: random.Random, most: int) -> bytes:
    return choose.randbytes(choose.randrange(1, most))


def _broken(choose: random.Random) -> bytes:
    """Returns a valid body with 1 to 4 bytes replaced at random."""
    body = bytearray(document(choose, seed=1, count=1))
    for _ in range(choose.randrange(1, 5)):
        body[choose.randrange(len(body))] = choose.randrange(256)
    return post(bytes(body))


def _field(choose: random.Random) -> bytes:
    names = ("digit", "count", "seed", "num_steps", "sampler", "guidance_scale", "scale", "model", "timeout_seconds")
    values: tuple[object, ...] = (
        *(None, True, "7", [], {}, -1, 2**63, 2**64, 10**30, 1e308, 0.5, -0.0, "\x00", "\u202e", "' OR 1=1", "../../x"),
        *("{{7*7}}", "${jndi:ldap://x}", "<script>", "a" * 10_000, [[[[]]]], {"$ne": 1}),
    )
    return post(document(choose, **{choose.choice(names): choose.choice(values)}))


def _truncated(choose: random.Random) -> bytes:
    """Returns a valid request that is cut off at a random byte."""
    whole = post(document(choose, count=4, num_steps=20))
    return whole[: choose.randrange(1, len(whole))]


def _header(choose: random.Random) -> bytes:
    lines = (
        *(b"Accept: " + b"a/b;q=0.1," * 500, b"Accept: ;;;,,,", b"Accept: image/png;q=nan", b"X-Request-ID: a\tb"),
        *(b"X-Request-ID: " + b"a" * 5000, b"Expect: 100-continue", b"Expect: 200-ok", b"Upgrade: websocket"),
        *(b"Connection: upgrade\r\nUpgrade: h2c", b"Range: bytes=0-1", b"Origin: null", b"Cookie: " + b"a=b;" * 500),
        *(b"X: a\rb", b"X: a\r\n b\r\n\tc", b"X: \x0b", b": a", b"X : a", b" X: a", b"Accept: */*\r\nAccept: \xff"),
        *(b"X-Forwarded-For: 127.0.0.1", b"Host: y", b"Content-Encoding: gzip", b"Authorization: Bearer \xff\xfe"),
        *(b"traceparent: 00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01", b"X-API-Key: " + b"k" * 5000),
    )
    return post(document(choose), choose.choice(lines))


def _path(choose: random.Random) -> bytes:
    paths = (
        *(b"/../../../etc/passwd", b"/%2e%2e/%2e%2e/etc/passwd", b"//health", b"/health%00", b"/generate?previews=1e9"),
        *(b"/generate?previews=-1", b"/generate?previews=" + b"9" * 4000, b"/%ff%fe", b"/generate/%0d%0aX: y", b"*"),
        *(b"http://elsewhere/generate", b"/docs/../generate", b"/metrics?" + b"a=b&" * 2000, b"/;/generate"),
    )
    method = choose.choice((b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"TRACE", b"CONNECT", b"DELETE", b"FOO"))
    return method + b" " + choose.choice(paths) + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def _framing(choose: random.Random) -> bytes:
    """Returns ambiguous or invalid framing, followed by a smuggled request (request smuggling)."""
    smuggled = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    lines = (
        *(b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"Content-Length: 3, 4\r\n\r\n{}"),
        *(b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
        *(b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"Content-Length: 2\rX: y\r\n\r\n{}"),
        *(b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", b"Content-Length: 2\n\n{}", b"X: y\n z\r\n\r\n"),
        *(
            b"Content-Length: +2\r\n\r\n{}",
            b"Content-Length: 0x2\r\n\r\n{}",
            b"Content-Length: 99999999999999999999\r\n\r\n",
        ),
        *(b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n", b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n"),
        *(b"Transfer-Encoding: chunked\r\n\r\n2;a\n\r\n{}\r\n", b"Transfer-Encoding: chunked\r\n\r\n2\r{}\r\n"),
    )
    return HEAD + JSON_TYPE + choose.choice(lines) + smuggled


def _pipelined(choose: random.Random) -> bytes:
    """Returns a slow request followed by more bytes. The client disconnects before the response."""
    request = post(document(choose, count=16, num_steps=100), b"X: y")
    return request + choose.choice((b"\r\n", b"\x00", b"GET", request, request * 20, b"\r\n" * 20_000))


# Requests of about the given size that are expensive to parse. 8 KiB is within the limits, 1 MiB is not.
CHUNKED = HEAD + JSON_TYPE + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
EXPENSIVE: dict[str, Callable[[int], bytes]] = {
    "a path": _repeat(b"/", b"POST /", b" HTTP/1.1\r\nHost: x" + END),
    "a query": _repeat(b"previews=1&", b"POST /generate?", b" HTTP/1.1\r\nHost: x" + END),
    "a header": _repeat(b"a", HEAD + JSON_TYPE + b"X: ", END),
    "a folded header": _repeat(b"\r\n a", HEAD + JSON_TYPE + b"X: a", END),
    "whitespace before a control character": _repeat(b" ", HEAD + JSON_TYPE + b"X:", b"\x00" + END),
    "whitespace before a carriage return": _repeat(b" ", HEAD + JSON_TYPE + b"X: a", b"\ra" + END),
    "headers": _repeat(b"a:\n", HEAD + JSON_TYPE, b"X:" + END),
    "API keys": _repeat(b"X-API-Key: a\r\n", HEAD + JSON_TYPE, b"X:" + END),
    "Accept: semicolons in an open quote": _repeat(b";", HEAD + JSON_TYPE + b'Accept: */*;"', END),
    "Accept: quotes": _repeat(b'"', HEAD + JSON_TYPE + b"Accept: */*;", END),
    "Accept: commas": _repeat(b",", HEAD + JSON_TYPE + b"Accept: */*", END),
    "Accept: q-values": _repeat(b";q=0", HEAD + JSON_TYPE + b"Accept: */*", END),
    "Accept headers": _repeat(b'Accept: a/b;c=","\r\n', HEAD + JSON_TYPE, b"X:" + END),
    "Connection: tokens": _repeat(b"a,", HEAD + JSON_TYPE + b"Connection: ", END),
    "X-Forwarded-For: addresses": _repeat(b"10.0.0.1,", HEAD + JSON_TYPE + b"X-Forwarded-For: ", END),
    "Content-Length: numbers": _repeat(
        b"2,", HEAD + JSON_TYPE + b"Connection: close\r\nContent-Length: ", b"2\r\n\r\n{}"
    ),
    "chunks of a byte": _repeat(b"1\r\n \r\n", CHUNKED, b"0\r\n\r\n"),
    "chunks of 64 bytes": _repeat(b"40\r\n" + b" " * 64 + b"\r\n", CHUNKED, b"0\r\n\r\n"),
    "a chunk extension": _repeat(b" ", CHUNKED + b"1;", b"\n\r\n \r\n0\r\n\r\n"),
    "chunk extensions": _repeat(b"1;" + b" " * 1000 + b"\r\n \r\n", CHUNKED, b"0\r\n\r\n"),
    "trailers": _repeat(b"a:\n", CHUNKED + b"0\r\n", b"\r\n"),
    "a trailer": _repeat(b" ", CHUNKED + b"0\r\nX:", b"\x00\r\n\r\n"),
    "empty lines": _repeat(b"\r\n", b"", post(b"{}", b"Connection: close")),
}


KINDS: dict[str, RequestFactory] = {
    "random bytes": lambda choose: _bytes(choose, 2000),
    "random bytes in a body": lambda choose: post(_bytes(choose, 2000)),
    "a broken document": _broken,
    "a wrong field": _field,
    "a truncated request": _truncated,
    "a header": _header,
    "a path": _path,
    "framing": _framing,
    "pipelined bytes": _pipelined,
    "an expensive request": lambda choose: choose.choice(list(EXPENSIVE.values()))(choose.choice((1024, 8 * 1024))),
    "an expensive request over the limit": lambda choose: choose.choice(list(EXPENSIVE.values()))(MEGABYTE),
    "gzip": lambda choose: post(gzip.compress(bytes(10 * MEGABYTE)), b"Content-Encoding: gzip"),
    "a body over the limit": lambda choose: post(b" " * (MAX_BODY_BYTES + choose.randrange(1, MEGABYTE))),
    "a chunked body over the limit": lambda choose: (
        HEAD + JSON_TYPE + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 20
    ),
    "a JSON bomb": lambda choose: post(choose.choice(list(BOMBS.values()))(MAX_BODY_BYTES)),
    "a JSON bomb over the limit": lambda choose: post(choose.choice(list(BOMBS.values()))(MEGABYTE)),
}


def make(seed: int) -> tuple[str, bytes]:
    """Returns the kind and the bytes of a request. Kinds of about 1 MiB are five times rarer."""
    choose = random.Random(seed)
    large = (
        "gzip",
        "a body over the limit",
        "a chunked body over the limit",
        "a JSON bomb over the limit",
        "an expensive request over the limit",
    )
    kind = choose.choices(list(KINDS), [0.2 if name in large else 1.0 for name in KINDS])[0]
    return kind, KINDS[kind](choose)
