import httpx
import pytest

from tests.app.api.examples import GENERATING, PICTURE_TASKS, REQUESTS
from tests.app.application import run
from tests.app.fakes import FakeRunner


@pytest.mark.parametrize("path", [path for path in GENERATING if path != "/denoise"])
def test_searches_of_other_tasks_return_no_probabilities(path: str) -> None:
    body = {name: value for name, value in next(iter(REQUESTS[path].values())).items() if name != "digit"}

    async def check(client: httpx.AsyncClient) -> None:
        answer = (await client.post(path, json=body)).json()
        assert answer["digit"] is not None
        assert "probabilities" not in answer

    run(check, FakeRunner())


@pytest.mark.parametrize("path", PICTURE_TASKS)
def test_unknown_model_is_refused_before_the_picture_is_decoded(path: str) -> None:
    async def check(client: httpx.AsyncClient) -> None:
        masks = {"mask": "AAAA"} if path == "/inpaint" else {}
        response = await client.post(path, json={"image": "AAAA", "model": "none", **masks})
        assert response.status_code == 422
        assert response.json()["errors"][0]["loc"] == ["body", "model"]

    run(check, FakeRunner())
