"""GET /v1/models and GET /v1/models/{model}: the served models in the format of OpenAI."""

import time

from starlette.responses import JSONResponse

from app import errors
from app.api.openai.operations import CREATED_AT, GROUP
from app.api.openai.schemas import OpenAIError, OpenAIModel, OpenAIModels
from app.api.operations import READ_STATUSES, Operation, Router
from app.api.service import Service, ServiceDependency
from app.tasks.names import either

router = Router()

NO_STORE = {"Cache-Control": "no-store"}
EXAMPLE = OpenAIModel(id="default", created=CREATED_AT)


@router.operation(
    Operation(
        path="/v1/models",
        name="list_models",
        group=GROUP,
        summary="List the models",
        answer=OpenAIModels,
        example=OpenAIModels(data=[EXAMPLE]).model_dump(),
        error=OpenAIError,
        statuses=READ_STATUSES,
    )
)
async def models(service: ServiceDependency) -> JSONResponse:
    """Returns the served models in the format of OpenAI. GET /models describes what each model permits."""
    answer = OpenAIModels(data=[_describe(service, name) for name in service.models])
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


@router.operation(
    Operation(
        path="/v1/models/{model}",
        name="get_model",
        group=GROUP,
        summary="Get a model",
        answer=OpenAIModel,
        example=EXAMPLE.model_dump(),
        error=OpenAIError,
        statuses={**READ_STATUSES, 404: "not_found: the model is not served"},
        errors=[errors.NotFound("This model is not served. Use 'default'")],
    )
)
async def model(model: str, service: ServiceDependency) -> JSONResponse:
    """Returns a served model in the format of OpenAI."""
    if model not in service.models:
        raise errors.NotFound(f"This model is not served. Use {either(service.models)}")
    return JSONResponse(_describe(service, model).model_dump(), headers=NO_STORE)


def _describe(service: Service, name: str) -> OpenAIModel:
    return OpenAIModel(id=name, created=round(time.time() - service.uptime_seconds))
