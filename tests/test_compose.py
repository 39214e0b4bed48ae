"""Static checks of the Dockerfile and the compose files. tests/e2e/test_containers.py builds and runs them."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.server.server import LAST_ANSWERS_SECONDS
from app.settings import Settings
from model.compiled.compiler import GPU_FOLDER, MOST_COMPILERS
from tests.compose_limits import memory_limit

ROOT = Path(__file__).parents[1]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
REPLICAS = (ROOT / "docker-compose.replicas.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPILED_START_SECONDS = 300  # 180 s to compile for a GPU, and 120 s to load and to record CUDA graphs
# The service without compilation, its kernels, and for each compiler a process and CUDA's assembler. The first two and
# the process are estimates.
COMPILING_GIB = 4 + 1 + MOST_COMPILERS * (0.7 + 0.9)
VARIABLE = re.compile(r"\$\{(\w+)(?::([-+])((?:[^{}])*))?\}")
OWN = {"unfog", "unfog-train"}  # images that this repository builds


class Loader(yaml.SafeLoader):
    """YAML loader that knows the tags of override files: `!reset` removes a value, and `!override` replaces it."""


Loader.add_constructor("!reset", lambda loader, node: None)
Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node, deep=True))


def with_defaults(text: str) -> str:
    """Replaces variables in the text as compose does if none of them is set."""
    return VARIABLE.sub(lambda found: (found[3] or "") if found[2] == "-" else "", text)


def services() -> Iterator[tuple[str, dict[str, Any]]]:
    found = yaml.load(with_defaults(COMPOSE), Loader)["services"]
    assert set(found) == {"unfog", "prometheus", "grafana", "train"}
    yield from found.items()


SERVICES = dict(services())
# The services that docker-compose.replicas.yml adds, and what it changes in those of docker-compose.yml.
ADDED = yaml.load(with_defaults(REPLICAS), Loader)["services"]
CHANGED = {name: ADDED.pop(name) for name in ("unfog", "prometheus")}
every_service = pytest.mark.parametrize("service", [*SERVICES.values(), *ADDED.values()], ids=[*SERVICES, *ADDED])


@every_service
def test_container_has_no_privileges_and_a_read_only_file_system(service: dict[str, Any]) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True


@every_service
def test_container_has_limits_for_memory_processes_and_log_size(service: dict[str, Any]) -> None:
    assert re.fullmatch(r"[1-9]\d*[mg]", service["mem_limit"])
    assert int(service["pids_limit"]) > 0
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])


def test_services_of_the_replicas_restart_and_run_as_a_user_without_privileges() -> None:
    assert set(ADDED) == {"haproxy", "postgres", "redis"}
    for name, service in ADDED.items():
        assert service["restart"] == "unless-stopped"
        assert service["user"] == name
        # The newest patch release of a tested branch, because security fixes of these servers matter here.
        assert re.fullmatch(rf"{name}:\d+(\.\d+)?-alpine", service["image"])


def test_only_haproxy_publishes_a_port_in_front_of_the_replicas() -> None:
    assert CHANGED["unfog"]["ports"] is None
    assert ADDED["haproxy"]["ports"] == SERVICES["unfog"]["ports"]
    assert not any("ports" in ADDED[name] for name in ("postgres", "redis"))


def test_only_the_replicas_can_reach_postgresql_and_redis() -> None:
    """Both servers accept every connection without a password."""
    assert yaml.load(REPLICAS, Loader)["networks"] == {"storage": {"internal": True}}
    assert CHANGED["unfog"]["networks"] == ["default", "storage"]
    assert {name: service.get("networks") for name, service in ADDED.items()} == {
        "haproxy": None,
        "postgres": ["storage"],
        "redis": ["storage"],
    }
    assert "networks" not in CHANGED["prometheus"]


def test_haproxy_has_as_much_time_to_stop_as_the_replicas_and_stops_with_them() -> None:
    assert ADDED["haproxy"]["stop_grace_period"] == SERVICES["unfog"]["stop_grace_period"]
    assert ADDED["haproxy"]["stop_signal"] == "SIGUSR1"  # SIGTERM would break the connections
    assert "depends_on" not in ADDED["haproxy"]  # it would stop first, and the replicas would not drain meanwhile


def test_buffers_of_all_connections_fit_into_the_memory_of_haproxy() -> None:
    config = (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text()
    bufsize, maxconn = (int(each) for each in re.findall(r"^ +(?:tune\.bufsize|maxconn) (\d+)", config, re.MULTILINE))
    of_connection = 2 * 2 * bufsize  # a request and a response, between the client and HAProxy and behind it
    assert maxconn * of_connection < 0.75 * 2**20 * int(ADDED["haproxy"]["mem_limit"].removesuffix("m"))


def test_every_replica_with_a_gpu_has_another_one_and_otherwise_the_same_settings() -> None:
    services = yaml.load(with_defaults((ROOT / "docker-compose.gpus.yml").read_text()), Loader)["services"]
    devices = [each["deploy"]["resources"]["reservations"]["devices"] for each in services.values()]
    assert [[device["device_ids"] for device in each] for each in devices] == [[["0"]], [["1"]]]
    assert services["unfog"]["deploy"]["replicas"] == 1
    second, first = services["unfog-1"], CHANGED["unfog"]
    assert second["extends"] == {"file": "docker-compose.yml", "service": "unfog"}
    assert second["networks"]["default"] == {"aliases": ["unfog"]}
    assert list(second["networks"]) == first["networks"]
    assert {name: second[name] for name in ("environment", "ports", "depends_on")} == {
        name: first[name] for name in ("environment", "ports", "depends_on")
    }


def test_memory_limit_on_a_gpu_has_room_for_all_compilers() -> None:
    assert int(memory_limit("docker-compose.yml").removesuffix("g")) >= COMPILING_GIB
    assert memory_limit("docker-compose.cpu.yml") == "4g"  # A CPU compiles while the image is built.


def test_servers_restart_and_the_training_does_not() -> None:
    restarts = {name: service["restart"] for name, service in SERVICES.items()}
    assert restarts.pop("train") == "no"
    assert set(restarts.values()) == {"unless-stopped"}


def test_ports_are_bound_to_localhost_by_default() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)] == []


def test_bind_address_of_the_service_is_separate_from_that_of_the_monitoring() -> None:
    names = {name: re.findall(r"\$\{(UNFOG_\w*BIND)", block) for name, block in blocks().items()}
    monitoring = ["UNFOG_MONITORING_BIND"]
    assert names == {"unfog": ["UNFOG_BIND"], "prometheus": monitoring, "grafana": monitoring, "train": []}


def blocks() -> dict[str, str]:
    """Returns the text of each service in docker-compose.yml."""
    _, *parts = re.split(r"^  (\w+):$", COMPOSE.split("\nservices:\n")[1].split("\nvolumes:\n")[0], flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_stop_grace_period_is_longer_than_drain_and_last_responses() -> None:
    grace = re.fullmatch(r"(\d+)s", SERVICES["unfog"]["stop_grace_period"])
    assert grace
    drain = Settings.model_fields["drain_timeout"].default
    assert int(grace[1]) >= drain + LAST_ANSWERS_SECONDS + 5  # 5 s for the process to exit


def test_every_mounted_file_of_the_repository_exists() -> None:
    sources = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    from_here = [source for source in sources if source.startswith((".", "/"))]
    assert from_here
    assert [source for source in from_here if not (ROOT / source).exists()] == []
    named = yaml.load(COMPOSE, Loader)["volumes"]
    assert {source for source in sources if source not in from_here} == set(named)


def test_files_of_the_repository_are_mounted_read_only() -> None:
    mounts = [volume for service in SERVICES.values() for volume in service.get("volumes", []) if volume[0] == "."]
    assert mounts
    assert [mount for mount in mounts if not mount.endswith(":ro")] == []


def test_third_party_images_are_pinned() -> None:
    images = {service["image"].partition(":")[::2] for service in SERVICES.values()}
    others = {name: tag for name, tag in images if name not in OWN}
    assert set(others) == {"prom/prometheus", "grafana/grafana"}
    assert [name for name, tag in others.items() if not re.fullmatch(r"v?\d+\.\d+\.\d+", tag)] == []


def test_cpu_override_removes_every_gpu_reservation() -> None:
    gpu_services = {name for name, service in SERVICES.items() if "deploy" in service}
    override = yaml.load((ROOT / "docker-compose.cpu.yml").read_text(), Loader)["services"]
    assert gpu_services == set(override) == {"unfog", "train"}
    for service in override.values():
        assert service["deploy"]["resources"]["reservations"]["devices"] is None


def test_device_is_cuda_by_default_and_cpu_with_the_cpu_override() -> None:
    """With `auto` the service would silently use the CPU if the driver is old or the GPU is not passed through."""
    assert "UNFOG_DEVICE=cuda" in SERVICES["unfog"]["environment"]
    assert "- UNFOG_DEVICE=${UNFOG_DEVICE:-cuda}\n" in COMPOSE
    override = yaml.load((ROOT / "docker-compose.cpu.yml").read_text(), Loader)["services"]
    assert override["unfog"]["environment"] == ["UNFOG_DEVICE=cpu"]


def test_folder_for_gpu_kernels_is_private_writable_and_executable() -> None:
    """The folder is in the UNFOG_CACHE_DIR of the image and is lost with the container."""
    (cache,) = set(re.findall(r"UNFOG_CACHE_DIR=(\S+)", DOCKERFILE))
    folder = Path(cache, GPU_FOLDER)
    options = dict(mount.partition(":")[::2] for mount in SERVICES["unfog"]["tmpfs"])[str(folder)]
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert set(options.split(",")) == {"exec", f"uid={user}", f"gid={group}", "mode=0700"}
    assert f"install --directory --owner unfog --group unfog --mode 700 {folder}\n" in DOCKERFILE
    manifest = (ROOT / "deploy/kubernetes/gpu/deployment.yaml").read_text()
    assert f"mountPath: {folder}\n" in manifest


def test_service_image_runs_as_an_unprivileged_user() -> None:
    *_, service = DOCKERFILE.split("\nFROM ")
    assert service.startswith("runtime AS service\n")
    assert re.findall(r"^USER (.+)$", service, re.MULTILINE)[-1:] == ["10001:10001"]


def test_start_period_of_the_health_check_covers_compiling_for_a_gpu() -> None:
    found = re.search(r"^HEALTHCHECK .*--start-period=(\d+)s", DOCKERFILE, re.MULTILINE)
    assert found
    assert int(found[1]) >= COMPILED_START_SECONDS


def test_image_pins_a_minor_version_of_torch_within_the_bounds() -> None:
    """Without a pin each build would install the newest release within the bounds, even if it is not tested."""
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


def test_grafana_has_no_admin_unless_a_password_is_set() -> None:
    (name,) = re.findall(r"- (GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION\S*)=true", COMPOSE)
    variable = VARIABLE.search(name)
    assert variable
    assert (variable[1], variable[2]) == ("UNFOG_GRAFANA_PASSWORD", "+")
    assert f"- {with_defaults(name)}=true" == "- GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION=true"
    assert "- GF_SECURITY_ADMIN_PASSWORD=${UNFOG_GRAFANA_PASSWORD:-}" in COMPOSE


def test_env_example_lists_the_compose_variables_with_their_defaults() -> None:
    """A comment after a value, for example after a password, would become part of the value."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    listed = dict(line[1:].split("=", 1) for line in lines if re.match(r"#\w+=", line))
    assert all(line.startswith("#") for line in lines if line)
    assert not [value for value in listed.values() if " " in value or "#" in value]
    defaults = {found[1]: found[3] for found in VARIABLE.finditer(REPLICAS) if found[2] == "-"}
    # What docker-compose.replicas.yml sets if the variable is not set, which has no effect in docker-compose.yml.
    of_replicas = {"UNFOG_DATABASE_URL", "UNFOG_RATE_LIMIT_URL", "UNFOG_TRUSTED_PROXIES"}
    read = {name: default for name, default in defaults.items() if name not in of_replicas}
    read |= {found[1]: found[3] for found in VARIABLE.finditer(COMPOSE) if found[2] == "-"}
    settings = {f"UNFOG_{field}".upper() for field in Settings.model_fields}
    assert read.keys() <= listed.keys()
    assert listed.keys() - read.keys() <= settings - {"UNFOG_CACHE_DIR", "UNFOG_HOST"}
    assert {name: listed[name] for name in read} == read


def test_version_of_the_image_is_that_of_the_project() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert f"\nARG VERSION={version[1]}\n" in (ROOT / "Dockerfile").read_text()


def test_image_installs_the_requirements_of_the_extras_of_its_build_argument() -> None:
    """Runs the Python program of the Dockerfile."""
    (program,) = re.findall(r"RUN python -c '(import sys, tomllib;.+?)'", DOCKERFILE, re.DOTALL)
    assert "traces postgres redis $EXTRAS > requirements.txt" in DOCKERFILE
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for names in (["traces", "postgres", "redis"], ["traces", "postgres", "redis", "clip", "parquet"]):
        command = [sys.executable, "-c", program, *names]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        assert printed == [*project["dependencies"], *(each for name in names for each in extras[name])]
    # pip would look for a package with the name of the project on the index.
    refused = subprocess.run([sys.executable, "-c", program, "tensorboard"], cwd=ROOT, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "EXTRAS needs unfog[train], which is not on a package index" in refused.stderr
    assert any(
        each.startswith("open_clip_torch") for each in extras["clip"]
    )  # the Dockerfile then installs torchvision


def test_images_install_the_pinned_versions() -> None:
    installs = re.findall(r"pip install .*--requirement.*", (ROOT / "Dockerfile").read_text())
    service, train = installs
    assert "--constraint constraints.txt" in service
    assert "/requirements.txt" in train  # the stage `train` has the constraints in PIP_CONSTRAINT
    assert "PIP_CONSTRAINT='/tmp/installed.txt /src/constraints.txt'" in (ROOT / "Dockerfile").read_text()
    assert "!constraints.txt" in (ROOT / ".dockerignore").read_text().splitlines()
