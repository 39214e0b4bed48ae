"""Reads the input tensors of an inference request and writes the output tensors, in JSON or in binary form.

A body with binary tensors starts with a JSON object. The header Inference-Header-Content-Length contains its length in
bytes. The elements follow without padding, in little-endian byte order and in the order of the tensors in the JSON
object.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from app.api.http.requests import parse_json, validate
from app.api.inference.schemas import ELEMENT_BYTES, InferenceRequest, InputTensor
from app.errors import InvalidRequest, MalformedJSON

LENGTH_HEADER = "Inference-Header-Content-Length"
LENGTH = re.compile("[0-9]{1,19}")

Array = npt.NDArray[np.uint8] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Inputs:
    """A validated request and the elements of its inputs."""

    request: InferenceRequest
    label: str  # the name of the input with the classes
    elements: Mapping[str, Sequence[int]]  # name -> the elements; all have the same number


def read_inputs(body: bytes, length: str | None, largest: int, label: str) -> Inputs:
    """Reads a body. `length` is the header with the length of the JSON object. `largest` is the limit of images.

    `label` is the name of the input for the classes in the metadata of the model: `digit` or `label`.

    Does not check the ranges of the elements. Raises MalformedJSON or InvalidRequest.
    """
    end = len(body) if length is None else _length_of(length, len(body))
    request = validate(_parse(body[:end], is_whole=length is None), InferenceRequest)
    _check_names(request)
    has_binary = any(each.parameters.binary_data_size is not None for each in request.inputs)
    if has_binary and length is None:
        raise _invalid(
            "inputs", f"binary_data_size needs the header {LENGTH_HEADER}. Set it to the bytes of the JSON object"
        )
    for index, tensor in enumerate(request.inputs):
        _check_size(tensor, index, largest)
    sizes = [each.parameters.binary_data_size or 0 for each in request.inputs]
    if sum(sizes) != len(body) - end:
        raise _invalid(
            "inputs",
            f"{len(body) - end} bytes follow the JSON object, but the sum of binary_data_size is {sum(sizes)}. "
            "They must be equal",
        )
    ranges = pairwise(accumulate(sizes, initial=end))
    elements: dict[str, Sequence[int]] = {
        tensor.name: np.frombuffer(body[start:stop], "<i8").tolist() if tensor.data is None else tensor.data
        for tensor, (start, stop) in zip(request.inputs, ranges, strict=True)
    }
    names = [name for name in elements if name in ("label", label)]
    if not names:
        raise _invalid("inputs", f"The input '{label}' is required")
    if "digit" in elements and label != "digit":
        raise _invalid("inputs", "The classes of this model are not digits. Leave out the input 'digit'")
    if len(names) > 1:
        raise _invalid("inputs", "Send either the input 'label' or the input 'digit', not both")
    if len({len(each) for each in elements.values()}) > 1:
        raise _invalid("inputs", f"'{names[0]}' and 'seed' must have the same shape")
    return Inputs(request, names[0], elements)


def check_elements(inputs: Inputs, name: str, maximum: int) -> None:
    """Raises InvalidRequest if an element of an input is below 0 or above the maximum. The input may be absent."""
    for position, element in enumerate(inputs.elements.get(name, ())):
        if not 0 <= element <= maximum:
            index = next(i for i, each in enumerate(inputs.request.inputs) if each.name == name)
            raise _invalid("inputs", index, "data", position, f"Input should be from 0 to {maximum} for '{name}'")


def write_outputs(model: str, request: InferenceRequest, arrays: Mapping[str, Array]) -> tuple[bytes, int | None]:
    """Returns the body of a response, and the length of its JSON object if binary tensors follow it."""
    default = request.parameters.binary_data_output
    binary: dict[str, bool] = {
        each.name: default if each.parameters.binary_data is None else each.parameters.binary_data
        for each in request.outputs
    } or dict.fromkeys(arrays, default)
    head = {"model_name": model} | ({} if request.id is None else {"id": request.id})
    outputs = ", ".join(_output_text(name, arrays[name], is_binary=binary[name]) for name in binary)
    text = f'{json.dumps(head)[:-1]}, "outputs": [{outputs}]}}'.encode()
    if not any(binary.values()):
        return text, None
    raw = [_little_endian(arrays[name]) for name in binary if binary[name]]
    return b"".join((text, *raw)), len(text)


def _little_endian(array: Array) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def _output_text(name: str, array: Array, *, is_binary: bool) -> str:
    """Returns an output as JSON text."""
    output: dict[str, Any] = {"name": name, "datatype": array.dtype.name.upper(), "shape": list(array.shape)}
    if is_binary:
        return json.dumps({**output, "parameters": {"binary_data_size": array.nbytes}})
    return f'{json.dumps(output)[:-1]}, "data": [{", ".join(_texts(array))}]}}'


def _texts(array: Array) -> Iterator[str]:
    """Yields the elements of each image as JSON text. Other threads can run between two images, but not within one."""
    for part in array:
        yield json.dumps(np.ravel(part).tolist())[1:-1]


def _length_of(length: str, available: int) -> int:
    """Returns the length of the JSON object. Raises InvalidRequest if the header is not a number, or is too large."""
    if not LENGTH.fullmatch(length) or int(length) > available:
        message = f"Input should be the number of bytes of the JSON object, at most {available} for this body"
        raise InvalidRequest([{"loc": ["header", LENGTH_HEADER], "msg": message}])
    return int(length)


def _parse(text: bytes, *, is_whole: bool) -> Any:
    try:
        return parse_json(text)
    except MalformedJSON:
        if is_whole:
            what, hint = "The body is", f"If binary tensors follow the JSON object, set the header {LENGTH_HEADER}"
        else:
            what, hint = "The start of the body is", f"Set {LENGTH_HEADER} to the bytes of the JSON object"
        raise MalformedJSON(f"{what} not valid JSON in UTF-8. {hint}") from None


def _check_names(request: InferenceRequest) -> None:
    """Raises InvalidRequest if two inputs or two outputs have the same name."""
    for field, tensors in (("inputs", request.inputs), ("outputs", request.outputs)):
        names = [each.name for each in tensors]
        if len(set(names)) < len(names):  # there are at most two
            raise _invalid(field, f"'{names[0]}' occurs more than once. Send it once")


def _check_size(tensor: InputTensor, index: int, largest: int) -> None:
    """Raises InvalidRequest unless the shape is permitted and the tensor has exactly as many elements."""
    (number,), size = tensor.shape, tensor.parameters.binary_data_size
    if number > largest:
        raise _invalid("inputs", index, "shape", 0, f"Input should be less than or equal to {largest}")
    if (tensor.data is None) == (size is None):
        raise _invalid("inputs", index, "Input should have either data or the parameter binary_data_size")
    if tensor.data is not None and len(tensor.data) != number:
        raise _invalid("inputs", index, "data", f"The shape needs {number} elements, but data has {len(tensor.data)}")
    if size is not None and size != ELEMENT_BYTES * number:
        message = f"The shape needs {ELEMENT_BYTES * number} bytes"
        raise _invalid("inputs", index, "parameters", "binary_data_size", message)


def _invalid(*location_and_message: str | int) -> InvalidRequest:
    """Returns the error for a place in the JSON object. The last argument is the message."""
    *location, message = location_and_message
    return InvalidRequest([{"loc": ["body", *location], "msg": message}])
