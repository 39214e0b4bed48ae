import asyncio
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from starlette.routing import Route

from app import errors
from app.api import docs, page
from app.api.http import idempotency, upload_memory, uploads
from app.api.http.animations import FRAME_MS, LAST_MS, MAX_FRAME_PIXELS, MAX_PENDING_PIXELS, MAX_PIXELS
from app.api.http.events import MAX_WAITING_PREVIEWS
from app.api.http.media_types import FORMATS
from app.api.http.problems import error_response
from app.api.inference.tensors import read_inputs
from app.api.middleware.unread_body import LINGER_BYTES, LINGER_SECONDS
from app.api.native.batch import MAX_VIEWERS, PAUSE, REPEAT_SECONDS
from app.api.native.batch import STREAM as BATCH_STREAM
from app.api.native.operations import STREAM
from app.engine import clip_worker
from app.engine.batch_feed import MAX_ROWS
from app.engine.job import SHORTEST_TIMEOUT
from app.main import PROBE_ROUTERS, READ_ROUTERS, WORK_ROUTERS, create_app
from app.server import connection, framing
from app.settings import Settings
from app.tasks import picture_files
from app.tasks import score as score_task
from model.checkpoint import read_config
from model.clip_guidance import START, STOP
from model.inpainting import NUM_LEVELS
from model.png import Provenance
from model.spec import SHIPPED, SHIPPED_FAST
from tests.app.api.examples import PICTURE_TASKS, REQUESTS
from tests.app.application import client_of, run
from tests.app.fakes import INFO, FakeRunner
from tests.docs.document import DOCS, Document, Example, Row, codes, run_bash, tables_in
from tests.docs.markdown import anchors
from tests.e2e.conftest import start_service
from tests.e2e.service import EVENTS, PNG, Service, open_png

API = Document("api.md")
OPENAI = Document("openai.md")
INFERENCE = Document("open-inference.md")
REFERENCES = [API, OPENAI, INFERENCE]
BASE_URL = "http://127.0.0.1:8000"
OPENAPI: dict[str, Any] = create_app(Settings()).openapi()
SCHEMAS: dict[str, Any] = OPENAPI["components"]["schemas"]
KEY = "a-key-for-this-test"
ORIGIN = "https://example.com"
BODY = {"digit": 7, "num_steps": 3, "seed": 1}
INFER_PATH = "/v2/models/{name}/infer"
BINARY_REQUEST = REQUESTS[INFER_PATH]["binary"]
CURL = [example for each in REFERENCES for example in each.examples("bash") if "curl" in example.text]
PYTHON = [example for each in REFERENCES for example in each.examples("python")]

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")


def by_line(example: Example) -> str:
    return f"{example.document}-line-{example.line}"


def by(column: str, rows: list[Row]) -> dict[str, Row]:
    """Returns the rows by the text between backticks in this column. A cell with several codes gives several keys."""
    return {code: row for row in rows for code in codes(row[column])}


def types_in(rows: list[Row]) -> dict[str, str]:
    """Returns the type of each field of a table. A row describes one field, or several fields of one type."""
    return {field: row["Type"] for field, row in by("Field", rows).items()}


def events_of(rows: list[Row]) -> dict[str, dict[str, str]]:
    """Returns the types of the fields of each event of a table."""
    events: dict[str, dict[str, str]] = {}
    for row in rows:
        events.setdefault(row["Event"].strip("`"), {}).update(types_in([row]))
    return events


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """The shipped models, which the examples use. The long timeout is for slow machines."""
    with ExitStack() as stack:
        yield start_service(stack, SHIPPED, UNFOG_MAX_BATCH="32", UNFOG_REQUEST_TIMEOUT="300", UNFOG_CLIP="auto")


# Routes

LIMITED_ROUTES = by("Route", API.table("Routes", "Route"))
OPEN_ROUTES = by("Open route", API.table("Routes", "Open route"))


def test_contents_have_the_order_of_the_document() -> None:
    contents = API.text.partition("\n## ")[0]
    linked = re.findall(r"\(#([^)]+)\)", contents)
    ordered = [anchor for anchor in anchors(DOCS / "api.md") if anchor in linked]
    assert linked == ordered


def test_route_table_has_exactly_the_routes_of_the_application() -> None:
    app = create_app(Settings())
    routes = [
        route
        for router in (app, page.router, docs.router, *WORK_ROUTERS, *READ_ROUTERS, *PROBE_ROUTERS)
        for route in router.routes
        if isinstance(route, Route)
    ]
    served = {f"{method} {route.path}" for route in routes for method in (route.methods or set()) - {"HEAD"}}
    assert {*LIMITED_ROUTES, *OPEN_ROUTES} == served
    assert len(LIMITED_ROUTES) + len(OPEN_ROUTES) == len(served)


@pytest.mark.parametrize("route", [*LIMITED_ROUTES, *OPEN_ROUTES])
def test_only_routes_of_the_first_table_need_a_key_and_are_rate_limited(route: str) -> None:
    method, path = route.replace("{name}", "default" if "/v2/" in route else "main.js").split()

    async def check(client: httpx.AsyncClient) -> None:
        response = await client.request(method, path)
        assert (response.status_code == 401) == (route in LIMITED_ROUTES)
        is_limited = [(await client.request(method, path)).status_code for _ in range(3)][-1] == 429
        assert is_limited == (route in LIMITED_ROUTES)
        assert (await client.head(path)).status_code == (429 if is_limited else 200)

    run(check, FakeRunner(), api_keys=KEY, rate_limit="3/hour")


@pytest.mark.parametrize(("keys", "status"), [((), 404), (KEY, 401)])
def test_disabled_docs_and_page_give_the_documented_status(keys: Any, status: int) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        for path in ("/docs", "/openapi.json", "/", "/static/main.js"):
            assert (await client.get(path)).status_code == status

    run(check, FakeRunner(), docs="off", page="off", api_keys=keys)


# Request


def test_request_table_has_every_field_with_its_type_default_and_limits() -> None:
    schema = SCHEMAS["GenerateRequest"]
    rows = by("Field", API.table("Request", "Field"))
    assert set(rows) == set(schema["properties"])
    for name, field in schema["properties"].items():
        check_parameter(rows[name], field, required=name in schema.get("required", ()))


def test_parameter_table_has_every_query_parameter() -> None:
    parameters = [each for each in OPENAPI["paths"]["/generate"]["post"]["parameters"] if each["in"] == "query"]
    rows = by("Parameter", API.table("Request", "Parameter"))
    assert set(rows) == {parameter["name"] for parameter in parameters}
    for parameter in parameters:
        check_parameter(rows[parameter["name"]], parameter["schema"], required=parameter["required"])


@pytest.mark.parametrize("path", PICTURE_TASKS)
def test_tables_of_a_route_for_pictures_have_every_field_with_its_type_default_and_limits(path: str) -> None:
    schema = SCHEMAS[f"{path[1:].title()}Request"]
    shared = by("Field", API.table("Pictures in requests", "Field", "Default"))
    sampled = by("Field", API.table("Request", "Field"))
    sentence = API.section("Pictures in requests").split("The fields ")[1].split(" have the meaning")[0]
    named = {"timeout_seconds", *(codes(sentence) if path != "/recognize" else ())}
    own = by("Field", API.table(f"POST {path}", "Field", "Default"))
    rows = {name: sampled[name] for name in named} | shared | own
    assert set(rows) == set(schema["properties"])
    for name, field in schema["properties"].items():
        check_parameter(rows[name], field, required=name in schema.get("required", ()))


@pytest.mark.parametrize("path", ["/reproduce", "/score"])
def test_table_of_a_route_with_other_pictures_has_every_field_with_its_type_default_and_limits(path: str) -> None:
    schema = SCHEMAS[f"{path[1:].title()}Request"]
    rows = by("Field", API.table(f"POST {path}", "Field", "Default"))
    assert set(rows) == set(schema["properties"])
    for name, field in schema["properties"].items():
        check_parameter(rows[name], field, required=name in schema.get("required", ()))


def check_parameter(row: Row, schema: dict[str, Any], *, required: bool) -> None:
    if "anyOf" in schema:
        kinds = [each.get("const") or each["type"] for each in schema["anyOf"]]
        assert row["Type"].replace("`", "") == " or ".join(kinds)
        assert codes(row["Allowed values"]) == (["true", "false", "auto"] if "auto" in kinds else [])
        return
    assert row["Type"] == schema["type"]
    assert (row["Default"] == "required") == required
    if "default" in schema:
        assert row["Default"].strip("`") == str(schema["default"])
    numbers, texts = ("exclusiveMinimum", "minimum", "maximum", "minItems", "maxItems"), ("minLength", "maxLength")
    bounds = [schema[name] for name in (texts if "minLength" in schema else numbers) if name in schema]
    found = re.findall(r"\d+", row["Allowed values"].partition("(")[0])
    values = list(map(str, schema.get("enum", [schema["const"]] if "const" in schema else [])))
    assert list(map(int, found)) == (bounds or [int(value) for value in values if value.isdigit()])
    assert codes(row["Allowed values"]) == values


def test_tables_of_infer_have_every_parameter_and_field() -> None:
    parameters, fields = (SCHEMAS[f"Inference{name}"]["properties"] for name in ("Parameters", "Request"))
    rows = by("Parameter", INFERENCE.table("Inference requests", "Parameter"))
    assert set(rows) == set(parameters)
    for name, schema in parameters.items():
        if name != "binary_data_output":
            check_parameter(rows[name], schema, required=False)
    assert set(by("Field", INFERENCE.table("Inference requests", "Field"))) == set(fields)


def test_documented_body_with_binary_tensors_has_the_lengths_of_its_headers() -> None:
    (block,) = re.findall(r"```text\n(POST .*?)```", INFERENCE.section("Binary tensors"), re.DOTALL)
    head, body = block.rstrip("\n").split("\n\n")
    text = body.removesuffix("<16 bytes>")
    assert f"Inference-Header-Content-Length: {len(text)}\nContent-Length: {len(text) + 16}" in head
    assert len(read_inputs(text.encode() + bytes(16), str(len(text)), 64, "digit").elements["digit"]) == 2


def test_documented_defaults_equal_those_of_the_shipped_checkpoints() -> None:
    default, fast = read_config(SHIPPED), read_config(SHIPPED_FAST)
    rows = by("Field", API.table("Request", "Field"))
    scales = {sampler: default.guidance_of(sampler).scale for sampler in default.samplers}
    assert scales["ddim"] == scales["dpmpp"]
    assert rows["num_steps"]["Default"] == f"{default.spec.default_steps} for `default`, {fast.steps[0]} for `fast`"
    assert rows["sampler"]["Default"] == f"`{default.samplers[0]}` for `default`, `{fast.samplers[0]}` for `fast`"
    assert rows["guidance_scale"]["Default"] == (
        f"{scales['ddpm']:g} for `default` with `ddpm`, {scales['dpmpp']:g} for `default` with the other samplers, "
        f"{fast.guidance.scale:g} for `fast`"
    )
    assert rows["timeout_seconds"]["Default"] == f"{SHORTEST_TIMEOUT:g} or more"
    assert by("Field", API.table("POST /inpaint", "Field", "Default"))["num_steps"]["Default"] == str(NUM_LEVELS)


@pytest.mark.parametrize("option", [{"sampler": "ddpm"}, {"num_steps": 5}, {"guidance_scale": 1.5}])
def test_model_fast_rejects_the_options_that_it_does_not_permit(service: Service, option: dict[str, Any]) -> None:
    response = service.post({"digit": 7, "model": "fast", **option})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert response.json()["errors"][0]["loc"] == ["body", *option]
    for num_steps in (4, 2, 1):
        permitted = {"sampler": "ddim", "num_steps": num_steps, "guidance_scale": 1}
        assert service.post({"digit": 7, "model": "fast", **permitted}).status_code == 200


def test_guidance_has_no_effect_with_dpmpp_in_3_steps(service: Service) -> None:
    few = {"digit": 7, "seed": 1, "sampler": "dpmpp", "num_steps": 3}
    assert "`dpmpp` with 3 steps is an example" in API.section("Request")
    off, strong = (open_png(service.post({**few, "guidance_scale": scale}, PNG).content)[0] for scale in (1, 9))
    assert (off == strong).all()


# Responses


def test_format_table_lists_the_formats_by_preference() -> None:
    rows = API.table("Responses", "Format")
    assert [codes(row["Format"])[0] for row in rows] == list(FORMATS)

    async def check(client: httpx.AsyncClient) -> None:
        for row in rows:
            (media_type,) = codes(row["Format"])
            for accept in codes(row["Selected by"]):
                if accept != "Accept":
                    response = await client.post("/generate", json=BODY, headers={"Accept": accept})
                    assert response.headers["content-type"].startswith(media_type), accept

    run(check, FakeRunner())


@pytest.mark.parametrize(
    ("heading", "schema"),
    [
        ("JSON", "GenerateResponse"),
        ("GET /models", "Models"),
        ("GET /health", "Health"),
        ("Errors", "Problem"),
    ],
)
def test_field_table_has_exactly_the_fields_of_its_schema(heading: str, schema: str) -> None:
    assert types_in(API.table(heading, "Field")) == fields_of(SCHEMAS[schema])


@pytest.mark.parametrize(("heading", "schema"), [("GET /livez", "Liveness"), ("GET /readyz", "Readiness")])
def test_bodies_of_a_probe_are_documented(heading: str, schema: str) -> None:
    bodies = [json.loads(code) for code in codes(API.section(heading)) if code.startswith("{")]
    (field,) = SCHEMAS[schema]["properties"]
    assert bodies == [{field: True}, {field: False}]


@pytest.mark.parametrize("path", ["/recognize", "/score"])
def test_field_table_of_a_route_without_images_has_exactly_the_fields_of_its_schema(path: str) -> None:
    assert types_in(response_table(f"POST {path}")) == fields_of(SCHEMAS[f"{path[1:].title()}Response"])


@pytest.mark.parametrize("path", [path for path in PICTURE_TASKS if path != "/recognize"])
def test_tables_of_responses_with_images_have_exactly_the_fields_of_the_schema(path: str) -> None:
    generated = {
        name: kind
        for name, kind in types_in(API.table("JSON", "Field")).items()
        if not name.startswith(("clip", "warning", "labels", "noise"))
    }
    rows = [row for row in response_table("Common behaviour") if row["In"] in ("every route", f"`{path}`")]
    assert generated | types_in(rows) == fields_of(SCHEMAS[f"{path[1:].title()}Response"])


def response_table(heading: str) -> list[Row]:
    """Returns the table of the fields of an answer in a section."""
    return next(table for table in tables_in(API.section(heading)) if "Field" in table[0] and "Default" not in table[0])


def test_field_table_of_reproduce_has_exactly_the_further_fields_of_its_schema() -> None:
    generated, documented = types_in(API.table("JSON", "Field")), types_in(response_table("POST /reproduce"))
    assert generated | documented == fields_of(SCHEMAS["ReproduceResponse"])


@pytest.mark.parametrize("path", [path for path in PICTURE_TASKS if path != "/recognize"])
def test_chunk_table_has_exactly_the_further_text_chunks_of_a_route(path: str) -> None:
    generated = by("Chunk", API.table("PNG", "Chunk"))
    rows = API.table("Common behaviour", "Chunk", "In")
    documented = {codes(row["Chunk"])[0] for row in rows if row["In"].startswith("every route") or path in row["In"]}
    body = next(iter(REQUESTS[path].values())) | {"digit": 7, "seed": 1}

    async def check(client: httpx.AsyncClient) -> None:
        response = await client.post(path, json=body, headers={"Accept": PNG})
        _, chunks, _ = open_png(response.content)
        assert set(chunks) - set(generated) == documented
        assert chunks["Task"] == path[1:]
        response = await client.post(path, json=body, headers={"Accept": "application/zip"})
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            assert archive.namelist() == [f"{path[1:]}-seed-1-0.png"]

    assert "`inpaint-seed-<seed>-<index>.png`" in API.section("Common behaviour")
    run(check, FakeRunner())


def test_absent_class_has_the_documented_effect() -> None:
    """The fake runner recognises the class that is the seed modulo 10, in a search and in a recognition."""
    assert "the chunk `Digit` is `none`" in API.section("Common behaviour")

    async def check(client: httpx.AsyncClient) -> None:
        mean, strong = {"mode": "mean"}, {"noise_std": 900}
        asked: list[tuple[str, dict[str, Any], bool]] = [("/inpaint", {}, True), ("/edit", {}, True)]
        asked += [("/denoise", {}, True), ("/denoise", mean, False), ("/denoise", strong, False)]
        for path, changed, is_searched in asked:
            body = next(iter(REQUESTS[path].values())) | {"seed": 1} | changed
            body.pop("digit", None)
            answer = (await client.post(path, json=body)).json()
            assert (answer["digit"] is not None) == (answer["label"] is not None) == is_searched, path
            _, chunks, _ = open_png(base64.b64decode(answer["images"][0]["png"]))
            assert chunks["Digit"] == ("none" if answer["digit"] is None else str(answer["digit"]))
            assert chunks.get("Label") == answer["label"]

    run(check, FakeRunner())


@pytest.mark.parametrize(
    ("heading", "models"), [("Event stream", STREAM.events), ("GET /events/batch", BATCH_STREAM.events)]
)
def test_event_table_has_exactly_the_fields_of_each_event(heading: str, models: dict[str, type[BaseModel]]) -> None:
    fields = {name: fields_of(SCHEMAS[model.__name__]) for name, model in models.items()}
    assert "[problem document](#errors)" in API.section(heading)
    assert fields.pop("error") == fields_of(SCHEMAS["Problem"])
    assert events_of(API.table(heading, "Event")) == fields


def test_documented_rate_and_limits_of_the_stream_of_batches_are_those_of_the_code() -> None:
    text = API.section("GET /events/batch")
    assert PAUSE.args == (0.1,)  # ten events a second
    assert f"at most {MAX_ROWS} rows" in text
    assert f"repeated every {REPEAT_SECONDS:g} s" in text
    assert f"At most {MAX_VIEWERS} clients" in text
    assert by("Limit", API.table("Limits", "Limit"))["/events/batch"]["Value"] == str(MAX_VIEWERS)


def fields_of(schema: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns the type of each field of an object, with nested fields as `model.name` and `images[].png`."""
    fields: dict[str, str] = {}
    for name, field in schema["properties"].items():
        resolved = _resolve(field)
        items = _resolve(resolved.get("items", {}))
        if "properties" in resolved:
            fields |= fields_of(resolved, f"{prefix}{name}.")
        elif "properties" in items:
            fields |= fields_of(items, f"{prefix}{name}[].")
        else:
            kind = resolved["type"]
            fields[f"{prefix}{name}"] = f"array of {items['type']}s" if kind == "array" else kind
    return fields


def _resolve(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema that a reference names. Takes the first of two alternatives, since the second one is null."""
    schema = schema.get("anyOf", [schema])[0]
    return SCHEMAS[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def test_chunk_table_has_exactly_the_text_chunks_of_a_png() -> None:
    chunks = Provenance(
        labels=("7",), seed=42, sampler="dpmpp", num_steps=10, guidance_scale=1.7, model_sha256="4c31ec0d..."
    )
    documented = {codes(row["Chunk"])[0]: codes(row["Example"])[0] for row in API.table("PNG", "Chunk")}
    assert documented == chunks.text(0)


def test_documented_times_and_limits_of_animations_are_those_of_the_code() -> None:
    text = API.section("Animation")
    assert f"stays for {LAST_MS / 1000:g} s, the others for {FRAME_MS} ms each" in text
    assert f"A frame can have up to {MAX_FRAME_PIXELS:,} pixels, and all frames together up to {MAX_PIXELS:,}." in text
    values = {row["Limit"]: row["Value"] for row in API.table("Limits", "Limit")}
    limit = values["pixels of a frame of an animation, and of all its frames"]
    assert limit == f"{MAX_FRAME_PIXELS:,} and {MAX_PIXELS:,}"
    assert f"not yet encoded would have more than {MAX_PENDING_PIXELS:,} pixels" in text
    pending = "pixels of all animations that are admitted and not yet encoded"
    assert values[pending] == f"{MAX_PENDING_PIXELS:,}"
    measure = (DOCS.parent / "SECURITY.md").read_text()
    assert f"at most {MAX_PIXELS:,} pixels together, and each of them at most {MAX_FRAME_PIXELS:,}" in measure


def test_number_of_progress_events_for_slow_readers_is_documented() -> None:
    assert f"{MAX_WAITING_PREVIEWS} / `count` of them" in API.section("Event stream")


# Headers


def test_header_table_has_exactly_the_headers_of_responses(service: Service) -> None:
    documented = {name.lower() for name in by("Header", API.table("Headers", "Header", "Value"))}
    assert asyncio.run(headers_of_the_application()) | headers_of_the_server(service) == documented


async def headers_of_the_application() -> set[str]:
    """Returns the names of all headers in responses of the application, without those of the HTTP server."""
    allowed = {"X-API-Key": KEY, "Origin": ORIGIN}
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    runner = FakeRunner(models={"default": replace(INFO, image_shape=(1, 1, 4))})  # the shape of its images
    async with client_of(runner, api_keys=KEY, rate_limit="6/hour", cors_origins=ORIGIN) as client:
        timeout = error_response(errors.DeadlineExceeded(), {"type": "http", "path": "/v1/images/edits", "headers": []})
        responses = [
            httpx.Response(timeout.status_code, headers=dict(timeout.headers)),
            await client.get("/health"),
            await client.get("/docs"),
            await client.get("/docs/swagger-ui.css"),
            await client.post("/generate", json=BODY),
            await client.post("/generate", json=BODY, headers=allowed),
            await client.post("/generate", json=BODY, headers={**allowed, "Accept": EVENTS}),
            await client.post(INFER_PATH.format(name="default"), json=BINARY_REQUEST, headers=allowed),
            await client.get("/generate", headers=allowed),
            await client.options("/generate", headers=preflight),
            *[await client.post("/generate", json=BODY, headers=allowed) for _ in range(4)],
        ]
    assert [response.status_code for response in responses][:10] == [504, 200, 200, 200, 401, 200, 200, 200, 405, 200]
    assert responses[-1].status_code == 429
    async with client_of(runner) as client:
        png = (await client.post("/generate", json=BODY, headers={"Accept": PNG})).content
        responses.append(await client.post("/reproduce", files={"image": png}))
    assert responses[-1].status_code == 200
    return {name.lower() for response in responses for name in response.headers}


def headers_of_the_server(service: Service) -> set[str]:
    """Returns the names of all headers in responses that are sent over a socket. They include the server's headers."""
    stream = service.post({"digit": 7, "model": "fast"}, EVENTS)
    rejected = service.client.get("/health", headers={"X-Large": "a" * 9000})
    assert (stream.status_code, rejected.status_code) == (200, 431)
    return {name.lower() for response in (stream, rejected) for name in response.headers}


def test_cors_section_names_the_headers_of_the_preflight_response() -> None:
    _, sent, read, *_ = API.section("CORS").split("\n- ")
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}

    async def check(client: httpx.AsyncClient) -> None:
        allowed = (await client.options("/generate", headers=preflight)).headers["access-control-allow-headers"]
        exposed = (await client.get("/health", headers={"Origin": ORIGIN})).headers["access-control-expose-headers"]
        always = {"Accept", "Accept-Language", "Content-Language"}  # browsers always allow these headers
        assert {*codes(sent)} - {"GET", "POST", "DELETE"} == {*allowed.split(", ")} - always
        assert {*codes(read)} == {*exposed.split(", ")}
        rejected = await client.options("/generate", headers={**preflight, "Origin": "https://other.example"})
        assert (rejected.status_code, rejected.json()["code"]) == (400, "origin_not_allowed")

    run(check, FakeRunner(), api_keys=KEY, cors_origins=ORIGIN)


def test_idempotency_section_states_the_seed_the_keys_and_the_routes() -> None:
    text = API.section("Idempotency")
    assert f"The seed is the first {idempotency.SEED_BITS} bits of the SHA-256 digest of the key" in text
    for path, methods in OPENAPI["paths"].items():
        for method in methods.values():
            keys = [each["schema"] for each in method.get("parameters", ()) if each["name"] == "Idempotency-Key"]
            assert bool(keys) == (f"`{path}`" in text), path
            for key in keys:
                assert f"{key['minLength']} to {key['maxLength']} printable ASCII characters" in text
    key = re.findall(r"Idempotency-Key: ([^']+)'", text)[0]
    (formula,) = re.findall(r"in Python, `([^`]+)`", text)
    assert eval(formula, {"hashlib": hashlib, "key": key.encode()}) == idempotency.seed_of(key)


def test_documented_limit_of_a_text_chunk_is_that_of_the_code() -> None:
    assert (
        f"longer than {picture_files.MAX_TEXT_BYTES} bytes (`Label`: {picture_files.MAX_LABEL_BYTES} bytes)"
        in API.section("POST /reproduce")
    )


# Errors and limits


def all_errors(base: type[errors.UnfogError]) -> set[type[errors.UnfogError]]:
    return {base}.union(*map(all_errors, base.__subclasses__()))


def test_error_table_has_exactly_the_codes_of_the_application() -> None:
    rows = API.table("Errors", "Status")
    documented = {(row["Status"], row["Code"].strip("`")) for row in rows}
    own = {(str(error.status), error.code) for error in all_errors(errors.UnfogError)}
    assert documented == own | {("other", errors.HTTPError(418, "").code)}
    assert len(rows) == len(documented)


@pytest.mark.parametrize("path", ["/generate", *PICTURE_TASKS, "/reproduce", "/score", INFER_PATH])
def test_every_status_of_a_post_route_is_in_the_error_table(path: str) -> None:
    statuses = {row["Status"] for row in API.table("Errors", "Status")}
    assert {*OPENAPI["paths"][path]["post"]["responses"]} - {"200"} <= statuses


def test_failures_are_reported_in_the_documented_order() -> None:
    order = API.section("Errors").split("reports the first failure: ")[1].split(".")[0]
    checks = ["API key", "query parameters", "`Accept`", "`Content-Type`", "body", "fields"]
    assert sorted(checks, key=order.index) == checks
    url, headers, content = "/generate?previews=x", {"Accept": "audio/wav"}, b"x" * 20_000
    fixes: list[tuple[int, dict[str, Any]]] = [
        (401, {"headers": {"X-API-Key": KEY}}),
        (422, {"url": "/generate"}),
        (406, {"headers": {"Accept": "image/png"}}),
        (415, {"headers": {"Content-Type": "application/json"}}),
        (413, {"content": b"x"}),
        (400, {"content": b"{}"}),
        (422, {"content": json.dumps(BODY).encode()}),
    ]

    async def check(client: httpx.AsyncClient) -> None:
        request: dict[str, Any] = {"url": url, "headers": headers, "content": content}
        for status, fix in fixes:
            assert (await client.post(**request)).status_code == status
            request = {**request, **fix, "headers": {**request["headers"], **fix.get("headers", {})}}
        assert (await client.post(**request)).status_code == 200

    run(check, FakeRunner(), api_keys=KEY)


def test_documented_limits_equal_those_in_the_code() -> None:
    values = {row["Limit"]: row["Value"] for row in API.table("Limits", "Limit")}
    assert values["request line, or one header"] == f"{framing.MAX_HEADER_BYTES // 1024} KiB"
    assert values["headers of a request"] == str(framing.MAX_LINES - 1)
    assert values["request line and all headers together"] == f"{framing.MAX_HEAD_BYTES // 1024} KiB"
    assert values["size line of a chunk, with its extensions"] == f"{framing.MAX_CHUNK_LINE_BYTES // 1024} KiB"
    small = f"chunks of less than {framing.SMALL_CHUNK_BYTES} bytes on average"
    assert values[small] == str(framing.MAX_SMALL_CHUNKS)
    (ahead,) = (value for limit, value in values.items() if "pipelining" in limit)
    assert ahead.startswith(f"{connection.MAX_AHEAD_BYTES // 1024} KiB")
    assert f"up to {LINGER_BYTES // 2**20} MiB for up to {LINGER_SECONDS:g} s" in API.section("Limits")


def test_documented_values_of_settings_are_their_defaults() -> None:
    settings = Settings()
    found = re.findall(r"`UNFOG_(\w+)`(?:, | \()([\d.]+)( KiB| MiB)?", API.text)
    units = {"": 1, " KiB": 2**10, " MiB": 2**20}
    assert len(found) >= 10
    for name, number, unit in found:
        assert float(number) * units[unit] == getattr(settings, name.lower()), name


def test_documented_limits_of_pictures_are_those_of_the_code() -> None:
    values = {row["Limit"]: row["Value"] for row in API.table("Limits", "Limit")}
    bodies = "bodies with pictures that are received and decoded at the same time"
    of_client = uploads.MAX_BODIES * upload_memory.SHARE
    assert values[bodies] == f"{uploads.MAX_BODIES} x `UNFOG_MAX_IMAGE_BYTES` in total, {of_client:g} x for each client"
    stalled = f"fewer than {upload_memory.MIN_PROGRESS // 1024} KiB have arrived in {upload_memory.STALL_SECONDS} s"
    assert stalled in API.section("Limits")
    assert values["width and height of a picture"] == f"{picture_files.MAX_SIDE} pixels each"
    progressive, cmyk = picture_files.MAX_PIXELS_PROGRESSIVE, picture_files.MAX_PIXELS_PROGRESSIVE_CMYK
    assert values["pixels of a progressive JPEG picture"] == f"{progressive:,}"
    assert values["pixels of a WebP or a progressive CMYK JPEG picture"] == f"{cmyk:,}"
    assert cmyk == picture_files.MAX_PIXELS_WEBP
    assert values["scans of a JPEG picture"] == str(picture_files.MAX_SCANS)
    parts = uploads.MAX_PARTS + score_task.MAX_IMAGES + score_task.MAX_PROMPTS
    assert values["parts of a multipart body"] == f"{uploads.MAX_PARTS}, in `/score` {parts}"
    assert values["pixels of all pictures of a request for `/score`"] == f"{score_task.MAX_PIXELS:,}"
    assert values["pictures that wait for `/score`"] == str(clip_worker.MAX_WAITING_IMAGES)
    text = f"{uploads.MAX_TEXT_BYTES // 1024} KiB"
    assert values["text field of a multipart body"] == text
    strings = "JSON with pictures: bytes outside of strings, strings, backslashes"
    assert values[strings] == f"{text}, {uploads.MAX_STRINGS}, {uploads.MAX_ESCAPES:,}"


def test_interval_of_clip_guidance_is_that_of_the_code() -> None:
    assert f"CLIP guidance is applied at the timesteps {START} to {STOP}." in API.text


def test_every_documented_setting_exists() -> None:
    assert {name.lower() for name in re.findall(r"UNFOG_([A-Z_]+)", API.text)} <= set(Settings.model_fields)


# Metrics


def test_metrics_table_has_exactly_the_existing_metrics_with_types_and_labels() -> None:
    rows = by("Metric", API.table("Metrics", "Metric"))
    documented = {metric: (row["Type"], set(codes(row["Labels"]))) for metric, row in rows.items()}
    found: dict[str, tuple[str, set[str]]] = {}

    async def check(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=BODY)
        for family in text_string_to_metric_families((await client.get("/metrics")).text):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = family.type, {label for sample in family.samples for label in sample.labels} - {"le"}

    run(check, FakeRunner(device_memory=lambda: 1))
    assert documented == found


def test_reasons_and_stages_of_metrics_are_documented(service: Service) -> None:
    rows = by("Metric", API.table("Metrics", "Metric"))
    scraped = service.client.get("/metrics").text
    for name, label in (("unfog_rejected_total", "reason"), ("unfog_cancelled_total", "stage")):
        values = set(re.findall(rf'{name}{{{label}="(\w+)"}}', scraped))
        assert values == set(codes(rows[name]["Meaning"])) - {label}


# Examples


@pytest.fixture(scope="module")
def seven(service: Service) -> bytes:
    """The file that the first curl example writes. The examples of the routes for pictures read it."""
    return service.post({"digit": 7, "seed": 42}, PNG).content


@needs_curl
@pytest.mark.parametrize("example", CURL, ids=by_line)
def test_curl_example_runs_and_has_the_documented_output(
    service: Service, seven: bytes, example: Example, tmp_path: Path
) -> None:
    (tmp_path / "seven.png").write_bytes(seven)
    script = example.text.replace(BASE_URL, service.url)
    assert script != example.text
    printed = run_bash(script, tmp_path, API_KEY="not-checked")
    if example.output and example.output.language == "json":
        assert_same_form(json.loads(example.output.text), json.loads(printed))
    elif example.output:
        assert events_in(example.output.text) == events_in(printed)


PLACEHOLDERS = {
    *("evaluations", "png", "b64_json", "created", "previews"),
    *("detail", "msg", "request_id", "version", "device", "dtype"),
}


def assert_same_form(documented: Any, found: Any, name: str = "") -> None:
    """Compares the fields, their order, and the texts and integers that are the same in every run."""
    assert type(documented) is type(found), name
    if isinstance(documented, dict):
        assert list(documented) == list(found)
        for key, value in documented.items():
            assert_same_form(value, found[key], key)
    elif isinstance(documented, list):
        for one, other in zip(documented, found, strict=False):
            assert_same_form(one, other, name)
    elif isinstance(documented, str | int) and not isinstance(documented, bool) and name not in PLACEHOLDERS:
        assert documented == found, name


def events_in(text: str) -> list[tuple[str, list[str]]]:
    """Returns the name and the fields of each event."""
    return [(name, list(json.loads(data))) for name, data in re.findall(r"event: (.+)\ndata: (.+)\n", text)]


@pytest.mark.parametrize("example", PYTHON, ids=by_line)
def test_python_example_compiles(example: Example) -> None:
    compile(example.text, by_line(example), "exec")


@pytest.mark.parametrize("example", PYTHON, ids=by_line)
def test_python_example_runs(service: Service, seven: bytes, example: Example, tmp_path: Path) -> None:
    (tmp_path / "seven.png").write_bytes(seven)
    program = example.text.replace(BASE_URL, service.url)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_packages_of_python_examples_have_an_install_command() -> None:
    packages = dict.fromkeys(("numpy", "tritonclient"), '"tritonclient[http]"')
    texts = {each.name: each.text for each in REFERENCES}
    for example in PYTHON:
        imported = set(re.findall(r"^(?:from|import) (\w+)", example.text, re.MULTILINE)) - sys.stdlib_module_names
        for package in imported:
            assert f"`pip install {packages.get(package, package)}`" in texts[example.document]
