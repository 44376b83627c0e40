"""All sessions of an agent: each by one worker, for as long as the application lives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from conftest import (
    API_KEY,
    ROOT,
    Gateway,
    Process,
    RedisServer,
    StartGateway,
    eventually,
    free_port,
    over_both,
    until,
    within,
)
from wsproxy import InvalidRequest, ServedSession, Worker
from wsproxy.client import Client, connect_session

OWNER = "{session:s-1:up}:owner"


@pytest.fixture(params=["true", "false"], ids=["events kept", "events not kept"])
def gateway(request: pytest.FixtureRequest, start_gateway: StartGateway) -> Gateway:
    return start_gateway(WSPROXY_SESSIONS__EVENTS_LOG=request.param)


@pytest.fixture
def keeping(start_gateway: StartGateway) -> Gateway:
    return start_gateway(WSPROXY_SESSIONS__EVENTS_LOG="true")


@pytest_asyncio.fixture
async def other(redis: RedisServer) -> AsyncIterator[Worker]:
    async with Worker.redis(redis.url) as worker:
        yield worker


@contextlib.asynccontextmanager
async def client(worker: Worker, gateway: Gateway, session: str = "s-1") -> AsyncIterator[Client]:
    async def token() -> str:
        return (await worker.issue_token("demo", session)).token

    async with connect_session(gateway.url, "demo", session, token=token, proxy=None) as connection:
        await eventually("the client is connected", lambda: connection.state == "open")
        yield connection


class Echo:
    """A handler that says what it hears, and remembers when it began and ended."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.said: list[str] = []

    async def __call__(self, session: ServedSession) -> None:
        self.said.append(f"begin {session.id}")
        async for message in session:
            await session.send({"by": self.name, "echo": message.json()})
        self.said.append(f"end {session.id}")


async def answer(connection: Client) -> Any:
    return (await within(anext(connection))).json()


@pytest.mark.asyncio
async def test_every_session_of_the_agent_is_served_until_its_clients_have_gone(
    worker: Worker, gateway: Gateway, redis: RedisServer
) -> None:
    echo = Echo("a")
    async with worker.serve("demo", echo, linger=0.2) as serving:
        async with client(worker, gateway, "s-1") as first, client(worker, gateway, "s-2") as second:
            for number, connection in ((1, first), (2, second), (3, first)):
                await connection.send(number)
                assert await answer(connection) == {"by": "a", "echo": number}
            assert sorted(serving.sessions) == ["s-1", "s-2"]
        await eventually("both have ended", lambda: len(echo.said) == 4)
        await eventually("nothing is held", lambda: not serving.sessions)
        assert sorted(echo.said) == ["begin s-1", "begin s-2", "end s-1", "end s-2"]
        # And again.
        async with client(worker, gateway, "s-1") as first:
            await first.send(4)
            # Nothing of before comes again.
            assert await answer(first) == {"by": "a", "echo": 4}
    assert redis.client.keys("*:owner") == []


@over_both
@pytest.mark.asyncio
async def test_of_two_workers_one_serves_a_session_and_the_other_goes_on(
    redis_worker: Worker, other: Worker, keeping: Gateway, redis: RedisServer
) -> None:
    echoes = {"a": Echo("a"), "b": Echo("b")}
    async with contextlib.AsyncExitStack() as stack:
        servings = {
            "a": await stack.enter_async_context(redis_worker.serve("demo", echoes["a"], lease=1.0)),
            "b": await stack.enter_async_context(other.serve("demo", echoes["b"], lease=1.0)),
        }
        connection = await stack.enter_async_context(client(redis_worker, keeping))
        await connection.send(0)
        by = (await answer(connection))["by"]
        await asyncio.sleep(1.5)
        assert [name for name, serving in servings.items() if serving.sessions] == [by]
        # One ends in order: the other takes the session, and what came meanwhile.
        await servings[by].__aexit__(None, None, None)
        await connection.send(1)
        assert await answer(connection) == {"by": "b" if by == "a" else "a", "echo": 1}


@pytest.mark.asyncio
async def test_a_worker_that_starts_finds_open_sessions_and_what_was_kept(
    redis_worker: Worker, keeping: Gateway, redis: RedisServer
) -> None:
    async with client(redis_worker, keeping) as connection:
        await connection.send({"text": "early"})
        await eventually("it is kept", lambda: redis.client.xlen("{session:s-1:up}:log") == 1)
        async with redis_worker.serve("demo", Echo("late")):
            assert await answer(connection) == {"by": "late", "echo": {"text": "early"}}


@pytest.mark.asyncio
async def test_a_worker_that_dies_is_replaced_after_its_lease(
    redis_worker: Worker, other: Worker, keeping: Gateway, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        dying = await redis_worker.serve("demo", Echo("dying"), lease=1.0).__aenter__()
        connection = await stack.enter_async_context(client(other, keeping))
        await connection.send(0)
        assert (await answer(connection))["by"] == "dying"
        await stack.enter_async_context(other.serve("demo", Echo("next"), lease=1.0))
        # As if its process were killed: it gives nothing back.
        monkeypatch.setattr("wsproxy._redis.RELEASE", "return 0")
        await redis_worker.aclose()
        await dying.__aexit__(None, None, None)
        await connection.send(1)
        assert await answer(connection) == {"by": "next", "echo": 1}


@pytest.mark.asyncio
async def test_sessions_are_served_on_when_redis_comes_back_empty(
    redis_worker: Worker, keeping: Gateway, redis: RedisServer
) -> None:
    echo = Echo("a")
    async with redis_worker.serve("demo", echo, lease=1.0) as serving, client(redis_worker, keeping) as connection:
        await eventually("it is served", lambda: serving.sessions)
        redis.kill()
        await asyncio.sleep(1.5)
        await asyncio.to_thread(redis.start)
        await eventually("it listens again", lambda: redis.heard("session:s-1:up"))
        await eventually("it is held again", lambda: redis.client.exists(OWNER))
        await eventually("the gateway is back", lambda: httpx.get(f"{keeping.url}/ready").status_code == 200)
        await connection.send(1)
        while (await answer(connection)).get("echo") != 1:
            pass
    assert echo.said == ["begin s-1", "end s-1"]


@pytest.mark.asyncio
async def test_a_handler_that_raises_ends_neither_its_session_nor_others(
    redis_worker: Worker, keeping: Gateway, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def picky(session: ServedSession) -> None:
        async for message in session:
            await session.send({"len": len(message.json()["text"])})

    async with client(redis_worker, keeping) as connection:
        # Kept and live ones alike are not given again.
        inputs: list[Any] = [{"text": "ab"}, {"wrong": 1}, 7, {"text": "abc"}]
        for each in inputs:
            await connection.send(each)
        await eventually("all are kept", lambda: redis.client.xlen("{session:s-1:up}:log") == 4)
        async with redis_worker.serve("demo", picky):
            assert [(await answer(connection))["len"] for _ in range(2)] == [2, 3]
            await connection.send([])
            await connection.send({"text": "abcd"})
            assert await answer(connection) == {"len": 4}
    assert sum("The handler of session s-1 failed" in each.message for each in caplog.records) == 3


@pytest.mark.asyncio
async def test_the_end_waits_for_handlers_and_then_cancels_them(
    redis_worker: Worker, keeping: Gateway, redis: RedisServer
) -> None:
    said: list[str] = []

    async def slow(session: ServedSession) -> None:
        async for message in session:
            try:
                said.append("begin")
                await asyncio.sleep(message.json())
                said.append("done")
            except asyncio.CancelledError:
                said.append("cancelled")
                raise

    async with client(redis_worker, keeping) as connection:
        async with redis_worker.serve("demo", slow):
            await connection.send(0.5)
            await eventually("it works", lambda: said)
        assert said == ["begin", "done"]
        said.clear()
        async with redis_worker.serve("demo", slow, grace=0.3):
            await connection.send(60)
            await eventually("it works", lambda: said)
        assert said == ["begin", "cancelled"]
        assert not redis.client.exists(OWNER)


@pytest.mark.asyncio
async def test_a_client_that_comes_back_in_time_finds_the_same_handler(redis_worker: Worker, keeping: Gateway) -> None:
    echo = Echo()
    async with redis_worker.serve("demo", echo, linger=5.0):
        for _ in range(3):
            async with client(redis_worker, keeping) as connection:
                await connection.send(1)
                await answer(connection)
    assert echo.said == ["begin s-1", "end s-1"]


@pytest.mark.asyncio
async def test_a_handler_that_returns_is_called_for_the_next_client(redis_worker: Worker, keeping: Gateway) -> None:
    async def greet(session: ServedSession) -> None:
        await session.send({"text": "hello"})

    async with redis_worker.serve("demo", greet, linger=5.0):
        for _ in range(2):
            async with client(redis_worker, keeping) as connection:
                assert await answer(connection) == {"text": "hello"}


@pytest.mark.asyncio
async def test_a_session_taken_over_by_another_worker_is_let_go(
    redis_worker: Worker, keeping: Gateway, redis: RedisServer
) -> None:
    async with redis_worker.serve("demo", Echo(), lease=1.0) as serving, client(redis_worker, keeping):
        await eventually("it is served", lambda: serving.sessions)
        redis.client.set(OWNER, "another", px=60_000)
        await eventually("it is let go", lambda: not serving.sessions)
    assert redis.client.get(OWNER) == "another"


@pytest.mark.asyncio
async def test_no_more_sessions_than_allowed_are_served_at_once(redis_worker: Worker, keeping: Gateway) -> None:
    async with (
        redis_worker.serve("demo", Echo(), lease=1.0, linger=0.1, sessions_max=1) as serving,
        client(redis_worker, keeping, "s-1"),
    ):
        await eventually("the first is served", lambda: list(serving.sessions) == ["s-1"])
        async with client(redis_worker, keeping, "s-2") as second:
            await asyncio.sleep(0.6)
            assert list(serving.sessions) == ["s-1"]
            await second.send(1)
            waiting = asyncio.ensure_future(answer(second))
            await asyncio.sleep(0)
            for each in serving.sessions.values():
                await each.close()
            assert (await within(waiting))["echo"] == 1


def opened(redis: RedisServer, *sessions: str) -> None:
    """Announces sessions as a gateway does."""
    for session in sessions:
        members = {"event": "opened", "agent_id": "demo", "session_id": session, "connection_id": f"c-{session}"}
        announcement = json.dumps({**members, "server_id": "gw", "timestamp": "2026-11-28T18:00:00Z"})
        redis.client.xadd("{agent:demo:sessions}:log", {"data": announcement})
        redis.client.publish("agent:demo:sessions", announcement)


def names(first: int, last: int) -> list[str]:
    return [f"s-{number:02}" for number in range(first, last)]


@pytest.mark.asyncio
async def test_sessions_of_others_do_not_use_up_the_room_of_a_worker(
    redis_worker: Worker, other: Worker, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with redis_worker.serve("demo", Echo(), lease=1.0, sessions_max=20) as full:
        opened(redis, *names(0, 20))
        await eventually("it is full", lambda: len(full.sessions) == 20)
        async with other.serve("demo", Echo(), lease=1.0, sessions_max=3) as second:
            await asyncio.sleep(1.5)
            # Nothing waits while another one serves it.
            assert not second.sessions
            assert not [each for each in caplog.messages if "must wait" in each]
            opened(redis, *names(20, 23))
            await eventually("the rest is served", lambda: sorted(second.sessions) == names(20, 23))
            opened(redis, "s-23")
            await eventually(
                "that one waits is said", lambda: [each for each in caplog.messages if "must wait" in each]
            )


@pytest.mark.asyncio
async def test_the_sessions_of_a_worker_that_has_ended_fill_the_places_of_all_others(
    redis_worker: Worker, other: Worker, redis: RedisServer
) -> None:
    def owner(session: str) -> str:
        return f"{{session:{session}:up}}:owner"

    servings = [each.serve("demo", Echo(), lease=1.0, sessions_max=10) for each in (redis_worker, other)]
    # In the order of their names: five of the first, ten of a third one, five of the second.
    redis.client.mset({owner(each): servings[0]._me for each in names(0, 5)})
    redis.client.mset({owner(each): "a third one" for each in names(5, 15)})
    redis.client.mset({owner(each): servings[1]._me for each in names(15, 20)})
    opened(redis, *names(0, 20))
    async with servings[0] as first, servings[1] as second:
        await eventually("the first has its own", lambda: sorted(first.sessions) == names(0, 5))
        await eventually("the second has its own", lambda: sorted(second.sessions) == names(15, 20))
        await asyncio.sleep(0.7)
        redis.client.delete(*map(owner, names(5, 15)))
        await eventually("all are served", lambda: len(first.sessions) == len(second.sessions) == 10)


@pytest.mark.parametrize("prefix", ["", "eu"])
@pytest.mark.asyncio
async def test_a_worker_that_starts_finds_sessions_whose_opening_the_log_no_longer_has(
    redis: RedisServer, start_gateway: StartGateway, prefix: str
) -> None:
    gateway = start_gateway(
        WSPROXY_SESSIONS__EVENTS_LOG="true",
        WSPROXY_SESSIONS__EVENTS_LOG_ENTRIES_MAX="3",
        WSPROXY_REDIS__CHANNEL_PREFIX=prefix,
    )
    name = f"{prefix}:" if prefix else ""
    log = f"{{{name}agent:demo:sessions}}:log"
    async with Worker.redis(redis.url, prefix=prefix) as worker, client(worker, gateway, "s-long") as connection:
        for number in range(4):
            async with client(worker, gateway, f"s-{number}"):
                pass
        # The log is written behind the connections, and has no session at first.
        await eventually("the last end is in the log", lambda: ends(redis.texts(log), "s-3"))
        await eventually("it is trimmed", lambda: "s-long" not in "".join(redis.texts(log)))
        await eventually(
            "others have ended", lambda: redis.client.hlen(f"{name}ws:server:{server(redis)}:sessions") == 1
        )
        async with worker.serve("demo", Echo("late"), lease=1.0) as serving:
            await connection.send(1)
            assert await answer(connection) == {"by": "late", "echo": 1}
            assert list(serving.sessions) == ["s-long"]


def ends(texts: list[str], session: str) -> bool:
    entries = map(json.loads, texts)
    return any(entry.get("event") == "closed" and entry["session_id"] == session for entry in entries)


def server(redis: RedisServer) -> str:
    return str(next(redis.client.scan_iter("*ws:server:*:sessions"))).split(":")[-2]


@pytest.mark.asyncio
async def test_what_is_open_is_read_again_where_announcements_were_missed(
    redis_worker: Worker, keeping: Gateway, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    log = "{agent:demo:sessions}:log"
    async with redis_worker.serve("demo", Echo("a"), lease=1.0) as serving, client(redis_worker, keeping, "s-1"):
        await eventually("it is served", lambda: serving.sessions)
        # A connection was announced while the worker was away, and the log has been trimmed since then.
        redis.client.zadd("ws:servers", {"gone": 0})
        entry = {"agent_id": "demo", "session_id": "s-2", "transport": "websocket", "opened": "", "announced": True}
        of_others = [{**entry, "agent_id": "another"}, {**entry, "session_id": "s-3", "announced": False}, 7]
        redis.client.hset("ws:server:gone:sessions", "c-1", json.dumps(entry))
        for number, each in enumerate(of_others):
            redis.client.hset("ws:server:gone:sessions", f"o-{number}", json.dumps(each))
        redis.client.hset("ws:server:gone:sessions", "o-9", "no json")
        # In one step, so that the worker sees the log only as it is then.
        pipeline = redis.client.pipeline(transaction=True)
        pipeline.xtrim(log, maxlen=0)
        pipeline.xadd(log, {"data": "{}"})
        pipeline.publish("agent:demo:sessions", "{}")
        pipeline.execute()
        await eventually("it is found", lambda: sorted(serving.sessions) == ["s-1", "s-2"])
    assert [each for each in caplog.messages if "were missed (history_lost)" in each]


@pytest.mark.asyncio
async def test_a_worker_that_may_not_read_what_is_open_serves_what_is_announced(
    keeping: Gateway, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    # A user of the worker's own: the gateway reads hashes too.
    rights = {"categories": ["+@all"], "commands": ["-hscan"], "keys": ["*"], "channels": ["*"]}
    redis.client.acl_setuser("worker", enabled=True, nopass=True, **rights)
    url = redis.url.replace("redis://", "redis://worker:any@")
    async with Worker.redis(url) as worker, worker.serve("demo", Echo("a")), client(worker, keeping) as connection:
        await connection.send(1)
        assert (await answer(connection))["echo"] == 1
    assert [each for each in caplog.messages if "that the log no longer has are not found" in each]


@pytest.mark.asyncio
async def test_sessions_whose_end_nobody_announced_are_forgotten(
    redis_worker: Worker, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsproxy.serve._SWEEP_EVERY", 0.2)
    gateway = start_gateway(WSPROXY_SESSIONS__EVENTS_LOG="false")
    async with redis_worker.serve("demo", Echo(), lease=1.0, linger=0.1) as serving, client(redis_worker, gateway):
        await eventually("it is served", lambda: serving.sessions)
        await asyncio.sleep(2)
        assert serving.sessions
        gateway.kill()
        await eventually("it is forgotten", lambda: not serving.sessions)


def test_settings_that_make_no_sense_are_refused() -> None:
    worker = Worker.http("http://127.0.0.1:1", API_KEY)
    for wrong in ({"lease": 0.5}, {"linger": -1}, {"grace": -1}, {"sessions_max": 0}):
        with pytest.raises(InvalidRequest):
            worker.serve("demo", Echo(), **wrong)


# ---- the example ----


@pytest.fixture
def example(tmp_path: pathlib.Path, redis: RedisServer, keeping: Gateway) -> Iterator[tuple[str, Process]]:
    port = free_port()
    folder = ROOT / "examples/fastapi-agent"
    command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(folder), "--workers", "2"]
    environment = {
        "REDIS_URL": redis.url,
        "PYTHONPATH": str(ROOT / "clients/python/src"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    process = Process("uvicorn", [*command, "--port", str(port), "--log-level", "warning"], tmp_path, environment)
    url = f"http://127.0.0.1:{port}"
    # Two processes that import an application take their time.
    until("the example is ready", lambda: httpx.get(f"{url}/openapi.json").status_code == 200, 60)
    until("both processes serve", lambda: redis.heard("agent:demo:sessions") == 2, 60)
    yield url, process
    process.stop()


@pytest.mark.asyncio
async def test_the_example_answers_and_ends_with_its_application(
    example: tuple[str, Process], keeping: Gateway, redis: RedisServer
) -> None:
    url, process = example
    answer = httpx.post(f"{url}/sessions").raise_for_status().json()
    _, agent, _, session = answer["path"].split("/")
    async with connect_session(keeping.url, agent, session, token=answer["token"], proxy=None) as connection:
        await connection.send({"type": "nonsense"})
        await connection.send({"type": "prompt", "text": "hello there"})
        while not any(each.ended for each in connection.streams.values()):
            await within(anext(connection))
        (stream,) = connection.streams.values()
        assert (stream.text, stream.state, stream.meta) == ("HELLO THERE ", "finish", {"prompt": "hello there"})
        process.stop(signal.SIGTERM)
        assert process.child.returncode == 0
        assert redis.client.keys("*:owner") == []
        await connection.send({"type": "prompt", "text": "later"})
        await eventually("it is kept for the next worker", lambda: redis.texts(f"{{session:{session}:up}}:log"))
        assert [json.loads(each)["text"] for each in redis.texts(f"{{session:{session}:up}}:log")] == ["later"]


def test_the_example_is_as_short_as_it_says() -> None:
    lines = (ROOT / "examples/fastapi-agent/app.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 25
