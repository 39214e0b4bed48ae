"""Tests what Ray asks of a replica. tests/e2e/test_ray.py tests it under Ray."""

from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(not find_spec("ray"), reason="needs the extra ray"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # of Ray's schemas
]


class FakeEngine:
    def __init__(self, *, alive: bool = True, images: int = 0) -> None:
        self.alive, self._images = alive, images

    def num_interactive(self) -> int:
        return self._images


def replica(engine: FakeEngine) -> Any:
    from app.ray.replica import Replica

    made = Replica.__new__(Replica)  # without the application
    made._service = type("Service", (), {"engine": engine})()
    return made


def test_replica_with_a_running_engine_is_healthy() -> None:
    replica(FakeEngine()).check_health()


def test_replica_with_a_failed_engine_is_replaced() -> None:
    with pytest.raises(RuntimeError, match="the engine has failed or is stuck"):
        replica(FakeEngine(alive=False)).check_health()


@pytest.mark.parametrize(("images", "replicas"), [((0.0,), 0), ((24.0, 8.0), 2), ((40.0,), 2.5)])
def test_number_of_replicas_follows_the_images(images: tuple[float, ...], replicas: float) -> None:
    from app.ray.autoscaling import ImagesPerReplica

    stats = {str(place): replica(FakeEngine(images=int(each))) for place, each in enumerate(images)}
    found = {name: each.record_autoscaling_stats()["images"] for name, each in stats.items()}
    context: Any = type("Context", (), {"aggregated_metrics": {"images": found}})()
    assert ImagesPerReplica(16)(context) == (replicas, {})


@pytest.mark.parametrize("figures", [None, {}, {"images": {}}])
def test_without_figures_the_number_of_replicas_stays(figures: Any) -> None:
    from app.ray.autoscaling import ImagesPerReplica

    context: Any = type("Context", (), {"aggregated_metrics": figures, "target_num_replicas": 3})()
    assert ImagesPerReplica(16)(context) == (3, {})
