"""Manifests of Kubernetes in deploy/: they fit the schemas of Kubernetes, and name flags that the program has."""

import os
import subprocess

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

MANIFESTS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_the_schemas(manifest):
    documents = list(yaml.safe_load_all(manifest.read_text()))
    assert documents
    for document in documents:
        kubernetes_validate.validate(document, "1.37", strict=True)


def test_the_cluster_agent_has_the_flags_that_its_manifest_names():
    documents = yaml.safe_load_all((ROOT / "deploy/kubernetes/cluster-agent.yaml").read_text())
    [deployment] = [document for document in documents if document["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    program, command, *flags = container["command"]
    binary = os.environ.get("WSPROXY_BIN", str(ROOT / "target/debug/wsproxy"))
    told = subprocess.run([binary, command, "--help"], check=True, capture_output=True, text=True).stdout
    assert program == "wsproxy"
    for flag in flags:
        assert f"{flag.partition('=')[0]} " in told
