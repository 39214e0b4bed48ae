"""The schemas of requests with pictures, and of their responses: recognise, denoise, inpaint, edit and reproduce."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.api.schemas import (
    NOT_NULL,
    WHOLE,
    Base64,
    BaseRequest,
    GenerateResponse,
    GuidanceScale,
    ImagesResponse,
    ModelName,
    Number,
    NumSteps,
    SamplerName,
    SamplingRequest,
    TimedRequest,
    Timing,
    may_be_absent,
)
from model.digit_image import Fit, Invert

PICTURE = "A PNG, JPEG, WebP or single-frame GIF file, as a file in multipart/form-data or as base64 in JSON."
AppliedFit = Literal["resize", "digit"]

Digit = Annotated[Annotated[int, Field(ge=0, le=9), WHOLE] | None, NOT_NULL]


class FittedRequest(BaseModel):
    """The fields that control how pictures become images of 28x28 pixels."""

    fit: Fit = Field(
        default="auto",
        description="How the picture becomes 28x28 pixels. resize: the whole picture. digit: the drawing alone, as in "
        "MNIST (longest side 20 pixels, centred by mass). auto: unchanged if the picture has 28x28 pixels, otherwise "
        "digit for /recognize, /edit and /score, and resize for /denoise and /inpaint. With auto and resize, a 28x28 "
        "image that was enlarged by an integer factor is first reduced to its original pixels.",
    )
    invert: Invert = Field(
        default="auto",
        description="true: the picture has dark strokes on a light background. false: light strokes on a dark "
        "background. auto: decided from the picture.",
    )


class PictureRequest(FittedRequest):
    """The fields of every request with one picture."""

    image: Annotated[Base64, Field(description=PICTURE)]


class RecognizeRequest(BaseRequest, PictureRequest):
    """The picture to recognise."""

    num_pairs: Annotated[
        int,
        Field(
            ge=1,
            le=100,
            description="Number of pairs of timestep and noise with which the classes are compared. More pairs are "
            "slower and more accurate. A class that is clearly worse than the best one is dropped early.",
        ),
        WHOLE,
    ] = 20


class DenoiseRequest(SamplingRequest, PictureRequest):
    """The noisy picture to denoise."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {
                    "if": {"properties": {"mode": {"const": "mean"}}, "required": ["mode"]},
                    "then": {"properties": {"num_steps": {"const": 1}, "guidance_scale": {"const": 1}}},
                }
            ]
        }
    )

    digit: Digit = Field(
        default=None,
        description="The digit in the picture. If absent, mode sample recognises it, and mode mean assumes no digit.",
        json_schema_extra=may_be_absent,
    )
    noise_std: Annotated[Annotated[Number, Field(ge=0, le=1000)] | None, NOT_NULL] = Field(
        default=None,
        description="Standard deviation of the noise in grey levels of 0 to 255. If absent, it is estimated.",
        json_schema_extra=may_be_absent,
    )
    mode: Literal["mean", "sample"] = Field(
        default="sample",
        description="mean: the expected image in one network call, which has the highest PSNR but is blurred. sample: "
        "a sharp image by the reverse process.",
    )
    num_steps: NumSteps = Field(
        default=None,
        description="Number of steps from pure noise, 20 by default. An image takes the part of them that begins at "
        "its noise level. With mode mean only 1 is permitted.",
        json_schema_extra=may_be_absent,
    )
    sampler: SamplerName = Field(
        default=None,
        description="As in GenerateRequest, but ddim by default. With ddim all images of a request are equal, because "
        "it adds no noise.",
        json_schema_extra=may_be_absent,
    )


class InpaintRequest(SamplingRequest, PictureRequest):
    """The picture, and the mask of the part to fill in."""

    fit: Fit = Field(
        default="auto",
        description="How both pictures become 28x28 pixels. auto and resize: the whole picture. digit is not "
        "supported, because the mask must fit the image.",
        json_schema_extra={"enum": ["auto", "resize"]},
    )
    mask: Annotated[
        Base64,
        Field(description="A picture of the same size as `image`. White pixels are filled in, black pixels are kept."),
    ]
    digit: Digit = Field(
        default=None,
        description="The digit to generate. If absent, the digit that fits the pixels outside of the mask best.",
        json_schema_extra=may_be_absent,
    )
    num_steps: NumSteps = Field(
        default=None,
        description="Number of noise levels, 10 by default. All but the first are repeated, so that the new pixels fit "
        "the kept pixels.",
        json_schema_extra=may_be_absent,
    )
    guidance_scale: GuidanceScale = Field(
        default=None,
        description="Scale of classifier-free guidance, 1.5 by default. A larger scale makes the border of the mask "
        "visible.",
        json_schema_extra=may_be_absent,
    )


class EditRequest(SamplingRequest, PictureRequest):
    """The sketch to redraw."""

    digit: Digit = Field(
        default=None,
        description="The digit to generate. If absent, the digit that is recognised in the sketch.",
        json_schema_extra=may_be_absent,
    )
    strength: Annotated[
        Number,
        Field(
            ge=0,
            le=1,
            description="How much the result may differ from the sketch. 0 returns the sketch, 1 ignores it. It is a "
            "share of the range of log-SNR, so it has the same meaning for every noise schedule.",
        ),
    ] = 0.6


class ReproduceRequest(TimedRequest):
    """The picture of this service to generate again."""

    image: Annotated[
        Base64,
        Field(
            description="A PNG file of /generate, /v1/images/generations or scripts.sample with its text chunks, as a "
            "file in multipart/form-data or as base64 in JSON. It shows one image, or several images of one digit."
        ),
    ]


class PictureFacts(BaseModel):
    """How the picture was changed before it was used."""

    fit: AppliedFit
    invert: bool


class RecognizeResponse(BaseModel):
    """The recognised digit."""

    digit: int
    probabilities: list[float] = Field(description="The probability of each digit, if the picture shows a digit.")
    is_digit: bool = Field(
        description="false if the picture probably shows no digit. This is wrong for about 1.5% of MNIST's test digits."
    )
    evaluations: int = Field(description="Number of network evaluations.")
    num_pairs: int
    model: ModelName
    fit: AppliedFit
    invert: bool
    timing: Timing


class DenoiseResponse(PictureFacts, ImagesResponse):
    """The denoised images."""

    noise_std: float = Field(description="The standard deviation of the noise that was assumed, in grey levels.")
    mode: Literal["mean", "sample"]
    probabilities: list[float] | None = Field(
        description="The probability of each digit given the noisy image, with 4 decimals. null if the service did "
        "not search for the digit."
    )


class InpaintResponse(PictureFacts, ImagesResponse):
    """Images that equal the picture outside of the mask."""


class EditResponse(PictureFacts, ImagesResponse):
    """Images that are similar to the sketch."""

    strength: float


class ReproduceResponse(GenerateResponse):
    """The newly generated images, and whether they are identical to the picture."""

    identical: bool = Field(description="True if every pixel of the picture is the same.")
    reason: Literal["other_release", "other_pixels"] | None = Field(
        description="null if the picture is identical. other_release: its text chunk Software names another release. "
        "other_pixels: it names this release. The device, the precision or the compile mode differ, or the picture was "
        "altered."
    )
    different_pixels: int = Field(
        description="Number of pixels that differ, before the enlargement by `scale`. An enlarged pixel differs if any "
        "part of it differs."
    )
    largest_difference: int = Field(description="The largest difference of a pixel, in grey levels of 0 to 255.")
