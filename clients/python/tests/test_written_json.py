"""Values that JSON or UTF-8 cannot express are refused before anything is sent, wherever they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from conftest import RedisServer, within
from wsproxy import Event, InvalidRequest, Outgoing, Worker

HALF = "half \ud800"
CONNECTION = "0199f2c4-7d1a-7c3e-9a51-0b8d6f2e4c11"


async def with_meta(worker: Worker, meta: dict[str, Any]) -> None:
    async with worker.stream("s-1", "t-1", meta=meta, watch_stop=False):
        pass


CALLS: list[Callable[[Worker, Any], Awaitable[Any]]] = [
    lambda worker, wrong: worker.send("s-1", {"a": [wrong]}),
    lambda worker, wrong: worker.send("s-1", {"a": wrong}, history=False),
    lambda worker, wrong: worker.broadcast("t", wrong),
    lambda worker, wrong: worker.to_user("u-1", "t", {"a": wrong}),
    lambda worker, wrong: worker.to_connection(CONNECTION, "t", wrong),
    lambda worker, wrong: worker.batch([Outgoing("session:s-1", {"n": 1}), Outgoing("user:u-1", Event("t", wrong))]),
    lambda worker, wrong: with_meta(worker, {"a": wrong}),
]
TEXTS: list[Callable[[Worker], Awaitable[Any]]] = [
    lambda worker: worker.send("s-1", HALF),
    lambda worker: worker.send("s-1", {HALF: 1}),
    lambda worker: worker.send("s-1", 1, idempotency_key="half\ud800"),
    lambda worker: worker.send("s-1", 1, event_id="half\ud800"),
    lambda worker: worker.broadcast(HALF),
    lambda worker: worker.close_session("s-1", reason=HALF),
    lambda worker: worker.disconnect(user="u-1", reason=HALF),
    lambda worker: worker.disconnect(jti=HALF, revoke=60),
]


@pytest.mark.asyncio
async def test_what_cannot_be_written_is_refused_and_not_sent(worker: Worker, redis: RedisServer) -> None:
    before = set(redis.client.keys("*"))
    for call in CALLS:
        for wrong in (float("nan"), float("inf"), -float("inf"), HALF):
            with pytest.raises(InvalidRequest):
                await within(call(worker, wrong))
    for text in TEXTS:
        with pytest.raises(InvalidRequest):
            await within(text(worker))
    assert {each for each in set(redis.client.keys("*")) - before if "session:" in each or "stream" in each} == set()


@pytest.mark.asyncio
async def test_a_stream_whose_error_cannot_be_written_goes_on(worker: Worker) -> None:
    async with worker.stream("s-1", watch_stop=False) as stream:
        for text in (stream.append(HALF), stream.error("code", HALF), stream.error(HALF, "text")):
            with pytest.raises(InvalidRequest):
                await within(text)
        await stream.append("whole")
    assert (stream.outcome, stream.text) == ("finish", "whole")
