"""Examples in the OpenAPI document: one for each request and each answer that is text."""

from typing import Any

from app import VERSION, errors
from app.api.events import event_text
from app.settings import Settings

REQUEST_ID = "5f1c7a9be0d34b6c8a2f4e6d7c9b0a18"

# Drawn by the shipped checkpoint: digit 7, seed 42. The preview is the same picture without text chunks.
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAAAAABXZoBIAAAAFHRFWHRTb2Z0d2FyZQB1bmZvZyAwLjEuMLhqcRgAAAAHdEVYdERpZ2l0ADel"
    "uVnSAAAAB3RFWHRTZWVkADQyYBB3oAAAAAd0RVh0SW5kZXgAMENjoQUAAAAMdEVYdFNhbXBsZXIAZGRwbYEMIlIAAAAJdEVYdFN0ZXBzADEw"
    "MDMLFk4AAAASdEVYdEd1aWRhbmNlLVNjYWxlADMuMGSo5boAAABNdEVYdE1vZGVsLVNIQTI1NgBmMzhiZjc2N2Y3Njg4ZGM3ZjE4MTY1Y2Jk"
    "YjI4MGVlNTExNWRjZWFmMTU2MTRmNDM2YjYwOTFiYWI1NTMyMTIw4QectwAAASlJREFUeJyNUTEvBFEQ/r739txtsblc4SJqItFohFIj8QNE"
    "p9ASjZ9B9Ej8B6VEaDRyoVEpTiJcBKEgTnZvz75R3LLv8Q6TvJfMzDcz33wDeIy+4J+4/1a5aP5ayvynE6O36DMoiKYmarOj3aGVLYqTnLnB"
    "wuJI8njbfF8+nutIUaxQj0Wy1vrYgAauJPoaEADCp8uDRnb0DAql1qm0xR6sQrBHCXVzWFBTACAJBT14hS8gIMzbApI/QFWlWbiBu5mZRxwy"
    "MR59COzKvWmsfdcMAEvjG3dytj2oPPrqnWvJ4smAAH9ouXqx2cr2qvQeRoU4l2n2uRnxIGVloe2kBPq1ZK3hEKM2kd1VOSKX39LUCdi21D2x"
    "XVs+IlWnHpa5Dbf3+/QkoOl0+gDkHFljC0XXWAAAAABJRU5ErkJggg=="
)
PREVIEW = (
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAAAAABXZoBIAAABKUlEQVR4nI1RMS8EURD+vvf23G2xuVzhImoi0WiEUiPxA0Sn0BKNn0H0SPwH"
    "pURoNHKhUSlOIlwEoSBOdm/PvlHcsu/xDpO8l8zMNzPffAN4jL7gn7j/Vrlo/lrK/KcTo7foMyiIpiZqs6PdoZUtipOcucHC4kjyeNt8Xz6e"
    "60hRrFCPRbLW+tiABq4k+hoQAMKny4NGdvQMCqXWqbTFHqxCsEcJdXNYUFMAIAkFPXiFLyAgzNsCkj9AVaVZuIG7mZlHHDIxHn0I7Mq9aax9"
    "1wwAS+Mbd3K2Pag8+uqda8niyYAAf2i5erHZyvaq9B5GhTiXafa5GfEgZWWh7aQE+rVkreEQozaR3VU5Ipff0tQJ2LbUPbFdWz4iVacelrkN"
    "t/f79CSg6XT6AOQcWWMLRddYAAAAAElFTkSuQmCC"
)
SHA256 = "f38bf767f7688dc7f18165cbdb280ee5115dceaf15614f436b6091bab5532120"
TIMING = {"queue_seconds": 0.000214, "denoise_seconds": 0.412806, "total_seconds": 0.413325}

GENERATED = {
    "digit": 7,
    "count": 1,
    "seed": 42,
    "num_steps": 100,
    "sampler": "ddpm",
    "guidance_scale": 3.0,
    "model": {"name": "default", "sha256": SHA256},
    "images": [{"index": 0, "png": PNG}],
    "timing": TIMING,
}
EVENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("accepted", {"seed": 42, "position": 0, "eta_seconds": 0.41}),
    ("progress", {"step": 90, "of": 100, "previews": [PREVIEW]}),
    ("image", {"index": 0, "png": PNG}),
    ("done", {"seed": 42, "timing": TIMING}),
)
STREAM = "".join(event_text(name, data) for name, data in EVENTS)

_QUEUE = {"waiting": 0, "running": 0, "capacity": 1024}
_MODEL = {"name": "default", "sha256": SHA256, "num_parameters": 2_703_684}
HEALTHY = {
    "status": "ok",
    "version": VERSION,
    "model": _MODEL,
    "models": [_MODEL],
    "device": "cpu",
    "dtype": "bfloat16",
    "compiled": True,
    "queue": _QUEUE,
    "uptime_seconds": 86400.25,
}
STARTING = {"status": "starting", "version": VERSION, "queue": _QUEUE, "uptime_seconds": 1.5}
METRICS = (
    "# HELP unfog_ready 1 while new work is taken.\n# TYPE unfog_ready gauge\nunfog_ready 1.0\n"
    "# HELP unfog_requests_total Requests.\n# TYPE unfog_requests_total counter\n"
    'unfog_requests_total{code="200",route="/generate"} 42.0\n'
)
ANSWERS: dict[tuple[str, str, str], Any] = {  # by path, status and media type
    ("/generate", "200", "application/json"): GENERATED,
    ("/generate", "200", "text/event-stream"): STREAM,
    ("/health", "200", "application/json"): HEALTHY,
    ("/health", "503", "application/json"): STARTING,
    ("/livez", "200", "application/json"): {"alive": True},
    ("/livez", "503", "application/json"): {"alive": False},
    ("/readyz", "200", "application/json"): {"ready": True},
    ("/readyz", "503", "application/json"): {"ready": False},
    ("/startupz", "200", "application/json"): {"ready": True},
    ("/startupz", "503", "application/json"): {"ready": False},
    ("/metrics", "200", "text/plain"): METRICS,
}


def requests(settings: Settings, num_classes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Returns examples of bodies for /generate. `num_classes` is the number of classes of each served model.

    The page of the documentation sends the first one unless the user changes it.
    """
    default, *others = num_classes
    digits = {name: min(7, number - 1) for name, number in num_classes.items()}
    count = min(9, settings.largest_request)
    bodies = {
        "one": ("One digit", {"digit": digits[default]}),
        "seed": ("A digit that can be drawn again", {"digit": digits[default], "seed": 42}),
        "several": ("Several digits, enlarged", {"digit": digits[default], "count": count, "scale": 4}),
        **{name: (f"A digit from the model {name}", {"digit": digits[name], "model": name}) for name in others},
    }
    return {name: {"summary": summary, "value": body} for name, (summary, body) in bodies.items()}


def problems(settings: Settings) -> list[dict[str, Any]]:
    """Returns an example of each problem document of /generate."""
    examples: list[errors.UnfogError] = [
        errors.MalformedJSON(),
        errors.MalformedRequest(),
        errors.Unauthorized(),
        errors.Forbidden(),
        errors.NotAcceptable(("application/json", "image/png", "application/zip", "text/event-stream")),
        errors.RequestTimeout(),
        errors.BodyTooLarge(settings.max_body_bytes),
        errors.UnsupportedMediaType(),
        errors.InvalidRequest.of("digit", "Input should be less than or equal to 9"),
        errors.Overloaded(4),
        errors.HeadersTooLarge(),
        errors.RateLimited(12),
        errors.InternalError(),
        errors.Starting(10),
        errors.Draining(10),
        errors.EngineFailed(10),
        errors.DeadlineExceeded(),
    ]
    return [error.problem(REQUEST_ID) for error in examples]
