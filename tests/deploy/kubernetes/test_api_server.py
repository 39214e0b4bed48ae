"""Applies the manifests to a real API server, without nodes: schemas, admission and ownership of fields.

Needs `etcd`, `kube-apiserver` and `kubectl`. No controller runs, so no pods are created.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.containers.stack import free_ports
from tests.deploy.kubernetes.kustomize import EXTRAS, FOLDER

PROGRAMS = ("etcd", "kube-apiserver", "kubectl", "openssl")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
START_SECONDS = 60.0  # limit for a server that hangs

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


class Cluster:
    """The kubectl of an administrator of the API server."""

    def __init__(self, folder: Path, port: int, token: str) -> None:
        server = [f"--server=https://127.0.0.1:{port}", f"--certificate-authority={folder / 'apiserver.crt'}"]
        self._command = ["kubectl", "--kubeconfig=/dev/null", *server, f"--token={token}", "--namespace=unfog"]

    def run(self, *arguments: str | Path, content: Any = None) -> subprocess.CompletedProcess[str]:
        """Runs kubectl with `content` as JSON on its standard input."""
        command = [*self._command, *map(str, arguments)]
        return subprocess.run(command, input=json.dumps(content), capture_output=True, text=True, check=False)

    def must(self, *arguments: str | Path, content: Any = None) -> str:
        """Returns the output of kubectl, which must succeed without warnings."""
        done = self.run(*arguments, content=content)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    def get(self, kind: str, name: str = "unfog") -> dict[str, Any]:
        return dict(json.loads(self.must("get", kind, name, "--output=json")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    token, (client, peer, port) = os.urandom(16).hex(), free_ports(3)
    (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
    subprocess.run(["openssl", "genrsa", "-out", folder / "key.pem", "2048"], check=True, capture_output=True)
    store = f"http://127.0.0.1:{client}"
    commands = [
        f"etcd --data-dir={folder}/etcd --listen-client-urls={store} --advertise-client-urls={store} "
        f"--listen-peer-urls=http://127.0.0.1:{peer} --unsafe-no-fsync",
        f"kube-apiserver --etcd-servers={store} --bind-address=127.0.0.1 --secure-port={port} --cert-dir={folder} "
        f"--token-auth-file={folder}/tokens.csv --authorization-mode=RBAC --service-cluster-ip-range=10.0.0.0/24 "
        f"--service-account-issuer=https://unfog.test --service-account-key-file={folder}/key.pem "
        f"--service-account-signing-key-file={folder}/key.pem",
    ]
    with (folder / "log").open("w") as log:
        servers = [subprocess.Popen(each.split(), stdout=log, stderr=log) for each in commands]
        try:
            cluster, end = Cluster(folder, port, token), time.monotonic() + START_SECONDS
            while cluster.run("get", "--raw=/readyz").returncode:
                assert time.monotonic() < end, (folder / "log").read_text()[-2000:]
                time.sleep(0.2)
            yield cluster
        finally:
            for server in reversed(servers):
                server.kill()
                server.wait()


@pytest.fixture
def applied(cluster: Cluster, overlay: str) -> Cluster:
    """The API server with the manifests of an overlay and the autoscaler."""
    cluster.must("apply", "--server-side", "--kustomize", FOLDER / overlay)
    cluster.must("apply", "--server-side", "--filename", EXTRAS / "horizontal-pod-autoscaler.yaml")
    return cluster


def test_second_apply_changes_nothing(applied: Cluster, overlay: str) -> None:
    kinds = ("configmap", "deployment", "networkpolicy", "poddisruptionbudget", "service", "serviceaccount")
    listed = ("get", ",".join(kinds), "--output=jsonpath={.items[*].metadata.resourceVersion}")
    before = applied.must(*listed)
    assert len(before.split()) >= len(kinds)
    applied.must("apply", "--server-side", "--kustomize", FOLDER / overlay)
    assert applied.must(*listed) == before


def test_apply_keeps_the_number_of_replicas(applied: Cluster, overlay: str) -> None:
    applied.must("scale", "deployment", "unfog", "--replicas=4")
    applied.must("apply", "--server-side", "--kustomize", FOLDER / overlay)
    assert applied.get("deployment")["spec"]["replicas"] == 4


def test_changed_setting_starts_a_rolling_update(applied: Cluster, overlay: str, tmp_path: Path) -> None:
    before = applied.get("deployment")["metadata"]["generation"]
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    with (tmp_path / "kubernetes" / "base" / "settings.env").open("a") as settings:
        settings.write("UNFOG_LOG_LEVEL=debug\n")
    applied.must("apply", "--server-side", "--kustomize", tmp_path / "kubernetes" / overlay)
    assert applied.get("deployment")["metadata"]["generation"] == before + 1


def test_pods_pass_the_admission_of_the_namespace_and_privileged_ones_do_not(applied: Cluster) -> None:
    template = applied.get("deployment")["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "unfog"}, "spec": template["spec"]}
    create = ("create", "--dry-run=server", "--filename=-")
    applied.must(*create, content=pod)
    del template["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"]
    refused = applied.run(*create, content=pod)
    assert refused.returncode == 1
    assert 'violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false' in refused.stderr
