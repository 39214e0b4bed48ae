import httpx
import pytest

from tests.app.api.examples import REQUESTS
from tests.app.application import run
from tests.app.fakes import FakeRunner


@pytest.mark.parametrize("strength", [0.5, 1])
def test_edit_of_full_strength_starts_from_noise_alone(strength: float) -> None:
    runner = FakeRunner()

    async def check(client: httpx.AsyncClient) -> None:
        body = {**REQUESTS["/edit"]["one"], "digit": 3, "strength": strength}
        assert (await client.post("/edit", json=body)).status_code == 200
        start = runner.calls[0][0].input
        assert start is not None
        assert ((start.signal, start.noise) == (0.0, 1.0)) is (strength == 1)
        assert start.signal**2 + start.noise**2 == pytest.approx(1)

    run(check, runner)
