"""The groups of routes on /docs, their order, and the short description of each route."""

from typing import Any, NamedTuple


class Group(NamedTuple):
    """Routes that belong together. `summaries` has the short description of each path."""

    name: str
    description: str
    summaries: dict[str, str]


GROUPS = (
    Group(
        "Generate",
        "New images of a digit.",
        {"/generate": "Generate images of a digit"},
    ),
    Group(
        "Pictures",
        "Tasks that start from a picture: as a file in multipart/form-data, or in base64 in JSON.",
        {
            "/recognize": "Recognise the digit in a picture",
            "/denoise": "Remove noise from a picture",
            "/inpaint": "Fill in a part of a picture",
            "/edit": "Redraw a sketch as a digit",
            "/reproduce": "Generate a picture of this service again",
            "/score": "Compare pictures with prompts by CLIP",
        },
    ),
    Group(
        "Service",
        "What the service can do, its state and its metrics.",
        {
            "/models": "List the models and the limits of requests",
            "/events/batch": "Watch the running images",
            "/health": "Get the state of the service",
            "/readyz": "Check whether requests are accepted",
            "/startupz": "Check whether the start is complete",
            "/livez": "Check whether the process must be restarted",
            "/metrics": "Get the metrics for Prometheus",
        },
    ),
    Group(
        "OpenAI Images API",
        "For clients of OpenAI. Errors have the format of that API.",
        {
            "/v1/images/generations": "Generate images of the digit in a prompt",
            "/v1/images/edits": "Redraw a picture, or fill in a part of it",
            "/v1/models": "List the models",
            "/v1/models/{model}": "Get a model",
        },
    ),
    Group(
        "Open Inference Protocol",
        "For clients of Triton and KServe. Errors have the format of that protocol.",
        {
            "/v2/models/{name}/infer": "Generate images from tensors of digits and seeds",
            "/v2/models/{name}": "Get the tensors of a model",
            "/v2/models/{name}/ready": "Check whether a model accepts requests",
            "/v2/health/ready": "Check whether requests are accepted",
            "/v2/health/live": "Check whether the process must be restarted",
            "/v2": "Get the name and the release of the service",
        },
    ),
)


def add_groups(document: dict[str, Any]) -> None:
    """Adds the groups and the short descriptions to an OpenAPI document, and sorts its paths."""
    paths = document["paths"]
    document["tags"] = [{"name": group.name, "description": group.description} for group in GROUPS]
    document["paths"] = {path: paths[path] for group in GROUPS for path in group.summaries} | paths
    for group in GROUPS:
        for path, summary in group.summaries.items():
            for operation in paths[path].values():
                operation |= {"tags": [group.name], "summary": summary}
