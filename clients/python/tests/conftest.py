"""Real parts for the tests: redis-server and the gateway, on free ports, ended by their process ids."""

from __future__ import annotations

import asyncio
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import httpx
import pytest
import pytest_asyncio
import redis as redis_py

from wsproxy import Worker

if TYPE_CHECKING:
    from cluster import Cluster

ROOT = pathlib.Path(__file__).resolve().parents[3]
DEADLINE = 20.0
REDIS_BINARY = shutil.which("redis-server") or "redis-server"
API_KEY = "a-key-for-tests-0123456789abcdef"
SECRET = "a-secret-for-tests-0123456789abcdef"


# Ports that this process has given to parts, which may not listen yet.
_given: set[int] = set()


def free_port() -> int:
    # Below the range that the kernel hands out to clients, so that none of them takes it meanwhile.
    while True:
        port = random.randrange(10_000, 30_000)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port


def until(what: str, condition: Callable[[], Any], deadline: float = DEADLINE) -> Any:
    """Polls until `condition` gives something true; an exception of the network counts as not yet."""
    end, last = time.monotonic() + deadline, None
    while time.monotonic() < end:
        try:
            if result := condition():
                return result
        except (OSError, httpx.HTTPError, redis_py.RedisError) as error:
            last = error
        time.sleep(0.02)
    raise TimeoutError(f"{what} did not happen within {deadline} s: {last}")


async def eventually(what: str, condition: Callable[[], Any], deadline: float = DEADLINE) -> Any:
    """As `until`, while the loop goes on."""
    return await asyncio.to_thread(until, what, condition, deadline)


class Process:
    """A child process whose output goes to a file, and which never outlives the test."""

    def __init__(self, name: str, command: list[str], folder: pathlib.Path, env: dict[str, str] | None = None) -> None:
        self.log = folder / f"{name}.log"
        # A clean environment: variables of the person who runs the tests must not configure the gateway.
        base = {key: os.environ[key] for key in ("PATH", "HOME", "VIRTUAL_ENV", "LANG") if key in os.environ}
        with self.log.open("ab") as output:
            self.child = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=base | (env or {}),
                cwd=folder,
            )

    def ready(self, what: str, condition: Callable[[], Any]) -> None:
        def alive_and_ready() -> Any:
            assert self.child.poll() is None, f"{what} ended with {self.child.returncode}:\n{self.output()}"
            return condition()

        # Two processes that import an application take their time, on a busy machine above all.
        try:
            until(f"{what} ready", alive_and_ready, 60)
        except BaseException:
            # A fixture that does not get this far cannot stop it.
            self.stop()
            raise

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> None:
        if self.child.poll() is None:
            self.child.send_signal(with_signal)
            try:
                self.child.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()


class RedisServer:
    """A redis-server of the test's own, which can be killed and started again on its port, empty."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client: Any = redis_py.Redis(port=self.port, decode_responses=True)
        self.start()

    def start(self) -> None:
        binary = shutil.which("redis-server")
        assert binary, "redis-server is missing: apt-get install redis-server"
        command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = Process("redis", command, self.folder)
        self.process.ready("redis-server", self.client.ping)

    def kill(self) -> None:
        self.process.stop(signal.SIGKILL)

    def texts(self, log: str) -> list[str]:
        """Returns the entries of a log, oldest first."""
        return [fields["data"] for _, fields in self.client.xrange(log)]

    def heard(self, channel: str) -> int:
        return int(self.client.pubsub_numsub(channel)[0][1])

    def keys(self) -> set[str]:
        return set(self.client.keys())


def gateway_binary() -> str:
    """The gateway that the tests run: `WSPROXY_BIN`, else one that was built beside them."""
    candidates = [ROOT / "target" / kind / "wsproxy" for kind in ("release", "debug")]
    built = max((each for each in candidates if each.exists()), key=lambda each: each.stat().st_mtime, default=None)
    named = os.environ.get("WSPROXY_BIN") or (str(built) if built else "")
    if not (named and os.access(named, os.X_OK)):
        pytest.fail(
            f"The gateway is missing ({named or 'target/*/wsproxy'}): cargo build -p wsproxy, or set WSPROXY_BIN"
        )
    return named


class Gateway:
    """One instance of the gateway in front of a Redis."""

    def __init__(self, folder: pathlib.Path, redis_url: str, port: int, settings: dict[str, str]) -> None:
        self.folder, self.port = folder, port
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {
            "PORT": str(self.port),
            "REDIS_URL": redis_url,
            "WSPROXY_LOG__FORMAT": "json",
            "WSPROXY_API__KEYS": API_KEY,
            "WSPROXY_SESSIONS__HISTORY": "true",
            "WSPROXY_SESSIONS__NO_RECEIVER": "queue",
            "WSPROXY_ENDPOINTS__EVENTS": "true",
            "WSPROXY_SERVER__DRAIN_DELAY": "0",
            "WSPROXY_SERVER__DRAIN_SPREAD": "0",
            "SECRET_KEY": SECRET,
            **settings,
        }
        self.start()

    def start(self) -> None:
        self.process = Process(f"gateway-{self.port}", [gateway_binary(), "serve"], self.folder, self.env)
        self.process.ready("gateway", lambda: httpx.get(f"{self.url}/ready").status_code == 200)

    def kill(self) -> None:
        self.process.stop(signal.SIGKILL)


class StartGateway(Protocol):
    def __call__(self, **settings: str) -> Gateway: ...


@pytest.fixture
def redis(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[Any]:
    """A server of the test's own, or with `over_both` also a Cluster, which tests share."""
    if getattr(request, "param", "server") == "cluster":
        shared: Cluster = request.getfixturevalue("shared_cluster")
        shared.empty()
        yield shared
        return
    server = RedisServer(tmp_path)
    yield server
    server.kill()


over_both = pytest.mark.parametrize("redis", ["server", "cluster"], indirect=True)
"""For a test that holds over one server and over a Cluster, and ends no server."""


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Cluster for tests that leave it as it is."""
    from cluster import Cluster

    started = Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.stop()


@pytest.fixture
def start_gateway(tmp_path: pathlib.Path, redis: RedisServer) -> Iterator[StartGateway]:
    """Starts instances; all are stopped at the end."""
    started: list[Gateway] = []

    def start(**settings: str) -> Gateway:
        started.append(Gateway(tmp_path, redis.url, free_port(), settings))
        return started[-1]

    yield start
    for gateway in started:
        gateway.process.stop()


@pytest.fixture
def gateway(start_gateway: StartGateway) -> Gateway:
    return start_gateway()


@pytest_asyncio.fixture
async def redis_worker(redis: RedisServer) -> AsyncIterator[Worker]:
    """A worker over Redis, without a gateway."""
    async with Worker.redis(redis.url) as worker:
        yield worker


@pytest_asyncio.fixture(params=["redis", "http"])
async def worker(request: pytest.FixtureRequest, redis: RedisServer, gateway: Gateway) -> AsyncIterator[Worker]:
    """A worker over each of the two ways, with a gateway."""
    made = Worker.redis(redis.url) if request.param == "redis" else Worker.http(gateway.url, API_KEY)
    async with made as worker:
        yield worker


async def within(awaitable: Awaitable[Any], seconds: float = DEADLINE) -> Any:
    async with asyncio.timeout(seconds):
        return await awaitable


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Iterator[None]:
    """A failed test shows what the processes said."""
    outcome: Any = yield
    report = outcome.get_result()
    folder = item.funcargs.get("tmp_path")
    if report.failed and isinstance(folder, pathlib.Path):
        for log in sorted(folder.glob("*.log")):
            report.sections.append((log.name, log.read_text(errors="replace")[-8000:]))
