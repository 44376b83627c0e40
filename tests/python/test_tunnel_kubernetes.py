"""A Kubernetes API server behind the tunnel: kubectl that speaks SPDY, kubectl that speaks WebSocket, and the Python client."""

import json
import sys
import threading

import httpx
import pytest
from conftest import Process, free_port, until
from kubernetes import client as kubernetes
from kubernetes import watch
from kubernetes.stream import stream
from samples import Certificate
from tunnel import CLIENT, ApiServer, Kubectl, Tunnel, debian_kubectl, pypi_kubectl


@pytest.fixture
def cluster(tmp_path, redis):
    # The agent is strict: a certificate that may sign others is none of a server.
    certificate = Certificate(tmp_path, "basicConstraints=critical,CA:FALSE")
    server = ApiServer(tmp_path, certificate)
    try:
        tunnel = Tunnel(tmp_path, redis.url, server.url, certificate)
        yield tunnel
        tunnel.stop()
    finally:
        server.process.stop()


@pytest.fixture(params=[debian_kubectl, pypi_kubectl])
def kubectl(request, cluster):
    return Kubectl(request.param(), cluster)


def create(kubectl, name):
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}
    pod["spec"] = {"containers": [{"name": "main", "image": "busybox"}]}
    kubectl("create", "--validate=false", "-f", "-", input=json.dumps(pod).encode())


def test_kubectl_works_as_it_does_directly(kubectl):
    create(kubectl, "web")
    assert kubectl("get", "pods", "-o", "name") == b"pod/web\n"
    assert b"NotFound" in kubectl("get", "pod", "busy", code=1)  # Only after 503 with Retry-After, which it follows.

    watching = kubectl.start("watch", "get", "pods", "-o", "name", "-w")
    until("the watch begins", lambda: "pod/web" in watching.output())
    create(kubectl, "second")
    until("the watch sees a new pod", lambda: "pod/second" in watching.output())
    watching.stop()
    assert kubectl("delete", "pod", "second").startswith(b'pod "second" deleted')

    kubectl("exec", "web", "--", "sh", "-c", "echo first >>log")
    following = kubectl.start("logs", "logs", "-f", "web")
    until("the log begins", lambda: "first" in following.output())
    kubectl("exec", "web", "--", "sh", "-c", "echo second >>log")
    until("the log goes on", lambda: "second" in following.output())
    following.stop()


def test_kubectl_runs_commands_and_copies_files(kubectl, tmp_path):
    create(kubectl, "web")
    assert kubectl("exec", "web", "--", "echo", "hello") == b"hello\n"
    assert b"to stderr" in kubectl("exec", "web", "--", "sh", "-c", "echo to stderr >&2; exit 3", code=3)
    assert kubectl("exec", "-i", "web", "--", "wc", "-c", input=b"x" * 300_000).strip() == b"300000"

    blob = bytes(range(256)) * 8_000
    (tmp_path / "blob").write_bytes(blob)
    kubectl("cp", "blob", "web:copied")
    kubectl("cp", "web:copied", "back")
    assert (tmp_path / "back").read_bytes() == blob


def test_kubectl_forwards_ports(kubectl, tmp_path):
    create(kubectl, "web")
    page, port = free_port(), free_port()
    (tmp_path / "page").mkdir()
    (tmp_path / "page/file").write_bytes(b"y" * 200_000)
    fetch = lambda port: httpx.get(f"http://127.0.0.1:{port}/file")
    command = [sys.executable, "-m", "http.server", str(page), "--bind", "127.0.0.1", "--directory", str(tmp_path / "page")]
    serving = Process("page", command, tmp_path)
    serving.ready("the page", lambda: fetch(page))
    forwarding = kubectl.start("port-forward", "port-forward", "pod/web", f"{port}:{page}")
    until("the port is forwarded", lambda: "Forwarding" in forwarding.output())
    assert [len(fetch(port).content) for _ in range(3)] == [200_000] * 3
    forwarding.stop()
    serving.stop()


def test_the_python_client_lists_watches_and_runs(cluster):
    config = kubernetes.Configuration(host=cluster.url)
    config.ssl_ca_cert = str(cluster.certificate.cert)
    config.api_key, config.api_key_prefix = {"authorization": CLIENT}, {"authorization": "Bearer"}
    with kubernetes.ApiClient(config) as api:
        core = kubernetes.CoreV1Api(api)
        container = kubernetes.V1Container(name="main", image="busybox")
        spec = kubernetes.V1PodSpec(containers=[container])

        def create(name):
            core.create_namespaced_pod("default", kubernetes.V1Pod(metadata=kubernetes.V1ObjectMeta(name=name), spec=spec))

        create("one")
        listed = core.list_namespaced_pod("default")
        assert [pod.metadata.name for pod in listed.items] == ["one"]

        later = threading.Timer(0.3, create, ["two"])
        later.start()
        version = listed.metadata.resource_version
        events = watch.Watch().stream(core.list_namespaced_pod, "default", resource_version=version)
        assert next(iter(events))["object"].metadata.name == "two"
        later.join()

        # The server forgets its history: the client is told that its version is too old.
        create("compacted")
        core.read_namespaced_pod("compacted", "default")
        with pytest.raises(kubernetes.ApiException) as expired:
            list(watch.Watch().stream(core.list_namespaced_pod, "default", resource_version=version))
        assert expired.value.status == 410

        with pytest.raises(kubernetes.ApiException) as absent:
            core.read_namespaced_pod("absent", "default")
        assert (absent.value.status, json.loads(absent.value.body)["reason"]) == (404, "NotFound")

        run = core.connect_get_namespaced_pod_exec
        command = {"command": ["sh", "-c", "echo out; echo err >&2"], "stdout": True, "stderr": True}
        with kubernetes.ApiClient(config) as own:  # The stream replaces a method of its client.
            run = kubernetes.CoreV1Api(own).connect_get_namespaced_pod_exec
            ran = stream(run, "one", "default", **command, _preload_content=False)
            ran.run_forever(timeout=10)
            assert (ran.read_stdout(), ran.read_stderr(), ran.returncode) == ("out\n", "err\n", 0)


def test_a_cluster_without_an_agent_is_told_as_kubernetes_does(cluster):
    kubectl = Kubectl(pypi_kubectl(), cluster)
    kubectl("get", "pods")  # It asks once what the API has: in place of an error of that it shows a text of its own.
    cluster.agent.stop()
    assert b"No agent of the cluster is connected." in kubectl("get", "pods", code=1)
