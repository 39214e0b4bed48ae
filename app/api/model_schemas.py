"""The schemas of the response of GET /models: the served models and the limits of requests."""

from pydantic import BaseModel, Field

from app.api.schemas import ClipName, ModelName
from model.sampler import Sampler


class Evaluation(BaseModel):
    """One measurement of images that the model generated with these options."""

    sampler: Sampler
    num_steps: int
    guidance_scale: float
    num_images: int = Field(description="Number of generated images that were measured.")
    accuracy: float = Field(description="Share of the images that a classifier recognises as the requested digit.")
    frechet: float = Field(description="Fréchet distance to the test images of MNIST. Smaller is better.")


class Training(BaseModel):
    """How the model was trained, and how good its images are. Facts that the checkpoint lacks are absent."""

    preset: str | None = None
    data: str | None = None
    epochs: int | None = None
    evaluations: list[Evaluation]


class ServedModel(ModelName):
    """A served model, and the options that it permits."""

    num_parameters: int
    image_shape: list[int] = Field(description="Channels, height and width of an image.")
    num_classes: int
    max_steps: int = Field(description="The largest permitted num_steps.")
    steps: list[int] = Field(description="The permitted values of num_steps. Empty: all values from 1 to max_steps.")
    default_steps: int
    samplers: list[Sampler] = Field(description="The permitted samplers. The first one is the default.")
    guidable: bool = Field(description="True if a guidance_scale above 1 is permitted.")
    guidance_scale: dict[Sampler, float] = Field(description="The default guidance_scale of each sampler.")
    guidance_interval: dict[Sampler, list[int]] = Field(
        description="The first and the last timestep in which guidance acts, for each sampler."
    )
    alpha_bar: list[float] = Field(description="The noise schedule alpha_bar_t for t = 0 to T, with 6 decimals.")
    has_picture_tasks: bool = Field(
        description="True if /recognize, /denoise, /inpaint and /edit permit the model. They need images of 28x28 grey "
        "pixels, and a model that permits any number of steps."
    )
    training: Training
    device: str
    dtype: str
    compiled: bool


class Limits(BaseModel):
    """The limits of a request. The settings define them."""

    count: int = Field(description="The largest number of images of a request.")
    timeout_seconds: float = Field(description="The largest timeout_seconds.")
    image_bytes: int = Field(description="The largest body with pictures, in bytes.")
    queue_images: int = Field(description="The largest number of images that wait in the queue.")


class Models(BaseModel):
    """The served models and the limits of requests."""

    models: list[ServedModel]
    limits: Limits
    clip: ClipName | None = Field(
        default=None,
        description="The CLIP model. It is null if the service runs without CLIP. /score then answers 501.",
    )
