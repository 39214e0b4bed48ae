"""HTTP behaviour: paths, methods, media types, body size, content negotiation and request ids."""

import re
import select
import socket

import httpx
import pytest

from tests.e2e.process import TIMEOUT
from tests.e2e.service import EVENTS, GIF, JSON, PNG, WEBP, ZIP, Service, assert_problem

CHEAP = {"digit": 7, "num_steps": 1, "seed": 1}
LIMIT = 16 * 1024  # the default of UNFOG_MAX_BODY_BYTES
MAX_BYTES_SENT = 2**28  # a server that accepts this much has no limit


@pytest.mark.parametrize(
    "path", ["/static", "/generate/", "/Generate", "/generate/7", "/v3", "/health/x", "/../etc/passwd"]
)
def test_unknown_path_is_404(service: Service, path: str) -> None:
    assert_problem(service.client.get(path), 404, "not_found")
    assert_problem(service.client.post(path, json=CHEAP), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/generate", "POST"),
        ("PUT", "/generate", "POST"),
        ("DELETE", "/generate", "POST"),
        ("HEAD", "/generate", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
        ("DELETE", "/readyz", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ],
)
def test_wrong_method_is_405_with_the_allow_header(service: Service, method: str, path: str, allow: str) -> None:
    response = service.client.request(method, path)
    if method == "HEAD":
        assert (response.status_code, response.content) == (405, b"")
    else:
        assert_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allow


@pytest.mark.parametrize(
    "path", ["/health", "/livez", "/readyz", "/startupz", "/metrics", "/docs", "/openapi.json", "/nowhere"]
)
def test_head_has_the_headers_of_get_and_no_body(service: Service, path: str) -> None:
    get = service.client.get(path)
    with socket.create_connection(service.address, timeout=TIMEOUT) as connection:
        connection.sendall(f"HEAD {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
        response = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = response.partition(b"\r\n\r\n")
    headers = httpx.Headers([tuple(line.split(": ", 1)) for line in head.decode().split("\r\n")[1:]])
    assert body == b""
    assert int(head.split()[1]) == get.status_code
    assert {*get.headers} - {*headers} == set()
    for name in ("content-type", "content-security-policy", "cache-control"):
        assert headers.get(name) == get.headers.get(name)
    if path in ("/readyz", "/docs", "/openapi.json"):  # the bodies of the others contain times or counts
        assert headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp", "json"],
)
def test_body_without_the_json_content_type_is_415(service: Service, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = service.client.post("/generate", content=b'{"digit": 7, "num_steps": 1}', headers=headers)
    assert_problem(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/json;"])
def test_json_content_type_is_case_insensitive_and_may_have_parameters(service: Service, content_type: str) -> None:
    assert service.post(CHEAP, **{"content-type": content_type}).status_code == 200


ACCEPTS = {
    "application/json": JSON,
    "image/png": PNG,
    "application/zip": ZIP,
    "text/event-stream": EVENTS,
    "*/*": JSON,
    "": JSON,
    "application/*": JSON,
    "image/*": PNG,
    "text/*": EVENTS,
    "IMAGE/PNG": PNG,
    "image/png, application/json": JSON,  # equal q-values: the service prefers JSON
    "image/png, application/json;q=0.9": PNG,
    "application/json;q=0.5, application/zip;q=0.6, image/png;q=0.4": ZIP,
    "application/json;q=0.2, */*;q=0.8": PNG,  # the more specific range applies to JSON
    "application/*;q=0.9, application/zip;q=1": ZIP,
    "application/*, application/json;q=0": ZIP,
    "image/*;q=0, */*": JSON,
    "text/html, application/xhtml+xml, image/webp, */*;q=0.8": JSON,
    "image/gif": GIF,
    "image/webp": WEBP,
    "image/webp, image/png": PNG,
    "image/webp, text/html": WEBP,
    "image/webp, image/png;q=0.1": WEBP,
    "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2": JSON,  # Java's HttpURLConnection
    "text/html,image/png;q=0.5": PNG,
}


@pytest.mark.parametrize(("accept", "media_type"), ACCEPTS.items(), ids=ACCEPTS)
def test_accept_selects_the_media_type(service: Service, accept: str, media_type: str) -> None:
    response = service.post(CHEAP, accept)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].partition(";")[0] == media_type


def test_response_without_an_accept_header_is_json(service: Service) -> None:
    request = service.client.build_request("POST", "/generate", json=CHEAP)
    del request.headers["accept"]
    assert service.client.send(request).headers["content-type"] == JSON


@pytest.mark.parametrize(
    "accept",
    [
        "text/html",
        "image/jpeg",
        "image/avif, text/plain",
        "image/avif, text/html",
        "application/json;q=0",
        "*/*;q=0",
        "png",
        "image/png;q=0, a/b",
    ],
)
def test_unsupported_accept_is_406(service: Service, accept: str) -> None:
    assert_problem(service.post(CHEAP, accept), 406, "not_acceptable")


def test_body_of_the_maximum_size_is_accepted_and_a_larger_one_is_413(service: Service) -> None:
    document = b'{"digit": 7, "num_steps": 1}'
    assert service.post(document.ljust(LIMIT)).status_code == 200
    assert_problem(service.post(document.ljust(LIMIT + 1)), 413, "body_too_large")


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", "Content-Length: 999999999999"])
@pytest.mark.parametrize(
    ("content_type", "status", "code"),
    [("application/json", 413, "body_too_large"), ("text/plain", 415, "unsupported_media_type")],
)
def test_endless_body_is_cut_off_while_it_arrives(
    service: Service, framing: str, content_type: str, status: int, code: str
) -> None:
    head = f"POST /generate HTTP/1.1\r\nHost: test\r\nContent-Type: {content_type}\r\n{framing}\r\n\r\n"
    piece = b" " * 65536
    part = b"10000\r\n" + piece + b"\r\n" if "chunked" in framing else piece
    response = b""
    with socket.create_connection(service.address, timeout=TIMEOUT) as connection:
        connection.sendall(head.encode())
        with pytest.raises(ConnectionError):  # the server closes the connection
            for _ in range(MAX_BYTES_SENT // len(piece)):
                connection.sendall(part)
                if select.select([connection], [], [], 0)[0]:
                    response += connection.recv(65536)
    assert response.startswith(f"HTTP/1.1 {status} ".encode())
    assert code.encode() in response
    assert service.client.get("/readyz").status_code == 200


@pytest.mark.parametrize("path", ["/generate", "/health", "/livez", "/readyz", "/startupz", "/metrics", "/nowhere"])
def test_every_response_has_a_unique_request_id(service: Service, path: str) -> None:
    responses = [service.client.get(path), service.client.get(path)]
    ids = {response.headers["x-request-id"] for response in responses}
    assert len(ids) == 2
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,128}", request_id) for request_id in ids)


@pytest.mark.parametrize("request_id", ["a", "7", "Az09._-", "x" * 128])
@pytest.mark.parametrize("accept", [JSON, PNG, EVENTS, "text/html"])
def test_request_id_of_the_caller_is_returned(service: Service, accept: str, request_id: str) -> None:
    assert service.post(CHEAP, accept, **{"x-request-id": request_id}).headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a b", "a/b", "a;b", "<b>", '"', "a,b", "é"])
def test_invalid_request_id_is_replaced(service: Service, request_id: str) -> None:
    headers = {b"x-request-id": request_id.encode("latin-1")}
    response = service.client.get("/nowhere", headers=headers)
    generated = assert_problem(response, 404, "not_found")["request_id"]
    assert generated != request_id
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", generated)


@pytest.mark.parametrize("length", [LIMIT + 1, 99_999_999_999_999_999_999])
def test_content_length_over_the_limit_is_413_before_the_body_arrives(service: Service, length: int) -> None:
    head = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n{}"
    with socket.create_connection(service.address, TIMEOUT) as client:
        client.sendall((head % length).encode())
        assert (
            client.recv(12) == b"HTTP/1.1 413"
        )  # if it waited for the body, it would answer 408 after UNFOG_READ_TIMEOUT
