"""Encodes the images of a request as JSON of the OpenAI Images API."""

import time

from app.api.images import encode_base64, encode_images
from app.api.openai.options import Plan
from app.api.openai.prompt import description_of
from app.api.openai.schemas import CreatedImages, ImageData
from app.engine.job import Pixels
from model.png import Provenance


def encode_created(images: list[Pixels], provenance: Provenance, digit: int, plan: Plan) -> bytes:
    """Returns the body of a response. The text chunks of the images contain the provenance."""
    response = CreatedImages(
        created=int(time.time()),
        data=[
            ImageData(b64_json=encode_base64(png), revised_prompt=description_of(digit))
            for png in encode_images(images, provenance, plan.scale)
        ],
        quality=plan.quality,
        size=plan.size,
        seed=provenance.seed,
        model=plan.info.name,
    )
    return response.model_dump_json().encode()
