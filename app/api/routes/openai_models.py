"""GET /v1/models and GET /v1/models/{model}: the served models in the format of OpenAI."""

import time

from fastapi import APIRouter
from starlette.responses import JSONResponse

from app import errors
from app.api.generation import Service, ServiceDependency
from app.api.openai.document import MODEL_PATH, MODEL_RESPONSES, MODELS_PATH, MODELS_RESPONSES
from app.api.openai.schemas import OpenAIModel, OpenAIModels
from app.api.options import either
from app.engine.job import DEFAULT_MODEL

router = APIRouter()

NO_STORE = {"Cache-Control": "no-store"}


@router.get(MODELS_PATH, operation_id="list_models", response_model=OpenAIModels, responses=MODELS_RESPONSES)
async def models(service: ServiceDependency) -> JSONResponse:
    """Returns the served models in the format of OpenAI. GET /models describes what each model permits."""
    service.info(DEFAULT_MODEL)  # raises Starting or EngineFailed if no model is loaded
    answer = OpenAIModels(data=[_describe(service, name) for name in service.engine.models])
    return JSONResponse(answer.model_dump(), headers=NO_STORE)


@router.get(MODEL_PATH, operation_id="get_model", response_model=OpenAIModel, responses=MODEL_RESPONSES)
async def model(model: str, service: ServiceDependency) -> JSONResponse:
    """Returns a served model in the format of OpenAI."""
    service.info(DEFAULT_MODEL)
    if model not in service.engine.models:
        raise errors.NotFound(f"This model is not served. Use {either(service.engine.models)}")
    return JSONResponse(_describe(service, model).model_dump(), headers=NO_STORE)


def _describe(service: Service, name: str) -> OpenAIModel:
    return OpenAIModel(id=name, created=round(time.time() - service.uptime_seconds))
