"""GET /models: what each served model permits, and the limits of requests."""

from dataclasses import asdict

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from app.api.native.examples import CLIP, SHA256
from app.api.native.schemas import ModelName
from app.api.operations import READ_STATUSES, Operation, Router
from app.api.service import ServiceDependency
from app.engine.interface import ModelInfo
from app.tasks.from_image import has_picture_tasks
from model.schedule import Schedule, ScheduleConfig
from model.spec import DIGITS, MOST_STEPS, QUALITIES, Quality, Sampler

router = Router()

DECIMALS = 6  # of alpha_bar


class Evaluation(BaseModel):
    """One measurement of images that the model generated with these options."""

    sampler: Sampler
    num_steps: int
    guidance_scale: float
    num_images: int = Field(description="Number of generated images that were measured.")
    accuracy: float = Field(description="Share of the images that a classifier recognises as the requested class.")
    frechet: float = Field(description="Fréchet distance to the test images of the data. Smaller is better.")


class Training(BaseModel):
    """How the model was trained, and how good its images are. Facts that the checkpoint lacks are absent."""

    preset: str | None = None
    data: str | None = None
    epochs: int | None = None
    evaluations: list[Evaluation]


class QualitySetting(BaseModel):
    """The sampler and the number of steps of a quality."""

    sampler: Sampler
    num_steps: int


class ServedModel(ModelName):
    """A served model, and the options that it permits."""

    num_parameters: int
    image_shape: list[int] = Field(description="Channels, height and width of an image.")
    num_classes: int
    class_names: list[str] = Field(description="The name of each class. Its place, from 0, is its number.")
    normalises_drawings: bool = Field(
        description="True if drawings are normalised as in MNIST: light strokes on black, centred by mass."
    )
    max_steps: int = Field(description="The largest permitted num_steps.")
    steps: list[int] = Field(description="The permitted values of num_steps. Empty: all values from 1 to max_steps.")
    default_steps: int
    samplers: list[Sampler] = Field(description="The permitted samplers. The first one is the default.")
    qualities: dict[Quality, QualitySetting] = Field(description="What each `quality` of /generate means.")
    guidable: bool = Field(description="True if a guidance_scale above 1 is permitted.")
    guidance_scale: dict[Sampler, float] = Field(description="The default guidance_scale of each sampler.")
    guidance_interval: dict[Sampler, list[int]] = Field(
        description="The first and the last timestep in which guidance acts, for each sampler."
    )
    alpha_bar: list[float] = Field(description="The noise schedule alpha_bar_t for t = 0 to T, with 6 decimals.")
    has_picture_tasks: bool = Field(
        description="True if the tasks with a picture permit the model. They need one that permits any number of steps."
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
    clip: ModelName | None = Field(
        default=None,
        description="The CLIP model. It is null if the service runs without CLIP. /score then answers 501.",
    )


EXAMPLE = {  # the shipped checkpoint
    "models": [
        {
            "name": "default",
            "sha256": SHA256,
            "num_parameters": 2_703_684,
            "image_shape": [1, 28, 28],
            "num_classes": 10,
            "class_names": list(DIGITS),
            "normalises_drawings": True,
            "max_steps": 100,
            "steps": [],
            "default_steps": 100,
            "samplers": ["ddpm", "ddim", "dpmpp"],
            "qualities": {
                "draft": {"sampler": "dpmpp", "num_steps": 6},
                "balanced": {"sampler": "dpmpp", "num_steps": 10},
                "best": {"sampler": "ddpm", "num_steps": 100},
            },
            "guidable": True,
            "guidance_scale": {"ddpm": 2.5, "ddim": 1.4, "dpmpp": 1.4},
            "guidance_interval": {"ddpm": [20, 65], "ddim": [40, 90], "dpmpp": [40, 90]},
            "alpha_bar": [round(value, 6) for value in Schedule(ScheduleConfig()).alpha_bar.tolist()],
            "has_picture_tasks": True,
            "training": {
                "preset": "default-high-noise",
                "data": "MNIST, training split less the last 5000 images",
                "epochs": 6,
                "evaluations": [
                    {
                        "sampler": "ddpm",
                        "num_steps": 100,
                        "guidance_scale": 2.5,
                        "num_images": 10_000,
                        "accuracy": 0.996,
                        "frechet": 0.09899599827491556,
                    }
                ],
            },
            "device": "cpu",
            "dtype": "bfloat16",
            "compiled": True,
        }
    ],
    "limits": {"count": 64, "timeout_seconds": 600.0, "image_bytes": 4_194_304, "queue_images": 1024},
    "clip": CLIP,
}


@router.operation(
    Operation(
        path="/models",
        name="get_models",
        group="Models",
        summary="List the models and the limits of requests",
        answer=Models,
        example=EXAMPLE,
        statuses=READ_STATUSES,
    )
)
async def models(service: ServiceDependency) -> JSONResponse:
    """Returns the served models with the options that they permit, and the limits of requests."""
    settings = service.settings
    answer = Models(
        models=[_describe(info) for info in service.models.values()],
        limits=Limits(
            count=settings.largest_request,
            timeout_seconds=settings.longest_timeout,
            image_bytes=settings.max_image_bytes,
            queue_images=settings.queue_capacity,
        ),
    )
    clip = service.engine.clip
    content = {**answer.model_dump(exclude_none=True), "clip": asdict(clip.info) if clip else None}
    return JSONResponse(content, headers={"Cache-Control": "no-store"})


def _describe(info: ModelInfo) -> ServedModel:
    facts = info.training
    return ServedModel(
        name=info.name,
        sha256=info.sha256,
        num_parameters=info.num_parameters,
        image_shape=list(info.image_shape),
        num_classes=info.num_classes,
        class_names=list(info.class_names),
        normalises_drawings=info.normalises_drawings,
        max_steps=min(info.max_steps, MOST_STEPS),
        steps=list(info.steps),
        default_steps=info.default_steps,
        samplers=list(info.samplers),
        qualities={quality: QualitySetting(**info.setting_of(quality)._asdict()) for quality in QUALITIES},
        guidable=info.guidable,
        guidance_scale=info.guidance_scale,
        guidance_interval={sampler: list(interval) for sampler, interval in info.guidance_interval.items()},
        alpha_bar=[round(value, DECIMALS) for value in info.schedule.alpha_bar.tolist()],
        has_picture_tasks=has_picture_tasks(info),
        training=Training(
            preset=facts.preset,
            data=facts.data,
            epochs=facts.epochs,
            evaluations=[Evaluation(**asdict(each)) for each in facts.evaluations],
        ),
        device=info.device,
        dtype=info.dtype,
        compiled=info.compiled,
    )
