"""The examples of request bodies that the operations declare."""

from typing import Any

from app.api.operations import Operation
from app.main import PROBE_ROUTERS, READ_ROUTERS, WORK_ROUTERS

OPERATIONS: dict[str, Operation] = {
    operation.path: operation
    for router in (*WORK_ROUTERS, *READ_ROUTERS, *PROBE_ROUTERS)
    for operation in router.operations
}


def bodies_of(path: str) -> dict[str, dict[str, Any]]:
    """Returns the example bodies in JSON of an operation by name."""
    body = OPERATIONS[path].body
    assert body is not None
    return {name: example["value"] for name, example in body["application/json"]["examples"].items()}


REQUESTS = {path: bodies_of(path) for path, operation in OPERATIONS.items() if operation.body}
GENERATING = [path for path, each in OPERATIONS.items() if each.stream and each.group == "Pictures"]
PICTURE_TASKS = ["/recognize", *GENERATING]  # the tasks that prepare a picture for a model
