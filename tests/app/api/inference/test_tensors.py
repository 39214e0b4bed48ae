"""Tests of the inputs and outputs of the Open Inference Protocol, in JSON and in binary form."""

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.inference.schemas import InferenceRequest
from app.api.inference.tensors import Array, check_elements, read_inputs, write_outputs
from app.errors import InvalidRequest, MalformedJSON, UnfogError
from tests.app.api.inference.bodies import binary_body, binary_tensor, body_of, raw_of, tensor

LARGEST = 64
IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4, 1)
SEEDS = np.array([2**53 - 1, 1], dtype=np.int64)
ARRAYS: dict[str, Array] = {"image": IMAGES, "seed": SEEDS}


def read(document: Any, largest: int = LARGEST) -> dict[str, list[int]]:
    return {
        name: list(each)
        for name, each in read_inputs(json.dumps(document).encode(), None, largest, "digit").elements.items()
    }


def read_binary(document: dict[str, Any], *raw: bytes) -> dict[str, list[int]]:
    return {
        name: list(each) for name, each in read_inputs(*binary_body(document, *raw), LARGEST, "digit").elements.items()
    }


def test_json_inputs_are_read_by_name_in_any_order() -> None:
    inputs = [tensor("seed", [5, 6]), tensor("digit", [7, 0])]
    assert read({"inputs": inputs}) == {"digit": [7, 0], "seed": [5, 6]}
    assert read(body_of([9])) == {"digit": [9]}


def test_whole_floats_are_integers() -> None:
    elements = read(body_of([7.0], [3.0]))
    assert elements == {"digit": [7], "seed": [3]}
    assert all(type(each) is int for values in elements.values() for each in values)


def test_binary_inputs_follow_the_json_object_in_the_order_of_the_inputs() -> None:
    inputs = [binary_tensor("seed", 2), binary_tensor("digit", 2)]
    assert read_binary({"inputs": inputs}, raw_of([2**53 - 1, 6]), raw_of([7, 0])) == {
        "seed": [2**53 - 1, 6],
        "digit": [7, 0],
    }


@pytest.mark.parametrize("first", ["digit", "seed"])
def test_json_and_binary_inputs_can_be_mixed(first: str) -> None:
    second = {"digit": "seed", "seed": "digit"}[first]
    inputs = [tensor(first, [1, 2]), binary_tensor(second, 2)]
    assert read_binary({"inputs": inputs}, raw_of([3, 4])) == {first: [1, 2], second: [3, 4]}


def test_header_with_the_length_of_the_body_is_accepted_without_binary_inputs() -> None:
    assert read_binary(body_of([1])) == {"digit": [1]}


DIGIT = tensor("digit", [1, 2])
INVALID: dict[str, tuple[Any, str]] = {  # name -> (request, part of the message)
    "list": ([], "body: Input should be an object"),
    "number": (7, "body: Input should be an object"),
    "null": (None, "body: Input should be an object"),
    "no_inputs": ({}, "body.inputs: Field required"),
    "empty_inputs": ({"inputs": []}, "body.inputs: List should have at least 1 item"),
    "inputs_is_an_object": ({"inputs": DIGIT}, "body.inputs: Input should be a valid list"),
    "input_is_a_number": ({"inputs": [1]}, "body.inputs.0: Input should be an object"),
    "three_inputs": ({"inputs": [DIGIT] * 3}, "body.inputs: List should have at most 2 items"),
    "duplicate_input": ({"inputs": [DIGIT, DIGIT]}, "body.inputs: 'digit' occurs more than once"),
    "only_seed": ({"inputs": [tensor("seed", [1])]}, "body.inputs: The input 'digit' is required"),
    "unknown_input": (
        {"inputs": [tensor("class", [1])]},
        "body.inputs.0.name: Input should be 'label', 'digit' or 'seed'",
    ),
    "label_and_digit": (
        {"inputs": [tensor("label", [1]), tensor("digit", [1])]},
        "body.inputs: Send either the input 'label' or the input 'digit', not both",
    ),
    "no_datatype": ({"inputs": [{"name": "digit", "shape": [1], "data": [1]}]}, "inputs.0.datatype: Field required"),
    "int32": ({"inputs": [{**DIGIT, "datatype": "INT32"}]}, "inputs.0.datatype: Input should be 'INT64'"),
    "fp32": ({"inputs": [{**DIGIT, "datatype": "FP32"}]}, "inputs.0.datatype: Input should be 'INT64'"),
    "no_shape": ({"inputs": [{"name": "digit", "datatype": "INT64", "data": [1]}]}, "inputs.0.shape: Field required"),
    "empty_shape": ({"inputs": [{**DIGIT, "shape": []}]}, "inputs.0.shape"),
    "shape_of_a_matrix": ({"inputs": [{**DIGIT, "shape": [2, 1]}]}, "inputs.0.shape"),
    "shape_is_a_number": ({"inputs": [{**DIGIT, "shape": 2}]}, "inputs.0.shape"),
    "other_shape": ({"inputs": [{**DIGIT, "shape": [3]}]}, "inputs.0.data: The shape needs 3 elements, but data has 2"),
    "zero": ({"inputs": [tensor("digit", [])]}, "inputs.0.shape.0: Input should be greater than or equal to 1"),
    "negative_shape": ({"inputs": [{**DIGIT, "shape": [-1]}]}, "inputs.0.shape.0: Input should be greater"),
    "huge_shape": ({"inputs": [{**DIGIT, "shape": [2**62]}]}, "shape.0: Input should be less than or equal to 64"),
    "unsigned_shape": ({"inputs": [{**DIGIT, "shape": [2**64]}]}, "shape.0: Input should be less than or equal to"),
    "shape_is_true": ({"inputs": [{**tensor("digit", [1]), "shape": [True]}]}, "inputs.0.shape.0"),
    "above_the_limit": (body_of([1] * 65), "inputs.0.shape.0: Input should be less than or equal to 64"),
    "seeds_of_another_shape": (body_of([1, 2], [1]), "body.inputs: 'digit' and 'seed' must have the same shape"),
    "no_data": ({"inputs": [{"name": "digit", "datatype": "INT64", "shape": [1]}]}, "either data or the parameter"),
    "null_data": ({"inputs": [{**DIGIT, "data": None}]}, "inputs.0.data"),
    "nested_data": (body_of([[1], [2]]), "inputs.0.data.0: Input should be a valid integer"),
    "true": (body_of([True]), "inputs.0.data.0: Input should be a valid integer"),
    "string": (body_of(["7"]), "inputs.0.data.0: Input should be a valid integer"),
    "fraction": (body_of([1, 7.5]), "inputs.0.data.1: Input should be a valid integer"),
    "nan": (body_of([float("nan")]), "inputs.0.data.0: Input should be a valid integer"),
    "infinity": (body_of([float("inf")]), "inputs.0.data.0: Input should be a valid integer"),
    "null_element": (body_of([None]), "inputs.0.data.0: Input should be a valid integer"),
    "negative": (body_of([-1]), "inputs.0.data.0: Input should be greater than or equal to 0"),
    "beyond_int64": (body_of([2**63]), "inputs.0.data.0: Input should be less than or equal to"),
    "both": (
        {"inputs": [{**DIGIT, "parameters": {"binary_data_size": 16}}]},
        "binary_data_size needs the header Inference-Header-Content-Length",
    ),
    "input_parameter": (
        {"inputs": [{**DIGIT, "parameters": {"shared_memory_region": "a"}}]},
        "inputs.0.parameters.shared_memory_region: Unknown field",
    ),
    "unknown_field": (body_of([1], raw="AA=="), "body.raw: Unknown field"),
    "unknown_parameter": (body_of([1], parameters={"priority": 1}), "parameters.priority: Unknown field"),
    "mistyped_parameter": (body_of([1], parameters={"steps": 1}), "parameters.steps: Unknown field. Did you mean num_"),
    "null_parameters": (body_of([1], parameters=None), "body.parameters: Input should be an object"),
    "parameters_are_a_list": (body_of([1], parameters=[]), "body.parameters: Input should be an object"),
    "output_is_a_string": (body_of([1], outputs=["image"]), "body.outputs.0: Input should be an object"),
    "steps": (body_of([1], parameters={"num_steps": 1001}), "parameters.num_steps: Input should be less"),
    "id_is_a_number": (body_of([1], id=7), "body.id: Input should be a valid string"),
    "unknown_output": (body_of([1], outputs=[{"name": "logits"}]), "outputs.0.name: Input should be 'image' or 'seed'"),
    "duplicate_output": (body_of([1], outputs=[{"name": "seed"}] * 2), "body.outputs: 'seed' occurs more than once"),
    "classification": (
        body_of([1], outputs=[{"name": "image", "parameters": {"classification": 2}}]),
        "outputs.0.parameters.classification: Unknown field",
    ),
    "binary_data_is_a_number": (
        body_of([1], outputs=[{"name": "image", "parameters": {"binary_data": 1}}]),
        "outputs.0.parameters.binary_data: Input should be a valid boolean",
    ),
}


@pytest.mark.parametrize(("document", "message"), INVALID.values(), ids=INVALID)
def test_invalid_request_is_refused_with_the_place_of_the_error(document: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(document)
    assert message in caught.value.detail


TWO = {"inputs": [binary_tensor("digit", 2)]}
INVALID_BINARY: dict[str, tuple[dict[str, Any], bytes, str]] = {
    "too_few_bytes": (TWO, raw_of([1]), "8 bytes follow the JSON object, but the sum of binary_data_size is 16"),
    "too_many_bytes": (TWO, raw_of([1, 2, 3]), "24 bytes follow the JSON object, but the sum"),
    "one_byte_more": (TWO, raw_of([1, 2]) + b"\0", "17 bytes follow the JSON object, but the sum"),
    "no_bytes": (TWO, b"", "0 bytes follow the JSON object, but the sum"),
    "bytes_without_binary_inputs": (body_of([1]), b"\0", "1 bytes follow the JSON object, but the sum"),
    "size_of_int32": ({"inputs": [binary_tensor("digit", 2, 8)]}, raw_of([1]), "The shape needs 16 bytes"),
    "size_is_zero": ({"inputs": [binary_tensor("digit", 2, 0)]}, b"", "The shape needs 16 bytes"),
    "size_is_negative": ({"inputs": [binary_tensor("digit", 1, -8)]}, b"", "binary_data_size: Input should be greater"),
    "size_is_huge": ({"inputs": [binary_tensor("digit", 1, 2**62)]}, raw_of([1]), "The shape needs 8 bytes"),
    "shape_is_huge": ({"inputs": [binary_tensor("digit", 2**59)]}, raw_of([1]), "shape.0: Input should be less"),
    "data_and_binary": (
        {"inputs": [{**DIGIT, "parameters": {"binary_data_size": 16}}]},
        raw_of([1, 2]),
        "either data or the parameter binary_data_size",
    ),
    "sizes_swapped": (
        {"inputs": [binary_tensor("digit", 1, 16), binary_tensor("seed", 2, 8)]},
        raw_of([1, 2, 3]),
        "The shape needs 8 bytes",
    ),
}


@pytest.mark.parametrize(("document", "raw", "message"), INVALID_BINARY.values(), ids=INVALID_BINARY)
def test_invalid_binary_request_is_refused(document: dict[str, Any], raw: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_binary(document, raw)
    assert message in caught.value.detail


@pytest.mark.parametrize("length", ["", " ", "-1", "+5", "5.0", "0x10", "1_0", "\N{ARABIC-INDIC DIGIT FIVE}", "9" * 20])
def test_header_that_is_not_a_number_is_refused(length: str) -> None:
    with pytest.raises(InvalidRequest, match=r"header\.Inference-Header-Content-Length"):
        read_inputs(json.dumps(body_of([1])).encode(), length, LARGEST, "digit")


def test_header_that_is_longer_than_the_body_is_refused() -> None:
    body = json.dumps(body_of([1])).encode()
    with pytest.raises(InvalidRequest, match=f"at most {len(body)} for this body"):
        read_inputs(body, str(len(body) + 1), LARGEST, "digit")


@pytest.mark.parametrize("length", [None, "0", "10"])
def test_header_that_does_not_end_at_the_json_object_gives_malformed_json(length: str | None) -> None:
    body, _ = binary_body(TWO, raw_of([1, 2]))
    with pytest.raises(MalformedJSON, match="Inference-Header-Content-Length"):
        read_inputs(body, length, LARGEST, "digit")


@pytest.mark.parametrize("depth", [500, 10_000])
def test_nested_lists_are_refused(depth: int) -> None:
    body = b'{"inputs": [{"name": "digit", "datatype": "INT64", "shape": [1], "data": ' + b"[" * depth + b"]" * depth
    with pytest.raises(UnfogError):
        read_inputs(body + b"}]}", None, LARGEST, "digit")


@pytest.mark.parametrize("elements", [[10], [0, 10], [2**63 - 1]])
def test_digit_above_the_maximum_is_refused_with_its_position(elements: list[int]) -> None:
    inputs = read_inputs(json.dumps(body_of(elements)).encode(), None, LARGEST, "digit")
    with pytest.raises(InvalidRequest, match=rf"inputs\.0\.data\.{len(elements) - 1}: Input should be from 0 to 9"):
        check_elements(inputs, "digit", 9)


def test_negative_binary_element_is_refused() -> None:
    document = {"inputs": [binary_tensor("digit", 1), binary_tensor("seed", 1)]}
    inputs = read_inputs(*binary_body(document, raw_of([1]), raw_of([-1])), LARGEST, "digit")
    check_elements(inputs, "digit", 9)
    with pytest.raises(InvalidRequest, match=r"inputs\.1\.data\.0: Input should be from 0 to 9007199254740991"):
        check_elements(inputs, "seed", 2**53 - 1)


@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(-5, 400).map(str)))
def test_random_body_is_read_or_refused(body: bytes, length: str | None) -> None:
    with pytest.raises(UnfogError):
        read_inputs(body, length, LARGEST, "digit")


@given(
    digits=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=LARGEST),
    raw=st.binary(max_size=64),
    cut=st.integers(-20, 20),
)
def test_binary_body_is_read_only_if_its_sizes_are_exact(digits: list[int], raw: bytes, cut: int) -> None:
    document = {"inputs": [binary_tensor("digit", len(digits))]}
    body, length = binary_body(document, raw_of(digits), raw)
    if not raw and not cut:
        assert list(read_inputs(body, length, LARGEST, "digit").elements["digit"]) == digits
        return
    with pytest.raises(UnfogError):
        read_inputs(body, str(int(length) + cut), LARGEST, "digit")


# Outputs


def request_of(**fields: Any) -> InferenceRequest:
    return InferenceRequest.model_validate(body_of([1, 2], **fields))


def output(name: str, *, binary: bool | None = None) -> dict[str, Any]:
    return {"name": name} if binary is None else {"name": name, "parameters": {"binary_data": binary}}


def test_response_has_all_outputs_as_flat_lists_by_default() -> None:
    content, length = write_outputs("default", request_of(), ARRAYS)
    assert length is None
    assert json.loads(content) == {
        "model_name": "default",
        "outputs": [
            {"name": "image", "datatype": "UINT8", "shape": [2, 3, 4, 1], "data": list(range(24))},
            {"name": "seed", "datatype": "INT64", "shape": [2], "data": [2**53 - 1, 1]},
        ],
    }


@pytest.mark.parametrize("text", ["42", "", "a" * 1000, 'quote " \\ \N{DIGIT SEVEN} \N{GRINNING FACE} \n'])
def test_response_has_the_id_of_the_request(text: str) -> None:
    content, _ = write_outputs("default", request_of(id=text), ARRAYS)
    assert json.loads(content)["id"] == text


@pytest.mark.parametrize("names", [["image"], ["seed"], ["seed", "image"], ["image", "seed"]])
def test_response_has_only_the_requested_outputs_in_their_order(names: list[str]) -> None:
    content, _ = write_outputs("default", request_of(outputs=[output(name) for name in names]), ARRAYS)
    assert [each["name"] for each in json.loads(content)["outputs"]] == names


def test_empty_list_of_outputs_means_all_outputs() -> None:
    assert write_outputs("default", request_of(outputs=[]), ARRAYS) == write_outputs("default", request_of(), ARRAYS)


BINARY_CASES: list[tuple[dict[str, Any], list[tuple[str, bool]]]] = [
    ({"parameters": {"binary_data_output": True}}, [("image", True), ("seed", True)]),
    ({"outputs": [output("seed", binary=True), output("image", binary=True)]}, [("seed", True), ("image", True)]),
    ({"outputs": [output("seed"), output("image", binary=True)]}, [("seed", False), ("image", True)]),
    (
        {"parameters": {"binary_data_output": True}, "outputs": [output("image", binary=False), output("seed")]},
        [("image", False), ("seed", True)],
    ),
]


@pytest.mark.parametrize(("fields", "expected"), BINARY_CASES)
def test_binary_outputs_follow_the_json_object_in_their_order(
    fields: dict[str, Any], expected: list[tuple[str, bool]]
) -> None:
    content, length = write_outputs("default", request_of(**fields), ARRAYS)
    assert length is not None
    outputs, raw = json.loads(content[:length])["outputs"], content[length:]
    assert [(each["name"], "data" not in each) for each in outputs] == expected
    for each in outputs:
        values = list(range(24)) if each["name"] == "image" else [2**53 - 1, 1]
        if "data" in each:
            assert each["data"] == values
            assert "parameters" not in each
            continue
        size = each["parameters"]["binary_data_size"]
        assert list(struct.unpack("<24B" if each["name"] == "image" else "<2q", raw[:size])) == values
        raw = raw[size:]
    assert raw == b""
