"""The schemas of requests, responses and events of the OpenAI Images API.

The names of the fields are those of OpenAI. In a request, null means that an optional field is absent. Fields that have
no meaning for this service are ignored. They are refused if the client would get another result than it expects.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from app.api.http.picture_fields import Base64
from app.engine.job import FAST_MODEL
from app.tasks.fields import WHOLE, may_be_absent
from model.png import MAX_SEED

MAX_PROMPT = 32_000  # characters, as in OpenAI's API
MAX_IMAGES = 10
MAX_PARTIAL_IMAGES = 3
AUTO = "auto"
GENERATION, EDIT = "image_generation", "image_edit"  # prefixes of the types of events
UNSUPPORTED = ("markup", "svg")  # fields of OpenAI that are refused, unless they are null

UsedQuality = Literal["low", "medium", "high"]
Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]


def _refuse(value: Any) -> Any:
    raise ValueError("This field is not supported. Leave it out")


Ignored = Annotated[Any, Field(description="Ignored, whatever its value.")]
Unsupported = Annotated[Any, BeforeValidator(_refuse)]


class ImagesRequest(BaseModel):
    """The fields of both requests."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_PROMPT,
            description="A text that names exactly one class of the model. A digit is named as a figure or as an "
            "English word.",
        ),
    ]
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES, description="Number of images."), WHOLE] = 1
    size: str = Field(
        default=AUTO,
        description="Width and height: a multiple of the size of the images of the model. auto: about 280 pixels.",
    )
    model: str | None = Field(
        default=None,
        max_length=128,
        description="A served model. Without it, or with the name of an OpenAI model (gpt-image-..., dall-e-..., "
        "chatgpt-image-...), the default model is used: the first one in GET /models.",
        json_schema_extra=may_be_absent,
    )
    quality: Quality = Field(default="auto")
    stream: bool = Field(
        default=False, description="true: the response is a stream of events, whatever Accept contains."
    )
    partial_images: Annotated[
        int,
        Field(ge=0, le=MAX_PARTIAL_IMAGES, description="Maximum number of partial images of each image in a stream."),
        WHOLE,
    ] = 0
    seed: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_SEED,
            description="Random seed. If absent, the server chooses and returns one. OpenAI does not have this field.",
            json_schema_extra=may_be_absent,
        ),
        WHOLE,
    ] = None
    background: Literal["auto", "opaque"] = Field(default="auto", description="The images are always opaque.")
    output_format: Literal["png"] = Field(default="png", description="The images are always PNG files.")
    response_format: Literal["b64_json"] = Field(default="b64_json", description="The images are always in base64.")
    frame_count: Annotated[int, Field(ge=1, le=1, description="An image has one frame."), WHOLE] = 1
    complexity: Ignored = None
    frame_duration_ms: Ignored = None
    output_compression: Ignored = None
    safety_identifier: Ignored = None
    user: Ignored = None
    svg: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        """Removes optional fields that are null."""
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in fields.items() if value is not None or name not in optional}


class ImageGenerationRequest(ImagesRequest):
    """The images to generate."""

    quality: Quality = Field(
        default="auto",
        description=f"low: the model `{FAST_MODEL}` if it is served, otherwise the quality `draft` of /generate. "
        "medium: the quality `balanced`. Every other value: the defaults of the model (100 steps for the shipped "
        "checkpoint). With the model `fast`, the quality has no effect.",
    )
    moderation: Ignored = None
    style: Ignored = None


class ImageEditRequest(ImagesRequest):
    """The picture to redraw. With a mask, only the part under its transparent pixels is filled in."""

    image: Annotated[Base64, Field(description="A PNG, JPEG, WebP or single-frame GIF file.")]
    mask: Base64 | None = Field(
        default=None,
        description="A picture of the same size as `image`, with transparency. Pixels with alpha 0 are filled in. All "
        "other pixels are kept.",
        json_schema_extra=may_be_absent,
    )
    quality: Quality = Field(
        default="auto",
        description="low, medium: the sampler and the steps of the quality `balanced` of /generate. Every other value: "
        "the defaults of /edit. With a mask, the quality has no effect: the defaults of /inpaint are used.",
    )
    input_fidelity: Ignored = None
    markup: Unsupported = Field(default=None, json_schema_extra={"contentEncoding": "base64"})


class InputTokensDetails(BaseModel):
    """The counts of tokens by kind. They are always 0."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """All counts are 0, because the service counts no tokens. Some clients need the fields."""

    input_tokens: int = 0
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class ImageFacts(BaseModel):
    """How the images were generated."""

    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    quality: UsedQuality = Field(description="The quality that was used.")
    size: str


class ImageData(BaseModel):
    """One image as a PNG file in base64."""

    b64_json: str
    revised_prompt: str = Field(description="What the image shows.")


class CreatedImages(ImageFacts):
    """The images. `seed` and `model` are not in OpenAI's API."""

    created: int = Field(description="Unix time of the response.")
    data: list[ImageData]
    usage: Usage = Usage()
    seed: int
    model: str = Field(description="The served model that was used.")


class PartialImage(ImageFacts):
    """The image that the model predicts at a step. `index` and `seed` are not in OpenAI's API."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    b64_json: str
    created_at: int = Field(description="Unix time of the event.")
    partial_image_index: int = Field(description="Number of earlier partial images of this image.")
    index: int = Field(description="Index of the image within its request.")
    seed: int


class CompletedImage(ImageFacts):
    """A finished image. `index` and `seed` are not in OpenAI's API."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    b64_json: str
    created_at: int = Field(description="Unix time of the event.")
    usage: Usage = Usage()
    index: int = Field(description="Index of the image within its request.")
    seed: int


class OpenAIErrorDetails(BaseModel):
    """The details of an error."""

    message: str
    type: str
    param: str | None = Field(description="The field that is wrong, or null.")
    code: str


class OpenAIError(BaseModel):
    """An error in the format of OpenAI."""

    error: OpenAIErrorDetails


class OpenAIModel(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time of the start of the service.")
    owned_by: Literal["unfog"] = "unfog"


class OpenAIModels(BaseModel):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]
