"""The schemas of the Open Inference Protocol, version 2. Their descriptions appear in the OpenAPI document."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.tasks.fields import NOT_NULL, WHOLE, GuidanceScale, NumSteps, SamplerName, Seconds, may_be_absent

NAME = "unfog"  # of the server
EXTENSIONS = ["binary_tensor_data"]
PLATFORM = "pytorch_safetensors"  # the protocol's form <project>_<format>
ELEMENT_BYTES = 8  # of INT64
MAX_INT64 = 2**63 - 1

InputName = Literal["label", "digit", "seed"]
OutputName = Literal["image", "seed"]
Whole = Annotated[int, Field(ge=0, le=MAX_INT64), WHOLE]


def _may_be_absent(**fields: Any) -> Any:
    """Returns the default of a field that can be omitted, but not be null."""
    return Field(default=None, json_schema_extra=may_be_absent, **fields)


class _Request(BaseModel):
    """A part of a request. Unknown fields are refused, and types are strict."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class InferenceParameters(_Request):
    """The parameters of a request. They apply to all of its images."""

    num_steps: NumSteps = _may_be_absent(description="Number of denoising steps. If absent, the default of the model.")
    sampler: SamplerName = _may_be_absent(description="If absent, the default of the model.")
    guidance_scale: GuidanceScale = _may_be_absent(
        description="Scale of classifier-free guidance, 1 = off. If absent, the recommendation of the checkpoint for "
        "the sampler."
    )
    timeout_seconds: Seconds = _may_be_absent(
        description="Deadline in seconds. The default depends on the size of the request."
    )
    binary_data_output: bool = Field(
        default=False, description="True if outputs that do not set the parameter `binary_data` are binary."
    )


class InputParameters(_Request):
    """The parameters of an input tensor."""

    binary_data_size: Annotated[Whole | None, NOT_NULL] = _may_be_absent(
        description="Number of bytes of this tensor after the JSON object: 8 for each element. The input then has no "
        "`data`, and the request has the header Inference-Header-Content-Length."
    )


class InputTensor(_Request):
    """An input tensor. Its elements are in `data`, or in binary form after the JSON object."""

    name: InputName = Field(
        description="`label` contains the number of the class of each image, from 0. For a model of digits, `digit` is "
        "the same. `seed` contains the seed of each image, 0 to 2^53 - 1."
    )
    datatype: Literal["INT64"]
    shape: Annotated[
        list[Annotated[int, Field(ge=1, le=MAX_INT64), WHOLE]],
        Field(min_length=1, max_length=1, description="[N], where N is the number of images, at most UNFOG_MAX_COUNT."),
    ]
    parameters: InputParameters = Field(default_factory=InputParameters)
    data: Annotated[Annotated[list[Whole], Field(fail_fast=True)] | None, NOT_NULL] = _may_be_absent(
        description="The N elements."
    )


class OutputParameters(_Request):
    """The parameters of a requested output."""

    binary_data: Annotated[bool | None, NOT_NULL] = _may_be_absent(
        description="True if the output follows the JSON object in binary form. The default is `binary_data_output`."
    )


class RequestedOutput(_Request):
    """An output tensor that the response must contain."""

    name: OutputName
    parameters: OutputParameters = Field(default_factory=OutputParameters)


class InferenceRequest(_Request):
    """A request for one image for each element of the input `label` or `digit`."""

    id: Annotated[str | None, NOT_NULL] = _may_be_absent(description="The response has the same id.")
    # KServe's client sends these two. The path names the model.
    model_name: Annotated[str | None, NOT_NULL] = _may_be_absent(description="Ignored: the path names the model.")
    model_version: Annotated[str | None, NOT_NULL] = _may_be_absent(description="Ignored: models have no versions.")
    parameters: InferenceParameters = Field(default_factory=InferenceParameters)
    inputs: Annotated[
        list[InputTensor], Field(min_length=1, max_length=2, description="`label` or `digit`, and optionally `seed`.")
    ]
    outputs: Annotated[list[RequestedOutput], Field(max_length=2)] = Field(
        default=[], description="The outputs of the response, in this order. If absent or empty: `image` and `seed`."
    )


class OutputTensor(BaseModel):
    """An output tensor, in row-major order."""

    name: OutputName
    datatype: Literal["UINT8", "INT64"]
    shape: list[int]
    parameters: InputParameters | None = Field(default=None, json_schema_extra=may_be_absent)
    data: list[int] | None = Field(
        default=None,
        description="All elements as a flat list. Absent if they are binary.",
        json_schema_extra=may_be_absent,
    )


class InferenceResponse(BaseModel):
    """The images and their seeds."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    id: str | None = Field(default=None, description="The id of the request.", json_schema_extra=may_be_absent)
    outputs: list[OutputTensor]


class InferenceError(BaseModel):
    """An error. The status of the response says which kind of error it is."""

    error: str = Field(description="What is wrong and what to do.")


class ServerLiveness(BaseModel):
    """`live` is false if the engine has failed or is stuck. The process must then be restarted."""

    live: bool


class ServerReadiness(BaseModel):
    """`ready` is true if new requests are accepted."""

    ready: bool


class ServerMetadata(BaseModel):
    """The name and the release of the service, and the extensions of the protocol that it supports."""

    name: str
    version: str
    extensions: list[str]


class ModelReadiness(BaseModel):
    """`ready` is true if the model accepts new requests."""

    name: str
    ready: bool


class TensorMetadata(BaseModel):
    """A tensor of a model. A dimension of -1 can have any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The tensors of a model."""

    name: str
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
