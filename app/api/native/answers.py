"""The formats of generated images: JSON, a PNG file, a ZIP archive, or a stream of events."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from app.api.http.media_types import JSON, PNG, ZIP
from app.api.native.events import UnfogEvents
from app.api.native.schemas import GeneratedImage, ImagesResponse, ModelName, Timing
from app.engine.job import Job, Pixels
from app.tasks.images import encode_base64, encode_images, encode_sheet, encode_zip
from app.tasks.task import Task
from model.png import Provenance
from model.spec import Sampler


@dataclass(frozen=True, slots=True)
class ImagesFormat:
    """The formats of the images of a task. `schema` is that of a JSON answer."""

    schema: type[ImagesResponse]

    def events(self, task: Task, provenance: Callable[[], Provenance]) -> UnfogEvents:
        """Returns the format of the events of a stream."""
        return UnfogEvents(provenance, task)

    def encode(self, media_type: str, task: Task, job: Job, images: list[Pixels], provenance: Provenance) -> bytes:
        """Returns the body of the answer of a finished job: JSON, a PNG file or a ZIP archive."""
        if media_type == JSON:
            return self._encode_json(task, job, images, provenance)
        encode = {PNG: encode_sheet, ZIP: encode_zip}[media_type]
        return encode(images, provenance, task.scale)

    def _encode_json(self, task: Task, job: Job, images: list[Pixels], provenance: Provenance) -> bytes:
        pngs, options = encode_images(images, provenance, task.scale), task.options
        response = self.schema(
            **task.class_facts(job.label),
            count=task.job.count,
            seed=options.seed,
            num_steps=task.num_steps,
            sampler=cast(Sampler, options.sampler),  # only recognition has another process
            guidance_scale=options.guidance_scale,
            model=ModelName(name=options.model, sha256=provenance.model_sha256),
            evaluations=job.request.network_evaluations,
            images=[
                GeneratedImage(index=i, png=encode_base64(png)) for i, png in enumerate(pngs, provenance.first_index)
            ],
            timing=Timing.of(job.timings),
            **task.facts,
            **task.result_facts(),
        )
        return response.model_dump_json().encode()
