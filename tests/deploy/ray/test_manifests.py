"""Compares the files in deploy/ray with the service, with each other and with Ray's own schema."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings

FOLDER = Path(__file__).parents[3] / "deploy" / "ray"
SERVE = yaml.safe_load((FOLDER / "serve.yaml").read_text())
SERVICE = yaml.safe_load((FOLDER / "ray-service.yaml").read_text())["spec"]
NODES = [SERVICE["rayClusterConfig"]["headGroupSpec"], *SERVICE["rayClusterConfig"]["workerGroupSpecs"]]
APPLICATION = SERVE["applications"][0]
DEPLOYMENT = APPLICATION["deployments"][0]
CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"

pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),  # of Ray's schemas
]
needs_ray = pytest.mark.skipif(not find_spec("ray"), reason="needs the extra ray")


def container(node: dict[str, Any]) -> dict[str, Any]:
    (only,) = node["template"]["spec"]["containers"]
    return dict(only)


def imported(path: str) -> Any:
    module, _, name = path.replace(":", ".").rpartition(".")
    return getattr(import_module(module), name)


def test_kubernetes_gets_the_same_configuration() -> None:
    assert yaml.safe_load(SERVICE["serveConfigV2"]) == SERVE


@needs_ray
def test_configuration_is_valid_for_ray() -> None:
    from ray.serve.schema import ServeDeploySchema

    assert ServeDeploySchema.model_validate(SERVE).applications[0].deployments[0].name == "Replica"


@needs_ray
def test_imported_objects_exist() -> None:
    from ray.serve import Application

    application = imported(APPLICATION["import_path"])
    assert isinstance(application, Application)
    policy = DEPLOYMENT["autoscaling_config"]["policy"]
    assert callable(imported(policy["policy_function"])(**policy["policy_kwargs"]))


@needs_ray
def test_deployment_waits_longer_than_the_service_drains() -> None:
    from app.ray.replica import application

    options = application._bound_deployment
    assert options.name == DEPLOYMENT["name"]
    # As in docker-compose.yml: last answers 5 s, exit 5 s and a margin of 5 s.
    assert options._deployment_config.graceful_shutdown_timeout_s >= Settings().drain_timeout + 15
    assert options._deployment_config.max_surge_percent > 0


def test_environment_names_settings_of_the_service() -> None:
    names = {f"UNFOG_{field}".upper() for field in Settings.model_fields}
    assert set(APPLICATION["runtime_env"]["env_vars"]) <= names
    for node in NODES:
        own = {each["name"] for each in container(node)["env"] if each["name"].startswith("UNFOG_")}
        assert own <= names


@needs_ray
def test_every_node_loads_the_middleware() -> None:
    for node in NODES:
        (path,) = [each["value"] for each in container(node)["env"] if each["name"] == CALLBACK]
        assert imported(path)()


def test_worker_has_the_cpus_of_its_replica_and_the_port_of_the_proxy() -> None:
    for node in NODES[1:]:
        only = container(node)
        assert float(only["resources"]["limits"]["cpu"]) == DEPLOYMENT["ray_actor_options"]["num_cpus"]
        assert [port["containerPort"] for port in only["ports"]] == [SERVE["http_options"]["port"]]


def test_worker_stops_later_than_its_replica() -> None:
    for node in NODES[1:]:
        assert node["template"]["spec"]["terminationGracePeriodSeconds"] >= Settings().drain_timeout + 15
        assert node["template"]["spec"]["enableServiceLinks"] is False


def test_pods_are_restricted() -> None:
    for node in NODES:
        pod = node["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert container(node)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
