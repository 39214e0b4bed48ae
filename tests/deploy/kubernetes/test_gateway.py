"""Tests that the Gateway and the HTTPRoute lead to the service, and that their time limits suit its requests.

No maintained package has the schemas of the Gateway API. The README says how the objects were checked against them.
"""

import re
from typing import Any

import pytest

from app.main import create_app
from app.settings import Settings
from tests.app.fakes import FakeRunner
from tests.deploy.kubernetes.kustomize import EXTRAS, FOLDER, Manifest, container_of, find, read

UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def seconds(duration: str) -> float:
    """Returns the seconds of a duration of the Gateway API, such as 1m30s. Raises ValueError for another format."""
    if not re.fullmatch(r"(\d{1,5}(h|m|s|ms)){1,4}", duration):
        raise ValueError(duration)
    return sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|h|m|s)", duration))


@pytest.fixture
def gateway() -> Manifest:
    return read(EXTRAS / "gateway.yaml")


@pytest.fixture
def rules() -> list[dict[str, Any]]:
    return list(read(EXTRAS / "http-route.yaml")["spec"]["rules"])


@pytest.mark.parametrize(
    ("duration", "expected"), [("0s", 0), ("11m", 660), ("1h1m1s1ms", 3661.001), ("5", None), ("1.5s", None)]
)
def test_duration_of_the_gateway_api_is_read(duration: str, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=re.escape(duration)):
            seconds(duration)
    else:
        assert seconds(duration) == pytest.approx(expected)


def test_route_leads_from_the_gateway_to_the_service(
    gateway: Manifest, rules: list[dict[str, Any]], manifests: list[Manifest]
) -> None:
    route, service = read(EXTRAS / "http-route.yaml"), find(manifests, "Service")
    (port,) = service["spec"]["ports"]
    assert {each["metadata"]["namespace"] for each in (gateway, route, service)} == {"unfog"}
    assert route["spec"]["parentRefs"] == [{"name": gateway["metadata"]["name"]}]
    for rule in rules:
        assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": port["port"]}]
    assert rules[-1]["matches"] == [{"path": {"type": "PathPrefix", "value": "/"}}]  # all other paths


def test_gateway_accepts_only_https_for_the_host_name_of_the_route(gateway: Manifest) -> None:
    (listener,) = gateway["spec"]["listeners"]
    assert (listener["protocol"], listener["port"]) == ("HTTPS", 443)
    assert listener["tls"]["certificateRefs"] == [{"name": "unfog-tls"}]
    assert "create secret tls unfog-tls " in (FOLDER / "README.md").read_text()
    assert read(EXTRAS / "http-route.yaml")["spec"]["hostnames"] == [listener["hostname"]]


def test_gateway_waits_longer_than_every_deadline(rules: list[dict[str, Any]], settings: Settings) -> None:
    longest = settings.longest_timeout + 2 * settings.read_timeout + settings.write_timeout
    assert seconds(rules[-1]["timeouts"]["request"]) >= longest


def test_only_routes_of_unknown_duration_have_no_time_limit(rules: list[dict[str, Any]]) -> None:
    unlimited, _ = rules
    assert seconds(unlimited["timeouts"]["request"]) == 0
    paths = create_app(Settings(), FakeRunner).openapi()["paths"]
    found = {
        path
        for match in unlimited["matches"]
        for path in paths
        if path == match["path"]["value"]
        or (match["path"]["type"] == "PathPrefix" and path.startswith(match["path"]["value"] + "/"))
    }
    assert {path for path in found if "{" not in path} <= {"/events/batch", "/v1/files"}
    assert {"/events/batch", "/v1/files", "/v1/files/{file}/content", "/batches/{batch}/images.zip"} <= found


def test_gateway_does_not_repeat_requests(rules: list[dict[str, Any]]) -> None:
    assert all(rule.keys() == {"matches", "timeouts", "backendRefs"} for rule in rules)  # no `retry`


def test_network_policy_admits_the_proxies_of_envoy_gateway(manifests: list[Manifest]) -> None:
    (rule,) = find(manifests, "NetworkPolicy")["spec"]["ingress"]
    proxies = rule["from"][0]["namespaceSelector"]["matchExpressions"]
    assert [(each["key"], each["operator"]) for each in proxies] == [("kubernetes.io/metadata.name", "In")]
    assert "envoy-gateway-system" in proxies[0]["values"]
    assert rule["ports"][0]["port"] == container_of(manifests)["ports"][0]["containerPort"]
