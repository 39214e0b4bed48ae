"""The query parameters for the content of an event stream and the number of frames of an animation.

Other formats check them and do not use them.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Query

Previews = Annotated[
    int,
    Query(
        ge=0,
        le=100,
        description="Approximate number of progress events of a stream, or number of frames of an animation, which has "
        "at most one for each step. Other formats ignore it.",
        examples=[10],
    ),
]
Include = Annotated[
    Literal["x_t"],
    Query(description="x_t: each progress event also has x_t of each image. Other formats ignore it."),
]


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """The number of progress events of a stream or of frames of an animation, and the content of the events."""

    num_previews: int = 0
    includes_x_t: bool = False

    @property
    def images_per_preview(self) -> int:
        """The number of pictures of one image in a progress event."""
        return 2 if self.includes_x_t else 1


NO_STREAM = StreamOptions()


async def _stream_options(
    previews: Previews = 10,
    include: Include = None,  # type: ignore[assignment] # FastAPI does not validate the default
) -> StreamOptions:
    return StreamOptions(previews, includes_x_t=include == "x_t")


StreamOptionsDependency = Annotated[StreamOptions, Depends(_stream_options)]
