"""Promises of the Dockerfile and the compose files that need no Docker; e2e/test_containers.py runs them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.server.server import LAST_ANSWERS_SECONDS
from app.settings import Settings
from model.compiled.compiler import GPU_FOLDER

ROOT = Path(__file__).parents[1]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPILED_START_SECONDS = 300  # 180 to compile for a GPU, the rest to load and to record graphs
VARIABLE = re.compile(r"\$\{(\w+)(?::([-+])((?:[^{}])*))?\}")
OWN = {"unfog", "unfog-train"}  # images that are built here


class Loader(yaml.SafeLoader):
    """With compose's tags for what an override takes away."""


Loader.add_constructor("!reset", lambda loader, node: None)


def with_defaults(text: str) -> str:
    """As compose reads it where no variable is set."""
    return VARIABLE.sub(lambda found: (found[3] or "") if found[2] == "-" else "", text)


def services() -> Iterator[tuple[str, dict[str, Any]]]:
    found = yaml.load(with_defaults(COMPOSE), Loader)["services"]
    assert set(found) == {"unfog", "prometheus", "grafana", "train"}
    yield from found.items()


SERVICES = dict(services())
every_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)


@every_service
def test_a_service_has_no_privileges_and_writes_nowhere_else(service: dict[str, Any]) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True


@every_service
def test_a_service_is_limited_and_so_is_its_log(service: dict[str, Any]) -> None:
    assert re.fullmatch(r"[1-9]\d*[mg]", service["mem_limit"])
    assert int(service["pids_limit"]) > 0
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])


def test_what_serves_comes_back_and_what_trains_ends() -> None:
    restarts = {name: service["restart"] for name, service in SERVICES.items()}
    assert restarts.pop("train") == "no"
    assert set(restarts.values()) == {"unless-stopped"}


def test_ports_are_open_to_this_host_alone_unless_one_says_otherwise() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)] == []


def test_opening_the_service_does_not_open_its_monitoring() -> None:
    names = {name: re.findall(r"\$\{(UNFOG_\w*BIND)", block) for name, block in blocks().items()}
    monitoring = ["UNFOG_MONITORING_BIND"]
    assert names == {"unfog": ["UNFOG_BIND"], "prometheus": monitoring, "grafana": monitoring, "train": []}


def blocks() -> dict[str, str]:
    """The lines of each service."""
    _, *parts = re.split(r"^  (\w+):$", COMPOSE.split("\nservices:\n")[1].split("\nvolumes:\n")[0], flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_a_stop_is_forced_only_after_the_drain_and_the_last_answers() -> None:
    grace = re.fullmatch(r"(\d+)s", SERVICES["unfog"]["stop_grace_period"])
    assert grace
    drain = Settings.model_fields["drain_timeout"].default
    assert int(grace[1]) >= drain + LAST_ANSWERS_SECONDS + 5  # what is left to end in


def test_every_mounted_file_of_the_repository_is_there() -> None:
    sources = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    from_here = [source for source in sources if source.startswith((".", "/"))]
    assert from_here
    assert [source for source in from_here if not (ROOT / source).exists()] == []
    named = yaml.load(COMPOSE, Loader)["volumes"]
    assert {source for source in sources if source not in from_here} == set(named)


def test_mounted_files_of_the_repository_are_not_written() -> None:
    mounts = [volume for service in SERVICES.values() for volume in service.get("volumes", []) if volume[0] == "."]
    assert mounts
    assert [mount for mount in mounts if not mount.endswith(":ro")] == []


def test_images_of_others_are_pinned() -> None:
    images = {service["image"].partition(":")[::2] for service in SERVICES.values()}
    others = {name: tag for name, tag in images if name not in OWN}
    assert set(others) == {"prom/prometheus", "grafana/grafana"}
    assert [name for name, tag in others.items() if not re.fullmatch(r"v?\d+\.\d+\.\d+", tag)] == []


def test_without_a_gpu_everything_that_asks_for_one_is_told_so() -> None:
    asking = {name for name, service in SERVICES.items() if "deploy" in service}
    override = yaml.load((ROOT / "docker-compose.cpu.yml").read_text(), Loader)["services"]
    assert asking == set(override) == {"unfog", "train"}
    for service in override.values():
        assert service["deploy"]["resources"]["reservations"]["devices"] is None


def test_device_is_cuda_unless_one_says_otherwise_and_cpu_in_the_project_for_cpus() -> None:
    """With `auto`, an old driver or a GPU that is not passed on would mean a service on the CPU."""
    assert "UNFOG_DEVICE=cuda" in SERVICES["unfog"]["environment"]
    assert "- UNFOG_DEVICE=${UNFOG_DEVICE:-cuda}\n" in COMPOSE
    override = yaml.load((ROOT / "docker-compose.cpu.yml").read_text(), Loader)["services"]
    assert override["unfog"]["environment"] == ["UNFOG_DEVICE=cpu"]


def test_folder_for_gpu_kernels_is_private_writable_and_executable() -> None:
    """It lies where the image's UNFOG_CACHE_DIR puts it, and goes with the container."""
    (cache,) = set(re.findall(r"UNFOG_CACHE_DIR=(\S+)", DOCKERFILE))
    folder = Path(cache, GPU_FOLDER)
    options = dict(mount.partition(":")[::2] for mount in SERVICES["unfog"]["tmpfs"])[str(folder)]
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert set(options.split(",")) == {"exec", f"uid={user}", f"gid={group}", "mode=0700"}
    assert f"install --directory --owner unfog --group unfog --mode 700 {folder}\n" in DOCKERFILE
    manifest = (ROOT / "deploy/kubernetes/gpu/deployment.yaml").read_text()
    assert f"mountPath: {folder}\n" in manifest


def test_image_of_the_service_runs_without_privileges() -> None:
    *_, service = DOCKERFILE.split("\nFROM ")
    assert service.startswith("runtime AS service\n")
    assert re.findall(r"^USER (.+)$", service, re.MULTILINE)[-1:] == ["10001:10001"]


def test_health_check_waits_for_a_start_that_compiles_for_a_gpu() -> None:
    found = re.search(r"^HEALTHCHECK .*--start-period=(\d+)s", DOCKERFILE, re.MULTILINE)
    assert found
    assert int(found[1]) >= COMPILED_START_SECONDS


def test_image_has_a_minor_version_of_torch_that_the_bounds_allow() -> None:
    """Without a version, each build would have the newest release that the bounds allow, tested or not."""
    pinned = re.search(r"^ARG TORCH_VERSION=(\d+\.\d+)$", DOCKERFILE, re.MULTILINE)
    bounds = re.search(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned and bounds
    lower, version, upper = (tuple(map(int, text.split("."))) for text in (bounds[1], pinned[1], bounds[2]))
    assert lower <= version < upper
    dependencies = DOCKERFILE.split("\nFROM ")[2]
    assert 'torch="torch==$TORCH_VERSION.*"' in dependencies
    installs = re.findall(r"pip install .*", dependencies)
    assert len(installs) == 3
    assert all('"$torch"' in line for line in installs)


def test_no_admin_of_grafana_is_made_unless_a_password_is_set() -> None:
    (name,) = re.findall(r"- (GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION\S*)=true", COMPOSE)
    variable = VARIABLE.search(name)
    assert variable
    assert (variable[1], variable[2]) == ("UNFOG_GRAFANA_PASSWORD", "+")
    assert f"- {with_defaults(name)}=true" == "- GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION=true"
    assert "- GF_SECURITY_ADMIN_PASSWORD=${UNFOG_GRAFANA_PASSWORD:-}" in COMPOSE


def test_the_example_lists_what_compose_reads_with_the_same_defaults() -> None:
    """A comment behind a value would be part of it, and a password that everybody knows."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    listed = dict(line[1:].split("=", 1) for line in lines if re.match(r"#\w+=", line))
    assert all(line.startswith("#") for line in lines if line)
    assert not [value for value in listed.values() if " " in value or "#" in value]
    read = {found[1]: found[3] for found in VARIABLE.finditer(COMPOSE) if found[2] == "-"}
    settings = {f"UNFOG_{field}".upper() for field in Settings.model_fields}
    assert read.keys() <= listed.keys()
    assert listed.keys() - read.keys() <= settings - {"UNFOG_CACHE_DIR", "UNFOG_HOST"}
    assert {name: listed[name] for name in read} == read


def test_the_image_is_of_the_version_that_it_says() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert f"\nARG VERSION={version[1]}\n" in (ROOT / "Dockerfile").read_text()


def test_images_install_the_tested_versions() -> None:
    installs = re.findall(r"pip install .*--requirement.*", (ROOT / "Dockerfile").read_text())
    service, train = installs
    assert "--constraint constraints.txt" in service
    assert "/requirements.txt" in train  # of the stage `train`, where a variable names the constraints
    assert "PIP_CONSTRAINT='/tmp/installed.txt /src/constraints.txt'" in (ROOT / "Dockerfile").read_text()
    assert "!constraints.txt" in (ROOT / ".dockerignore").read_text().splitlines()
