"""Session events that are kept: followed over both ways, from a position on, through every interruption."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from conftest import API_KEY, Gateway, RedisServer, StartGateway, eventually, within
from wsproxy import Gap, InvalidRequest, SessionEvent, Worker
from wsproxy.client import connect_session

pytestmark = pytest.mark.asyncio
LOG = "{agent:demo:sessions}:log"


@pytest.fixture
def gateway(start_gateway: StartGateway) -> Gateway:
    return start_gateway(WSPROXY_SESSIONS__EVENTS_LOG="true")


@pytest_asyncio.fixture(params=["redis", "http"])
async def worker(request: pytest.FixtureRequest, redis: RedisServer, gateway: Gateway) -> AsyncIterator[Worker]:
    made = Worker.redis(redis.url) if request.param == "redis" else Worker.http(gateway.url, API_KEY)
    async with made as worker:
        yield worker


async def visit(worker: Worker, gateway: Gateway, session: str) -> None:
    """A client comes and goes."""
    token = await worker.issue_token("demo", session)
    async with connect_session(gateway.url, "demo", session, token=token, proxy=None) as client:
        await eventually("the client is connected", lambda: client.state == "open")


async def take(worker: Worker, count: int, after: str, gaps: list[Gap] | None = None) -> list[SessionEvent]:
    async with worker.session_events("demo", after=after, on_gap=(gaps if gaps is not None else []).append) as events:
        return [await within(anext(events)) for _ in range(count)]


def told(events: list[SessionEvent]) -> list[tuple[str, str]]:
    return [(each.event, each.session_id) for each in events]


async def test_what_is_kept_comes_from_the_start_or_behind_an_entry(worker: Worker, gateway: Gateway) -> None:
    for session in ("s-1", "s-2"):
        await visit(worker, gateway, session)
    every = await take(worker, 4, "0")
    assert told(every) == [("opened", "s-1"), ("closed", "s-1"), ("opened", "s-2"), ("closed", "s-2")]
    assert len({each.event_id for each in every}) == 4
    gaps: list[Gap] = []
    position = every[1].event_id
    assert position is not None
    assert told(await take(worker, 2, position, gaps)) == [("opened", "s-2"), ("closed", "s-2")]
    assert gaps == []
    # An entry that is not kept any more: something may be missing.
    assert len(await take(worker, 4, "5-5", gaps)) == 4
    assert [gap.reason for gap in gaps] == ["history_lost"]
    with pytest.raises(InvalidRequest):
        worker.session_events("demo", after="now")


async def test_what_comes_while_a_reader_is_away_is_not_missed(
    worker: Worker, gateway: Gateway, redis: RedisServer
) -> None:
    gaps: list[Gap] = []
    async with worker.session_events("demo", after="0", on_gap=gaps.append) as events:
        await visit(worker, gateway, "s-1")
        assert told([await within(anext(events)) for _ in range(2)]) == [("opened", "s-1"), ("closed", "s-1")]
        # The gateway goes away and comes back; Redis has what another instance wrote meanwhile.
        gateway.process.stop()
        written = json.dumps({**EVENT, "event": "opened"}), json.dumps({**EVENT, "event": "closed"})
        for each in written:
            redis.client.xadd(LOG, {"data": each})
        await asyncio.to_thread(gateway.start)
        found = [await within(anext(events), 40) for _ in range(2)]
        assert told(found) == [("opened", "elsewhere"), ("closed", "elsewhere")]
        await visit(worker, gateway, "s-2")
        assert told([await within(anext(events)) for _ in range(2)]) == [("opened", "s-2"), ("closed", "s-2")]
    assert gaps == []


EVENT = {
    "agent_id": "demo",
    "session_id": "elsewhere",
    "connection_id": "0199f2c4-7d1a-7c3e-9a51-0b8d6f2e4c11",
    "transport": "websocket",
    "server_id": "other",
    "timestamp": "2026-11-28T00:00:00.000Z",
}


async def test_a_long_log_is_read_at_the_readers_pace(worker: Worker, redis: RedisServer) -> None:
    pipeline = redis.client.pipeline()
    for number in range(12_000):
        pipeline.xadd(LOG, {"data": json.dumps({**EVENT, "event": "opened", "session_id": f"s-{number}"})})
    pipeline.execute()
    gaps: list[Gap] = []
    async with worker.session_events("demo", after="0", on_gap=gaps.append) as events:
        # Slower than what is read could come.
        first = await within(anext(events))
        await asyncio.sleep(1)
        rest = [await within(anext(events)) for _ in range(11_999)]
    assert [each.session_id for each in [first, *rest]] == [f"s-{number}" for number in range(12_000)]
    assert gaps == []


async def test_a_live_follower_comes_back_behind_its_last_event(gateway: Gateway, redis: RedisServer) -> None:
    gaps: list[Gap] = []
    async with (
        Worker.http(gateway.url, API_KEY) as worker,
        worker.session_events("demo", on_gap=gaps.append) as events,
    ):
        await visit(worker, gateway, "s-1")
        assert told([await within(anext(events)) for _ in range(2)]) == [("opened", "s-1"), ("closed", "s-1")]
        gateway.process.stop()
        redis.client.xadd(LOG, {"data": json.dumps({**EVENT, "event": "opened"})})
        await asyncio.to_thread(gateway.start)
        assert told([await within(anext(events), 40)]) == [("opened", "elsewhere")]
    assert gaps == []


async def test_the_end_of_a_killed_gateways_sessions_is_told(
    start_gateway: StartGateway, redis: RedisServer, gateway: Gateway
) -> None:
    killed = start_gateway(WSPROXY_SESSIONS__EVENTS_LOG="true", SERVER_ID="killed")
    async with Worker.redis(redis.url) as worker:
        token = await worker.issue_token("demo", "s-1")
        async with connect_session(killed.url, "demo", "s-1", token=token, proxy=None) as client:
            await eventually("the client is connected", lambda: client.state == "open")
            async with worker.session_events("demo", after="0") as events:
                assert told([await within(anext(events))]) == [("opened", "s-1")]
                killed.kill()
                event = await within(anext(events), 60)
                if event.event == "opened":
                    # Killed before it could mark what it had announced: at least once is twice then.
                    assert event.session_id == "s-1"
                    event = await within(anext(events), 60)
    assert (event.event, event.reason, event.code, event.duration_ms) == ("closed", "server_lost", 1006, None)
    assert event.server_id == "killed"
