"""The worker over Redis Sentinel: it follows a failover with calls and with subscriptions."""

from __future__ import annotations

import asyncio
import pathlib
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_py

from conftest import Process, eventually, free_port, until, within
from wsproxy import Unavailable, Worker
from wsproxy._pool import pool

BINARY = shutil.which("redis-server") or "redis-server"


class Sentinels:
    """A master, a replica and one sentinel."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.ports = [free_port(), free_port()]
        self.sentinel = free_port()
        self.servers = [self._server(folder, port) for port in self.ports]
        self.client(1).replicaof("127.0.0.1", self.ports[0])
        conf = folder / "sentinel.conf"
        conf.write_text(
            f"port {self.sentinel}\nrequirepass secret\nsentinel monitor mymaster 127.0.0.1 {self.ports[0]} 1\n"
            "sentinel down-after-milliseconds mymaster 500\nsentinel failover-timeout mymaster 2000\n"
        )
        self.process = Process("sentinel", [BINARY, str(conf), "--sentinel"], folder)
        own: Any = redis_py.Redis(port=self.sentinel, password="secret", decode_responses=True)
        until("the sentinel knows the replica", lambda: own.sentinel_master("mymaster")["num-slaves"] == 1)
        until("the replica follows", lambda: self.client(1).info()["master_link_status"] == "up")
        self.url = f"redis+sentinel://127.0.0.1:{self.sentinel}/mymaster"

    def _server(self, folder: pathlib.Path, port: int) -> Process:
        command = [BINARY, "--port", str(port), "--save", "", "--repl-diskless-sync-delay", "0"]
        process = Process(f"redis-{port}", command, folder)
        process.ready("redis-server", redis_py.Redis(port=port).ping)
        return process

    def client(self, place: int) -> Any:
        return redis_py.Redis(port=self.ports[place], decode_responses=True)

    def stop(self) -> None:
        for process in [self.process, *self.servers]:
            process.stop(signal.SIGKILL)


@pytest.fixture
def sentinels(tmp_path: pathlib.Path) -> Iterator[Sentinels]:
    started = Sentinels(tmp_path)
    yield started
    started.stop()


@pytest.mark.asyncio
async def test_a_worker_follows_a_failover(sentinels: Sentinels) -> None:
    async with Worker.redis(sentinels.url, sentinel_kwargs={"password": "secret"}) as worker:
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
