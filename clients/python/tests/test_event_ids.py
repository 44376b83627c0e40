"""Positions and event ids of a worker's own: what a history tells about them, and which ones are refused."""

from __future__ import annotations

import json

import pytest

from conftest import RedisServer
from wsproxy import Event, Outgoing, Receipt, Worker

pytestmark = pytest.mark.asyncio

CONNECTION = "0199f2c4-7d1a-7c3e-9a51-0b8d6f2e4c11"


async def test_what_a_history_lacks_is_said(redis: RedisServer, redis_worker: Worker) -> None:
    async def lost(after: str | None) -> str | None:
        return (await redis_worker.history(session="s-1", after=after or "")).lost

    assert await lost("0") is None
    first = await redis_worker.send("s-1", {"n": 1})
    await redis_worker.send("s-1", {"n": 2}, event_id="mine")
    third = await redis_worker.send("s-1", {"n": 3})
    page = await redis_worker.history(session="s-1", after="mine")
    assert [(each.event_id, each.own_event_id) for each in page.events] == [(third.event_id, None)]
    mine = (await redis_worker.history(session="s-1", after=first.event_id or "")).events[0]
    assert mine.own_event_id == "mine"
    assert [await lost(after) for after in ("0-0", "mine", third.event_id)] == [None, None, None]
    # The id of an entry is not its identity.
    other = (first.event_id or "").rpartition("-")[0] + "-ffffffff"
    assert [await lost(after) for after in ("other", "5-5", other)] == ["unknown"] * 3
    await redis_worker.send("s-1", {"n": 4}, event_id="mine")
    page = await redis_worker.history(session="s-1", after="mine")
    assert (page.lost, page.events) == ("ambiguous", ())
    redis.client.flushall()
    assert await lost(third.event_id) == "emptied"
    assert await lost("5-0-00000000") == "expired"
    await redis_worker.send("s-1", {"n": 5})
    assert await lost(third.event_id) == "unknown"


@pytest.mark.parametrize("over", ["redis", "http"])
@pytest.mark.parametrize(
    "bad",
    [
        "",
        "0",
        "0-0",
        "1-2",
        "1732190000000-7",
        "1732190000000-7-5d2c0f6a",
        "1-2-F",
        "a b",
        "a\n",
        "a\x7f",
        "x" * 129,
        "\ud800",
    ],
)
async def test_an_event_id_that_means_something_else_is_refused_before_it_is_sent(
    redis: RedisServer, over: str, bad: str
) -> None:
    # No server listens there, so that nothing could be sent.
    made = Worker.redis(redis.url) if over == "redis" else Worker.http("http://127.0.0.1:1", "k", retry_for=0)
    async with made as worker:
        for publish in (
            lambda: worker.send("s-1", {}, event_id=bad),
            lambda: worker.broadcast("x", event_id=bad),
            lambda: worker.to_user("u-1", "x", event_id=bad),
            lambda: worker.to_connection(CONNECTION, "x", event_id=bad),
            lambda: worker.batch([Outgoing("broadcast", Event("x", event_id=bad))]),
            lambda: worker.batch([Outgoing("broadcast", {"type": "x"}), Outgoing("user:u-1", {"event_id": bad})]),
            lambda: worker.batch([Outgoing("session:s-1", Event("x", event_id=bad))]),
        ):
            with pytest.raises(ValueError, match="event_id"):
                await publish()
    assert redis.client.keys() == []


@pytest.mark.parametrize(
    "good", ["1", "0a", "1-", "-1", "1-2-", "1-2-3-4", "1-2-x", "2026-11-21T12", "order:9", "ä", "x" * 128]
)
async def test_other_event_ids_are_taken_by_the_script_too(redis_worker: Worker, good: str) -> None:
    await redis_worker.send("s-1", {}, event_id=good)
    assert (await redis_worker.history(session="s-1")).events[0].own_event_id == good


async def test_a_member_of_the_application_is_no_event_id(redis: RedisServer, redis_worker: Worker) -> None:
    message = {"event_id": "1-2", "n": 1}
    await redis_worker.send("s-1", message)
    assert isinstance((await redis_worker.batch([Outgoing("session:s-1", message)]))[0], Receipt)
    await redis_worker.send("s-1", message, event_id="mine")
    assert [json.loads(each) for each in redis.texts("{session:s-1:down}:log")] == [message] * 3
    kept = (await redis_worker.history(session="s-1")).events
    assert [each.own_event_id for each in kept] == [None, None, "mine"]


@pytest.mark.parametrize("over", ["redis", "http"])
async def test_a_plain_message_that_looks_like_one_with_history_is_refused(redis: RedisServer, over: str) -> None:
    made = Worker.redis(redis.url) if over == "redis" else Worker.http("http://127.0.0.1:1", "k", retry_for=0)
    async with made as worker:
        for forged in (b"\xffH2 9-0-00000000 0-0 \n{}", b"\xffH1 ", b"\xffH9"):
            with pytest.raises(ValueError, match="FF"):
                await worker.send("s-1", forged, history=False)
    if over == "redis":
        async with Worker.redis(redis.url) as worker:
            await worker.send("s-1", b"\xffHello", history=False)
            await worker.send("s-1", forged)
            assert (await worker.history(session="s-1")).events[0].data == forged
