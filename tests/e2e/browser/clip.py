"""Replaces the parts of the API that need a CLIP model, so that tests of the page know the similarities."""

import json
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Page, Route

CLIP = {"name": "embedded", "sha256": "ab" * 32}
CLIP_FIELDS = ("clip_guidance_scale", "clip_prompt")


def similarity(index: int) -> float:
    """Returns the similarity that the stub gives the image with this index."""
    return round(0.2 + 0.01 * index, 2)


def real_similarity(digit: int) -> float:
    """Returns the similarity that the stub gives real images of the digit."""
    return round(0.5 + 0.01 * digit, 2)


def answer_score(route: Route) -> None:
    """Answers a request to /score with the similarities of the stub."""
    body = route.request.post_data_json
    route.fulfill(json=scores(len(body["images"]), body["prompts"]))


def scores(count: int, prompts: list[str]) -> dict[str, Any]:
    """Returns an answer of /score for this number of images."""
    return {
        "clip": CLIP,
        "prompts": prompts,
        "similarities": [[similarity(index)] * len(prompts) for index in range(count)],
        "images": [{"fit": "resize", "inverted": False}] * count,
        "real_digits": {"count": 100, "similarities": [[real_similarity(digit) for digit in range(10)]] * len(prompts)},
        "timing": {"total_seconds": 0.01},
    }


def stub(clip: dict[str, str] | None = CLIP, score: Callable[[Route], object] = answer_score) -> Callable[[Page], None]:
    """Returns a function that prepares a page: /models has this CLIP model, and `score` answers /score.

    /generate is sent to the service without the fields of CLIP guidance.
    """

    def models(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, json={**response.json(), "clip": clip} if response.ok else None)

    def generate(route: Route) -> None:
        body = route.request.post_data_json
        route.continue_(post_data=json.dumps({name: body[name] for name in body if name not in CLIP_FIELDS}))

    def prepare(page: Page) -> None:
        page.route("**/models", models)
        page.route("**/score", score)
        page.route("**/generate?*", generate)

    return prepare
