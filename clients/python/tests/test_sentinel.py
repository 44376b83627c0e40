"""The worker over Redis Sentinel: it follows a failover with calls and with subscriptions."""

from __future__ import annotations

import asyncio
import pathlib
import re
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_py
from redis.asyncio.sentinel import Sentinel

from conftest import ROOT, Process, eventually, free_port, until, within
from wsproxy import Outgoing, Unavailable, Worker
from wsproxy._pool import pool

BINARY = shutil.which("redis-server") or "redis-server"


class Sentinels:
    """A master, a replica and sentinels."""

    def __init__(self, folder: pathlib.Path, count: int = 1) -> None:
        self._folder = folder
        self.ports = [free_port(), free_port()]
        self.servers = [self._server(port) for port in self.ports]
        self.client(1).replicaof("127.0.0.1", self.ports[0])
        until("the replica follows", lambda: self.client(1).info()["master_link_status"] == "up")
        self.places: list[int] = []
        self.processes: list[Process] = []
        for _ in range(count):
            self.add(quorum=count // 2 + 1)
        until("the sentinels know all others", lambda: all(self._is_complete(port) for port in self.places))

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.places)}/mymaster"

    def add(self, quorum: int, down_after_ms: int = 500) -> None:
        """Starts a further sentinel of the first master; it comes first in the URL."""
        port = free_port()
        conf = self._folder / f"sentinel-{port}.conf"
        conf.write_text(
            f"port {port}\nrequirepass secret\nsentinel sentinel-pass secret\n"
            f"sentinel monitor mymaster 127.0.0.1 {self.ports[0]} {quorum}\n"
            f"sentinel down-after-milliseconds mymaster {down_after_ms}\nsentinel failover-timeout mymaster 2000\n"
        )
        self.places.insert(0, port)
        process = Process(f"sentinel-{port}", [BINARY, str(conf), "--sentinel"], self._folder)
        self.processes.insert(0, process)
        process.ready("the sentinel", self.sentinel(port).ping)

    def sentinel(self, port: int) -> Any:
        return redis_py.Redis(port=port, password="secret", decode_responses=True)

    def state(self, port: int) -> Any:
        return self.sentinel(port).sentinel_master("mymaster")

    def _is_complete(self, port: int) -> bool:
        state = self.state(port)
        return (state["num-slaves"], state["num-other-sentinels"]) == (1, len(self.places) - 1)

    def _server(self, port: int) -> Process:
        command = [BINARY, "--port", str(port), "--save", "", "--repl-diskless-sync-delay", "0"]
        process = Process(f"redis-{port}", command, self._folder)
        process.ready("redis-server", redis_py.Redis(port=port).ping)
        return process

    def client(self, place: int) -> Any:
        return redis_py.Redis(port=self.ports[place], decode_responses=True)

    def stop(self) -> None:
        for process in [*self.processes, *self.servers]:
            process.stop(signal.SIGKILL)


@pytest.fixture
def sentinels(tmp_path: pathlib.Path) -> Iterator[Sentinels]:
    started = Sentinels(tmp_path)
    yield started
    started.stop()


LOGIN = {"password": "secret"}


@pytest.mark.asyncio
async def test_a_worker_follows_a_failover(sentinels: Sentinels) -> None:
    async with Worker.redis(sentinels.url, sentinel_kwargs=LOGIN) as worker:
        messages = worker.upstream("s-1")
        await within(messages.confirmed())
        await worker.issue_token("demo", "s-1")
        sentinels.servers[0].stop(signal.SIGKILL)
        await eventually("the replica is promoted", lambda: sentinels.client(1).info()["role"] == "master")
        await within(_issued(worker))
        assert sentinels.client(1).get("session:s-2:auth")
        channel = "session:s-1:up"
        await eventually("the subscription moves", lambda: sentinels.client(1).pubsub_numsub(channel)[0][1] == 1)
        sentinels.client(1).publish(channel, "up")
        assert (await within(anext(messages))).text == "up"
        await messages.aclose()


@pytest.fixture
def three(tmp_path: pathlib.Path) -> Iterator[Sentinels]:
    started = Sentinels(tmp_path, 3)
    yield started
    started.stop()


@pytest.mark.asyncio
async def test_a_frozen_sentinel_holds_up_no_worker(three: Sentinels) -> None:
    three.processes[0].child.send_signal(signal.SIGSTOP)
    async with Worker.redis(three.url, sentinel_kwargs=LOGIN) as worker:
        await within(worker.issue_token("demo", "s-1"), 5)
        await within(worker.upstream("s-1").confirmed(), 5)


@pytest.mark.asyncio
async def test_the_master_of_the_newest_failover_is_used(sentinels: Sentinels) -> None:
    sentinels.servers[0].child.send_signal(signal.SIGSTOP)
    own = sentinels.sentinel(sentinels.places[0])
    promoted = ("127.0.0.1", sentinels.ports[1])
    await eventually("a failover", lambda: own.sentinel_get_master_addr_by_name("mymaster") == promoted)
    # A sentinel that was cut off: it names the first master, and does not hear of the other one.
    await asyncio.to_thread(sentinels.add, 1, 60_000)
    assert sentinels.state(sentinels.places[0])["port"] == sentinels.ports[0]
    async with Worker.redis(sentinels.url, sentinel_kwargs=LOGIN) as worker:
        await within(worker.issue_token("demo", "s-1"), 5)
    assert sentinels.client(1).get("session:s-1:auth")


@pytest.mark.asyncio
async def test_a_call_without_a_master_was_not_done() -> None:
    url = f"redis+sentinel://127.0.0.1:{free_port()}/mymaster"
    async with Worker.redis(url, retry_for=0.2) as worker:
        with pytest.raises(Unavailable, match="Not done: No sentinel names the master 'mymaster'") as raised:
            await within(worker.send("s-1", {}, history=False))
        assert not raised.value.in_doubt


@pytest.mark.asyncio
async def test_a_write_that_a_demoted_master_refuses_was_not_done(sentinels: Sentinels) -> None:
    async with Worker.redis(sentinels.url, retry_for=0, sentinel_kwargs=LOGIN) as worker:
        await worker.send("s-1", {"n": 0})
        sentinels.processes[0].stop(signal.SIGKILL)
        sentinels.client(0).replicaof("127.0.0.1", sentinels.ports[1])
        with pytest.raises(Unavailable, match="Not done") as raised:
            await within(worker.send("s-1", {"n": 1}))
        assert not raised.value.in_doubt


@pytest.mark.asyncio
async def test_a_batch_that_a_demoted_master_refuses_is_in_doubt(sentinels: Sentinels) -> None:
    async with Worker.redis(sentinels.url, retry_for=0, sentinel_kwargs=LOGIN) as worker:
        await worker.send("s-1", {"n": 0})
        sentinels.client(0).replicaof("127.0.0.1", sentinels.ports[1])
        # Messages before the refused one may have been published.
        with pytest.raises(Unavailable) as raised:
            await within(worker.batch([Outgoing("session:s-1", {}), Outgoing("session:s-1", {})]))
        assert raised.value.in_doubt


def documented(who: str) -> list[str]:
    """The rights at the sentinels in a row of the documentation."""
    page = (ROOT / "docs/deploy/redis.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| {who} |"))
    return [right.replace("\\|", "|") for right in re.findall(r"`(\+[^`]+)`", row)]


@pytest.mark.parametrize("who", ["`Worker.redis`", "`master_for` of redis-py"])
@pytest.mark.asyncio
async def test_the_documented_rights_at_sentinels_suffice(sentinels: Sentinels, who: str) -> None:
    own = sentinels.sentinel(sentinels.places[0])
    own.execute_command("ACL", "SETUSER", "app", "reset", "on", ">pw", *documented(who))
    login = {"username": "app", "password": "pw"}
    if who == "`Worker.redis`":
        async with Worker.redis(sentinels.url, sentinel_kwargs=login, retry_for=0) as worker:
            await worker.issue_token("demo", "s-1")
    else:
        sentinel: Any = Sentinel
        manager = sentinel([("127.0.0.1", sentinels.places[0])], sentinel_kwargs=login)
        async with manager.master_for("mymaster") as client:
            assert await client.ping()
        for each in manager.sentinels:
            await each.aclose()


@pytest.mark.asyncio
async def test_a_closed_worker_has_no_connection_to_sentinels(sentinels: Sentinels) -> None:
    own = sentinels.sentinel(sentinels.places[0])
    before = {each["id"] for each in own.client_list()}

    def others() -> int:
        # Sentinels name their own connections.
        named = [each["name"] for each in own.client_list() if each["id"] not in before]
        return sum(not each.startswith("sentinel") for each in named)

    async with Worker.redis(sentinels.url, sentinel_kwargs=LOGIN) as worker:
        await worker.issue_token("demo", "s-1")
        await within(worker.upstream("s-1").confirmed())
        assert others() == 2
    await eventually("the connections end", lambda: others() == 0, 5)


async def _issued(worker: Worker) -> None:
    while True:
        try:
            await worker.issue_token("demo", "s-2")
            return
        except Unavailable:
            await asyncio.sleep(0.05)


def test_urls_of_sentinels_are_read() -> None:
    made: Any = pool("rediss+sentinel://me:p%40ss@s1,[::1]:7/mymaster/3", {"ssl_ca_certs": "ca.pem"})
    assert (made.service_name, made.connection_kwargs["db"]) == ("mymaster", 3)
    assert (made.connection_kwargs["username"], made.connection_kwargs["password"]) == ("me", "p@ss")
    found = [each.connection_pool.connection_kwargs for each in made.sentinel_manager.sentinels]
    assert [(each["host"], each["port"]) for each in found] == [("s1", 26379), ("::1", 7)]
    assert all(each["ssl_ca_certs"] == "ca.pem" and each.get("password") is None for each in found)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis+sentinel://s1", "name of the master"),
        ("unix+sentinel://s1/m", "scheme"),
        ("redis+sentinel://s1,,s2/m", "host"),
    ],
)
def test_wrong_urls_of_sentinels_are_refused(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        pool(url, {})


def test_logins_of_sentinels_need_sentinels() -> None:
    with pytest.raises(ValueError, match="sentinel_kwargs"):
        pool("redis://127.0.0.1", {"sentinel_kwargs": {}})
