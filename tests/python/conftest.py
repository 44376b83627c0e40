"""Real parts for the tests: redis-server, the gateway and uvicorn, on free ports, ended by their process ids."""

import os
import shutil
import signal

import httpx
import pytest
import redis as redis_py
from processes import ROOT, Process, free_port, until
from samples import Certificate, Proxy

__all__ = ["ROOT", "Process", "free_port", "until"]


class Redis:
    """A redis-server of the test's own, which can be killed and started again on its port."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client = redis_py.Redis.from_url(self.url, decode_responses=True)
        self.start()

    def start(self):
        command = [shutil.which("redis-server") or "redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        self.process = Process("redis", [*command, "--save", "", "--appendonly", "no"], self.folder)
        self.process.ready("redis-server", self.client.ping)

    def kill(self):
        self.process.stop(signal.SIGKILL)


class Gateway:
    """One instance of the gateway in front of a Redis."""

    def __init__(self, folder, redis_url, *, port=None, **settings):
        binary = os.environ.get("WSPROXY_BIN", str(ROOT / "target/debug/wsproxy"))
        self.port = port or free_port()
        self.http, self.ws = f"http://127.0.0.1:{self.port}", f"ws://127.0.0.1:{self.port}"
        env = {"REDIS_URL": redis_url, "WSPROXY_LOG__FORMAT": "json"}
        if "WSPROXY_SERVER__UNIX" not in settings:
            env["PORT"] = str(self.port)
        # Tests that have no balancer need not wait for one.
        self.env = env | {"WSPROXY_SERVER__DRAIN_DELAY": "0s", **settings}
        self.command, self.folder = [binary, "serve"], folder
        self.start()

    def start(self):
        self.process = Process(f"gateway-{self.port}", self.command, self.folder, self.env, cwd=self.folder)
        self.process.ready("gateway", self.is_ready)

    def is_ready(self):
        socket = self.env.get("WSPROXY_SERVER__UNIX")
        # No proxy is at this address: an instance that expects PROXY headers of 127.0.0.1 answers here without one.
        transport = httpx.HTTPTransport(uds=socket, local_address=None if socket else "127.0.0.3")
        with httpx.Client(transport=transport) as client:
            return client.get(f"{self.http}/ready").status_code == 200

    @property
    def upstream(self):
        """The instance's place, as configurations of proxies write it."""
        socket = self.env.get("WSPROXY_SERVER__UNIX")
        return f"unix:{socket}" if socket else f"127.0.0.1:{self.port}"


@pytest.fixture
def redis(tmp_path):
    server = Redis(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def start_gateway(tmp_path, redis):
    """Starts instances; all are stopped at the end."""
    started = []

    def start(**settings):
        started.append(Gateway(tmp_path, redis.url, **settings))
        return started[-1]

    yield start
    for gateway in started:
        gateway.process.stop()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    return Certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def start_proxy(tmp_path, certificate):
    """Starts samples in front of instances; all are stopped at the end."""
    started = []

    def start(name, *gateways):
        folder = tmp_path / name
        folder.mkdir()
        started.append(Proxy(name, folder, [gateway.upstream for gateway in gateways], certificate))
        return started[-1]

    yield start
    for proxy in started:
        proxy.stop()


@pytest.fixture
def gateway(start_gateway):
    return start_gateway(WSPROXY_SESSIONS__NO_RECEIVER="queue")


@pytest.fixture
def session(redis):
    """Makes one-time tokens for the session `s-1`, as a worker with Redis does."""

    def token(value="a-token"):
        redis.client.set("session:s-1:auth", value, ex=60)
        return value

    return token


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="all checks of testssl.sh, and faults of the tunnel for longer: some twenty minutes more")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """A failed test shows what the processes said."""
    report = (yield).get_result()
    folder = item.funcargs.get("tmp_path")
    if report.failed and folder:
        for log in sorted(folder.rglob("*.log")):
            report.sections.append((log.name, log.read_text(errors="replace")[-8000:]))
