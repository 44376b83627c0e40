"""Event streams as the HTTP clients of other languages read them, directly and through each sample in deploy/."""

import json
import os
import shutil
import subprocess
import threading

import httpx
import pytest
from conftest import ROOT, until
from httpx_sse import connect_sse
from samples import SAMPLES

READERS = ROOT / "tests/python/readers"
LONG = "a sentence that comes again and again. " * 200
# The first ones are too small to be worth compressing.
MESSAGES = ["1", '{"type":"token","text":"two"}', "dreißig 水", LONG, "5"]
END = {"code": 4004, "reason": "ended by the backend"}


class Program:
    """A client as a program that prints the data of each event, and ends when its stream does."""

    def __init__(self, command, certificate, folder):
        # Go and Node read these; curl and Java are told in their command.
        env = os.environ | {"SSL_CERT_FILE": str(certificate.cert), "NODE_EXTRA_CA_CERTS": str(certificate.cert)}
        self.output, self.errors = folder / "output", folder / "errors"
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.child = subprocess.Popen(command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL, env=env)

    def lines(self):
        return self.output.read_text().removesuffix("\n").split("\n")

    def ended(self):
        code = self.child.wait(timeout=20)
        assert code == 0, self.errors.read_text()

    def stop(self):
        self.child.kill()
        self.child.wait()


class HttpxSse:
    """Python's httpx-sse, in a thread."""

    def __init__(self, url, certificate):
        self.url, self.context, self.seen, self.error = url, certificate.context, [], None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            with httpx.Client(timeout=20, verify=self.context, trust_env=False) as client:
                with connect_sse(client, "GET", self.url) as source:
                    self.seen += (event.data for event in source.iter_sse() if event.data)
        except Exception as error:
            self.error = error

    def lines(self):
        return self.seen

    def ended(self):
        self.thread.join(timeout=20)
        assert not self.thread.is_alive() and self.error is None, self.error

    def stop(self):
        pass


@pytest.fixture(scope="session")
def start_client(tmp_path_factory, certificate):
    """Starts a client by name; says so and does without it where its language is not installed."""
    built = tmp_path_factory.mktemp("clients")

    def needed(name, package):
        return shutil.which(name) or pytest.skip(f"{name} is missing (apt-get install {package}): nothing is said of this client")

    def curl(url):
        # Its output is what it got: lines of data and others.
        return [needed("curl", "curl"), "-sSN", "--cacert", str(certificate.cert), "-H", "Accept: text/event-stream", url]

    def go(url):
        program = built / "go"
        if not program.exists():
            # A cache of its own where the person who runs the tests has no home.
            env = os.environ | {"GOCACHE": str(built / "cache"), "GO111MODULE": "off"}
            subprocess.run([needed("go", "golang-go"), "build", "-o", program, READERS / "reader.go"], check=True, env=env)
        return [str(program), url]

    def java(url):
        trusted = built / "trusted.p12"
        if not (built / "Reader.class").exists():
            compiler, keytool = needed("javac", "default-jdk-headless"), needed("keytool", "default-jdk-headless")
            subprocess.run([compiler, "-d", built, READERS / "Reader.java"], check=True)
            command = [keytool, "-importcert", "-noprompt", "-alias", "test", "-file", certificate.cert]
            command += ["-keystore", trusted, "-storetype", "PKCS12", "-storepass", "changeit"]
            subprocess.run(command, check=True, capture_output=True)
        options = ["-Xshare:auto", "-XX:TieredStopAtLevel=1", f"-Djavax.net.ssl.trustStore={trusted}"]
        options += ["-Djavax.net.ssl.trustStorePassword=changeit", "-Dfile.encoding=UTF-8"]
        return [needed("java", "default-jdk-headless"), *options, "-cp", str(built), "Reader", url, "identity"]

    def eventsource(url):
        modules, lock = READERS / "node_modules", READERS / "package-lock.json"
        installed = modules / ".installed-lock"
        if not installed.exists() or installed.read_bytes() != lock.read_bytes():
            command = [needed("npm", "npm"), "ci", "--silent", "--no-audit", "--no-fund"]
            subprocess.run(command, check=True, cwd=READERS)
            shutil.copy(lock, installed)
        return [needed("node", "nodejs"), str(READERS / "reader.mjs"), url]

    commands = {"curl": curl, "go": go, "java": java, "eventsource": eventsource}

    def start(name, url, folder):
        if name == "httpx-sse":
            return HttpxSse(url, certificate)
        return Program(commands[name](url), certificate, folder)

    return start


@pytest.mark.parametrize("client", ["curl", "go", "java", "eventsource", "httpx-sse"])
@pytest.mark.parametrize("way", ["direct", *SAMPLES])
def test_each_event_is_read_as_it_comes(start_gateway, start_proxy, start_client, redis, tmp_path, way, client):
    gateway = start_gateway(WSPROXY_SERVER__TRUSTED_PROXIES="127.0.0.1")
    base = gateway.http if way == "direct" else start_proxy(way, gateway).http
    redis.client.set("session:s-1:auth", "sse.t", ex=600)
    reader = start_client(client, f"{base}/demo/ws/s-1?token=sse.t", tmp_path)
    try:
        until("it listens", lambda: redis.client.pubsub_numsub("session:s-1:down")[0][1] == 1)
        for message in MESSAGES:
            redis.client.publish("session:s-1:down", message)
            # Before the next one is published, and before the comment that comes after 15 s: no proxy holds it back until
            # more has come.
            wanted = f"data: {message}" if client == "curl" else message
            until(f"{message[:40]} is read", lambda: wanted in reader.lines(), deadline=10)
        redis.client.publish("session:s-1:control", json.dumps({"op": "close"}))
        reader.ended()
    finally:
        reader.stop()
    data = [line.removeprefix("data: ") for line in reader.lines() if client != "curl" or line.startswith("data: ")]
    assert data[:-1] == MESSAGES
    assert json.loads(data[-1]) == END
