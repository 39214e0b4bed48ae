"""The schemas of POST /score: the similarity of pictures and prompts."""

from typing import Annotated

from pydantic import BaseModel, Field

from app.api.schemas import Base64, ClipName, Prompt, TimedRequest
from app.api.task_schemas import PICTURE, AppliedFit, FittedRequest

MAX_IMAGES, MAX_PROMPTS = 64, 16
DECIMALS = 6  # of a similarity


class ScoreRequest(TimedRequest, FittedRequest):
    """The pictures and the prompts to compare."""

    images: Annotated[
        list[Annotated[Base64, Field(description=PICTURE)]],
        Field(min_length=1, max_length=MAX_IMAGES, description="The pictures."),
    ]
    prompts: Annotated[
        list[Prompt],
        Field(
            min_length=1,
            max_length=MAX_PROMPTS,
            description="The prompts, such as `a handwritten digit seven`. The model ignores words after its context "
            "length.",
        ),
    ]


class ScoredImage(BaseModel):
    """How a picture was changed before it was scored."""

    fit: AppliedFit
    inverted: bool


class RealDigits(BaseModel):
    """The similarities of real digits: images of MNIST's test split, the same number of each class."""

    count: int = Field(description="Number of real digits.")
    similarities: list[list[float]] = Field(
        description="For each prompt: the mean similarity of the real digits of each class, 0 to 9."
    )


class ScoreTiming(BaseModel):
    """Seconds that the request waited in the queue, that CLIP took for it, and that it took in total."""

    queue_seconds: float
    embed_seconds: float
    total_seconds: float


class ScoreResponse(BaseModel):
    """The similarity of each picture and each prompt."""

    clip: ClipName
    prompts: list[str]
    similarities: list[list[float]] = Field(
        description="For each picture: its cosine similarity to each prompt, with 6 decimals."
    )
    images: list[ScoredImage] = Field(description="How each picture was changed.")
    real_digits: RealDigits
    warning: str | None = Field(
        description="Names the words that the model has not learned, and the pictures that no prompt describes. "
        "Otherwise null."
    )
    timing: ScoreTiming
