"""Requests that nobody means well with, each made from a seed."""

import gzip
import json
import random
from collections.abc import Callable

MEGABYTE = 2**20
HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\n"
JSON_TYPE = b"Content-Type: application/json\r\n"

Maker = Callable[[random.Random], bytes]


def post(body: bytes, *headers: bytes) -> bytes:
    """A request whose framing is right, whatever is in it."""
    lines = b"".join(header + b"\r\n" for header in headers)
    return HEAD + JSON_TYPE + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def document(choose: random.Random, **fields: object) -> bytes:
    return json.dumps({"digit": choose.randrange(10), "num_steps": 1, **fields}).encode()


# Bodies that are small beside what a reader could make of them; all are within UNFOG_MAX_BODY_BYTES.
BOMBS: dict[str, bytes] = {
    "nested lists": b"[" * (MEGABYTE - 10),
    "nested lists that close": b"[" * 500_000 + b"]" * 500_000,
    "nested objects": b'{"a":' * 200_000,
    "a number of a million digits": b'{"digit": ' + b"9" * 1_000_000 + b"}",
    "a fraction of a million digits": b'{"digit": 1.5' + b"9" * 1_000_000 + b"}",
    "an exponent": b'{"digit": 1e999999999}',
    "lists in a list": b"[" + b"[]," * 330_000 + b"[]]",
    "objects in a list": b"[" + b"{}," * 330_000 + b"{}]",
    "many fields": b"{" + b",".join(b'"f%d":1' % i for i in range(80_000)) + b"}",
    "one field many times": b"{" + b",".join(b'"digit":1' for _ in range(100_000)) + b"}",
    "a long string": b'{"digit": "' + b"a" * 1_000_000 + b'"}',
    "a long name": b'{"' + b"a" * 1_000_000 + b'": 1}',
    "escapes": b'{"model": "' + b"\\ud83d\\ude00" * 80_000 + b'"}',
    "a wide list": b'{"digit": [' + b"0," * 500_000 + b"0]}",
    "spaces": b" " * 1_000_000 + b"{}",
}


def _bytes(choose: random.Random, most: int) -> bytes:
    return choose.randbytes(choose.randrange(1, most))


def _broken(choose: random.Random) -> bytes:
    """A good document with some bytes of it changed."""
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


def _cut(choose: random.Random) -> bytes:
    """A good request that stops somewhere."""
    whole = post(document(choose, count=4, num_steps=20))
    return whole[: choose.randrange(1, len(whole))]


def _header(choose: random.Random) -> bytes:
    lines = (
        *(b"Accept: " + b"a/b;q=0.1," * 500, b"Accept: ;;;,,,", b"Accept: image/png;q=nan", b"X-Request-ID: a\tb"),
        *(b"X-Request-ID: " + b"a" * 5000, b"Expect: 100-continue", b"Expect: 200-ok", b"Upgrade: websocket"),
        *(b"Connection: upgrade\r\nUpgrade: h2c", b"Range: bytes=0-1", b"Origin: null", b"Cookie: " + b"a=b;" * 500),
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
    """What two readers would read differently."""
    smuggled = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    lines = (
        *(b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"Content-Length: 3, 4\r\n\r\n{}"),
        *(b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
        *(
            b"Content-Length: +2\r\n\r\n{}",
            b"Content-Length: 0x2\r\n\r\n{}",
            b"Content-Length: 99999999999999999999\r\n\r\n",
        ),
        *(b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n", b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n"),
    )
    return HEAD + JSON_TYPE + choose.choice(lines) + smuggled


KINDS: dict[str, Maker] = {
    "noise": lambda choose: _bytes(choose, 2000),
    "noise in a body": lambda choose: post(_bytes(choose, 2000)),
    "a broken document": _broken,
    "a wrong field": _field,
    "a request that stops": _cut,
    "a header": _header,
    "a path": _path,
    "framing": _framing,
    "gzip": lambda choose: post(gzip.compress(bytes(10 * MEGABYTE)), b"Content-Encoding: gzip"),
    "too large": lambda choose: post(b" " * (MEGABYTE + choose.randrange(1, 1000))),
    "too large, of no length": lambda choose: (
        HEAD + JSON_TYPE + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 20
    ),
    "a bomb": lambda choose: post(choose.choice(list(BOMBS.values()))),
}


def make(seed: int) -> tuple[str, bytes]:
    """Its kind, and the bytes; bombs and the like, of a megabyte each, are rarer."""
    choose = random.Random(seed)
    large = ("gzip", "too large", "too large, of no length", "a bomb")
    kind = choose.choices(list(KINDS), [0.2 if name in large else 1.0 for name in KINDS])[0]
    return kind, KINDS[kind](choose)
