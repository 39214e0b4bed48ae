"""Validation of every field of POST /generate."""

import json

import pytest

from tests.e2e.service import Service, assert_invalid, assert_problem, open_png

BOUNDS = {
    "digit": (0, 9),
    "count": (1, 64),
    "seed": (0, 2**53 - 1),
    "num_steps": (1, 100),
    "guidance_scale": (1, 10),
    "scale": (1, 16),
}
INTEGERS = ("digit", "count", "seed", "num_steps", "scale")
NUMBERS = (*BOUNDS, "timeout_seconds")
NOT_NUMBERS = {
    "null": "null",
    "string": '"1"',
    "true": "true",
    "false": "false",
    "list": "[1]",
    "object": '{"1": 1}',
    "NaN": "NaN",
    "Infinity": "Infinity",
    "minus Infinity": "-Infinity",
    "1e999": "1e999",
    "thousands of digits": "1" * 5000,
    "minus thousands of digits": "-" + "1" * 5000,
    "hundreds of digits": "1" * 390,
    "thousands of decimals": "-0." + "1" * 5000,
    "lone surrogate": r'"\ud800"',
}


def body(**fields: str) -> bytes:
    """Returns a cheap request with fields given as raw JSON, so that invalid JSON can be sent."""
    cheap = {"digit": "7", "num_steps": "1"}
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in (cheap | fields).items()) + "}").encode()


@pytest.mark.parametrize("value", NOT_NUMBERS.values(), ids=NOT_NUMBERS)
@pytest.mark.parametrize("field", NUMBERS)
def test_value_that_is_not_a_number_in_range_is_422_for_its_field(service: Service, field: str, value: str) -> None:
    assert_invalid(service.post(body(**{field: value})), "body", field)


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", ["7.5", "1e-3"])
def test_fraction_in_an_integer_field_is_422(service: Service, field: str, value: str) -> None:
    assert_invalid(service.post(body(**{field: value})), "body", field)


@pytest.mark.parametrize("field", INTEGERS)
def test_whole_float_is_accepted_as_an_integer(service: Service, field: str) -> None:
    response = service.post(body(**{field: "7.0"}))
    assert response.status_code == 200
    assert field == "scale" or repr(response.json()[field]) == "7"


@pytest.mark.parametrize(("field", "bounds"), BOUNDS.items(), ids=BOUNDS)
def test_both_bounds_are_inclusive(service: Service, field: str, bounds: tuple[int, int]) -> None:
    low, high = bounds
    for value in (low, high):
        response = service.post(body(**{field: str(value)}))
        assert response.status_code == 200, response.text
        assert field == "scale" or response.json()[field] == value
    for value in (low - 1, high + 1):
        assert_invalid(service.post(body(**{field: str(value)})), "body", field)


def test_guidance_scale_may_be_fractional_within_its_bounds(service: Service) -> None:
    assert service.post(body(guidance_scale="1.25")).json()["guidance_scale"] == 1.25
    for value in ("0.99", "10.01"):
        assert_invalid(service.post(body(guidance_scale=value)), "body", "guidance_scale")


def test_timeout_is_positive_and_at_most_the_request_timeout(service: Service) -> None:
    assert service.post(body(timeout_seconds="300")).status_code == 200
    for value in ("0", "-1", "300.001"):
        assert_invalid(service.post(body(timeout_seconds=value)), "body", "timeout_seconds")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_every_sampler_is_accepted(service: Service, sampler: str) -> None:
    assert service.post(body(sampler=f'"{sampler}"')).json()["sampler"] == sampler


@pytest.mark.parametrize("field", ["sampler", "model"])
@pytest.mark.parametrize("value", ["null", "7", "true", '""', '"DDPM"', '"other"', "[]", r'"\ud800"', '"\\u0000"'])
def test_unknown_sampler_or_model_is_422(service: Service, field: str, value: str) -> None:
    assert_invalid(service.post(body(**{field: value})), "body", field)


def test_loaded_model_is_named_default(service: Service) -> None:
    assert service.post(body(model='"default"')).json()["model"]["name"] == "default"


@pytest.mark.parametrize("field", ["digits", "Digit", "prompt", "", "ü", "a.b"])
@pytest.mark.parametrize("value", ["1", "null", "9" * 5000])
def test_unknown_field_is_422(service: Service, field: str, value: str) -> None:
    assert_invalid(service.post(body(**{field: value})), "body", field)


def test_field_name_with_a_lone_surrogate_is_422(service: Service) -> None:
    assert_problem(service.post(body(**{r"\ud800": "1"})), 422, "invalid_request")


def test_digit_is_required(service: Service) -> None:
    assert_invalid(service.post(b"{}"), "body", "digit")


def test_errors_list_every_wrong_field(service: Service) -> None:
    problem = assert_problem(service.post(body(digit="10", count="0", colour='"red"')), 422, "invalid_request")
    assert {error["loc"][-1] for error in problem["errors"]} == {"digit", "count", "colour"}


@pytest.mark.parametrize("document", ["[]", "7", '"digit"', "null", "true", '[{"digit": 7}]', "NaN"])
def test_json_that_is_not_an_object_is_422(service: Service, document: str) -> None:
    assert_problem(service.post(document.encode()), 422, "invalid_request")


MALFORMED = {
    "empty": b"",
    "blank": b" \n",
    "not JSON": b"digit=7",
    "truncated": b'{"digit": 7',
    "two documents": b'{"digit": 7}{}',
    "trailing comma": b'{"digit": 7,}',
    "single quotes": b"{'digit': 7}",
    "not UTF-8": b'{"digit": 7, "\xff": 1}',
    "UTF-16": '{"digit": 7}'.encode("utf-16"),
    "unclosed brackets": b"[" * 900,
}


@pytest.mark.parametrize("document", MALFORMED.values(), ids=MALFORMED)
def test_malformed_json_is_400(service: Service, document: bytes) -> None:
    assert_problem(service.post(document), 400, "malformed_json")


LARGEST = 16 * 1024  # the default of UNFOG_MAX_BODY_BYTES


@pytest.mark.parametrize("opening", [b"[", b'{"a":'], ids=["lists", "objects"])
def test_unclosed_brackets_are_malformed_json_at_any_depth(service: Service, opening: bytes) -> None:
    assert_problem(service.post(opening * (LARGEST // len(opening))), 400, "malformed_json")


def test_deep_nesting_is_rejected(service: Service) -> None:
    response = service.post(b'{"digit":' + b"[" * (LARGEST // 2 - 10) + b"]" * (LARGEST // 2 - 10) + b"}")
    assert (response.status_code, response.json()["code"]) in [(400, "malformed_json"), (422, "invalid_request")]


@pytest.mark.parametrize("item", [b"[]", b"{}", b"1", b'""'])
def test_long_list_is_422(service: Service, item: bytes) -> None:
    items = b",".join([item] * (LARGEST // (len(item) + 1) - 10))
    assert_invalid(service.post(b"[" + items + b"]"), "body")
    assert_invalid(service.post(b'{"digit":[' + items + b"]}"), "body", "digit")


def test_response_to_1400_unknown_fields_is_short(service: Service) -> None:
    response = service.post(body(**{f"f{i}": "1" for i in range(1400)}))
    assert_invalid(response, "body", "f0")
    assert len(response.content) < 4096


@pytest.mark.parametrize("value", ["-1", "101", "many", "1.5", "", "1" * 5000])
def test_previews_out_of_range_are_422(service: Service, value: str) -> None:
    assert_invalid(service.post(body(), query=f"?previews={value}"), "query", "previews")


def test_server_chooses_a_missing_seed_and_returns_it(service: Service) -> None:
    first, second = service.post(body()).json(), service.post(body()).json()
    assert first["seed"] != second["seed"]
    assert all(0 <= response["seed"] < 2**53 for response in (first, second))
    assert service.post(body(seed=json.dumps(first["seed"]))).json()["images"] == first["images"]


def test_defaults_are_as_documented(service: Service) -> None:
    response = service.post(b'{"digit": 3}').json()
    del response["seed"], response["timing"], response["model"]
    (image,) = response.pop("images")
    assert image["index"] == 0
    expected = {
        "label": "3",
        "digit": 3,
        "count": 1,
        "num_steps": 100,
        "sampler": "ddpm",
        "guidance_scale": 2.0,
    }
    without_clip = {"clip_guidance_scale": 0.0, "clip_prompt": None, "clip": None, "warning": None}
    assert response == {
        **expected,
        "labels": ["3"],
        "noise": "unfog",
        **without_clip,
        "evaluations": 100 + 61,
    }  # guidance acts at t = 20 to 80


def test_largest_request_succeeds(service: Service) -> None:
    response = service.post(body(count="64", scale="16"), accept="image/png")
    pixels, _, _ = open_png(response.content)
    assert pixels.shape == (8 * 28 * 16, 8 * 28 * 16)
