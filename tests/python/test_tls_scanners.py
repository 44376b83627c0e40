"""The gateway's own TLS, as testssl.sh and sslscan judge it. `--long` asks testssl.sh for all that it knows."""

import json
import os
import ssl
import subprocess
import xml.etree.ElementTree as xml

import httpx
import pytest
from processes import ROOT, Process, free_port
from samples import program

# The checks of testssl.sh for a run of seconds: versions, groups of cipher suites, the gateway's choices, renegotiation,
# compression and answers over HTTP. The others try hundreds of cipher suites and old clients, one by one.
SHORT = ["--protocols", "--std", "--server-preference", "--headers", "--renegotiation", "--crime", "--heartbleed", "--ccs"]
# Findings about the issuer of the certificate, which is the test's own.
OF_ISSUER = {"cert_revocation", "cert_crlDistributionPoints", "cert_ocspURL", "OCSP_stapling", "DNS_CAArecord"}
HARMLESS = {"OK", "INFO", "LOW"}


def openssl(*arguments):
    subprocess.run([program("openssl"), *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A folder with an authority, and a certificate that it issued for localhost."""
    folder = tmp_path_factory.mktemp("authority")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    ca, ca_key, request = (folder / name for name in ["ca.pem", "ca-key.pem", "request.pem"])
    openssl("req", "-x509", *new_key, "-days", 365, "-subj", "/CN=Authority", "-keyout", ca_key, "-out", ca)
    openssl("req", *new_key, "-subj", "/CN=localhost", "-keyout", folder / "privkey.pem", "-out", request)
    extensions = folder / "extensions"
    lines = ["subjectAltName=DNS:localhost", "extendedKeyUsage=serverAuth", "keyUsage=digitalSignature"]
    extensions.write_text("\n".join([*lines, "basicConstraints=CA:FALSE", ""]))
    issuer = ["-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", 90, "-extfile", extensions]
    openssl("x509", "-req", "-in", request, *issuer, "-out", folder / "fullchain.pem")
    return folder


@pytest.fixture
def port(tmp_path, authority):
    """The port of a gateway that speaks TLS."""
    port = free_port()
    env = {"PORT": str(port), "WSPROXY_SERVER__DRAIN_DELAY": "0s", "WSPROXY_LOG__FORMAT": "json"}
    env |= {"WSPROXY_TLS__CERTIFICATE": str(authority / "fullchain.pem"), "WSPROXY_TLS__KEY": str(authority / "privkey.pem")}
    command = [os.environ.get("WSPROXY_BIN", str(ROOT / "target/debug/wsproxy")), "serve"]
    gateway = Process("gateway", command, tmp_path, env, cwd=tmp_path)
    verify = ssl.create_default_context(cafile=authority / "ca.pem")
    gateway.ready("gateway", lambda: httpx.get(f"https://localhost:{port}/ready", verify=verify).status_code == 200)
    yield port
    assert gateway.stop() == 0, gateway.output()


@pytest.mark.timeout(1200)
def test_testssl_finds_nothing_above_low(request, tmp_path, authority, port):
    is_long = request.config.getoption("--long")
    report, ca = tmp_path / "testssl.json", authority / "ca.pem"
    command = [program("testssl"), "--warnings", "off", "--nodns", "none", "--ip", "127.0.0.1", "--color", "0"]
    command += ["--add-ca", ca, "--jsonfile", report, *([] if is_long else SHORT)]
    ran = subprocess.run([*map(str, command), f"https://localhost:{port}"], capture_output=True, text=True, cwd=tmp_path)
    findings = {finding["id"]: finding for finding in json.loads(report.read_text())}
    bad = [f for f in findings.values() if f["severity"] not in HARMLESS and f["id"] not in OF_ISSUER]
    assert not bad, f"{bad}\n{ran.stdout[-4000:]}"
    # The scan came to its end, and spoke with the gateway.
    for seen in ["TLS1_2", "TLS1_3", "cipher_order", "secure_client_renego", "heartbleed", "HTTP_status_code"]:
        assert seen in findings, f"{seen} is missing in {sorted(findings)}\n{ran.stdout[-4000:]}"
    assert findings["TLS1_3"]["severity"] == findings["cipher_order"]["severity"] == "OK"


def test_sslscan_finds_only_strong_suites_of_new_versions(tmp_path, port):
    report = tmp_path / "sslscan.xml"
    # The search for groups leaves handshakes open, and each takes the gateway's whole header_timeout.
    command = [program("sslscan"), "--no-groups", f"--xml={report}", f"localhost:{port}"]
    subprocess.run(command, check=True, capture_output=True)
    found = xml.parse(report).getroot().find("ssltest")
    versions = {(row.get("type"), row.get("version")) for row in found.iter("protocol") if row.get("enabled") == "1"}
    assert versions == {("tls", "1.2"), ("tls", "1.3")}
    suites = {(row.get("sslversion"), row.get("cipher")) for row in found.iter("cipher")}
    assert len(suites) == 6 and all("GCM" in suite or "CHACHA20" in suite for _, suite in suites), suites
    assert {row.get("strength") for row in found.iter("cipher")} <= {"strong", "acceptable"}
    assert all(row.get("vulnerable") == "0" for row in found.iter("heartbleed"))
    renegotiation = found.find("renegotiation")
    assert renegotiation.get("supported") == "0" or renegotiation.get("secure") == "1"
