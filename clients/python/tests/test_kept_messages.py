"""Messages that were kept while no worker listened are given at least once, in order, by one worker at a time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from conftest import RedisServer, eventually, over_both, within
from proxy import Proxy
from wsproxy import InvalidRequest, Worker, _kept

pytestmark = pytest.mark.asyncio
LOG = "{session:s-1:up}:log"
LEASE = "{session:s-1:up}:reader"


def keep(redis: RedisServer, *messages: Any) -> None:
    for each in messages:
        redis.client.xadd(LOG, {"data": json.dumps(each), "sum": "1"})


def held(redis: RedisServer) -> list[Any]:
    return [json.loads(text) for text in redis.texts(LOG)]


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kept, "_LEASE", 0.6)


@pytest_asyncio.fixture
async def other(redis: RedisServer) -> AsyncIterator[Worker]:
    async with Worker.redis(redis.url) as worker:
        yield worker


@over_both
async def test_a_message_is_deleted_when_the_loop_is_done_with_it(redis: RedisServer, redis_worker: Worker) -> None:
    keep(redis, 0, 1, 2)
    async with redis_worker.upstream("s-1") as messages:
        assert (await within(anext(messages))).json() == 0
        assert held(redis) == [0, 1, 2]
        assert (await within(anext(messages))).json() == 1
        assert held(redis) == [1, 2]
        assert redis.client.pttl(LEASE) > 0
        assert (await within(anext(messages))).json() == 2
        following = asyncio.ensure_future(anext(messages))
        await eventually("the last is deleted", lambda: held(redis) == [])
        await eventually("the lease is given back", lambda: not redis.client.exists(LEASE))
        redis.client.publish("session:s-1:up", "3")
        assert (await within(following)).json() == 3


@over_both
async def test_leaving_in_order_counts_as_done_and_an_exception_does_not(
    redis: RedisServer, redis_worker: Worker
) -> None:
    keep(redis, 0, 1)
    with pytest.raises(KeyError):
        await fail(redis_worker)
    assert held(redis) == [0, 1]
    # At once: the lease was given back.
    async with redis_worker.upstream("s-1") as messages:
        async for message in messages:
            assert message.json() == 0
            break
    assert held(redis) == [1]
    seen: list[Any] = []
    task = asyncio.create_task(work_for_ever(redis_worker, seen))
    await eventually("it is being worked on", lambda: seen)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (seen, held(redis), redis.client.exists(LEASE)) == ([1], [1], 0)


async def fail(worker: Worker) -> None:
    async with worker.upstream("s-1") as messages:
        async for _ in messages:
            raise KeyError


async def work_for_ever(worker: Worker, seen: list[Any]) -> None:
    async with worker.upstream("s-1") as messages:
        async for message in messages:
            seen.append(message.json())
            await asyncio.Event().wait()


async def collect(worker: Worker, seen: list[Any], pause: float = 0.0) -> None:
    async with worker.upstream("s-1") as messages:
        async for message in messages:
            seen.append(message.json())
            await asyncio.sleep(pause)


@over_both
async def test_two_workers_at_once_hand_each_message_out_once(
    redis: RedisServer, redis_worker: Worker, other: Worker, short_lease: None
) -> None:
    keep(redis, *range(250))
    seen: list[Any] = []
    tasks = [asyncio.create_task(collect(worker, seen, 0.001)) for worker in (redis_worker, other)]
    await eventually("all are handed out", lambda: len(seen) >= 250 and held(redis) == [])
    assert seen == list(range(250))
    # Also those that are kept later, while a third worker comes.
    redis.client.publish("session:s-1:up", '"live"')
    await eventually("both hear what is live", lambda: seen.count("live") == 2)
    await stop(*tasks)


async def stop(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@over_both
async def test_another_worker_goes_on_where_one_died(
    redis: RedisServer, other: Worker, short_lease: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(redis, 0, 1, 2)
    first: list[Any] = []
    second: list[Any] = []
    dying = Worker.redis(redis.url)
    working = asyncio.create_task(work_for_ever(dying, first))
    await eventually("the first works", lambda: first == [0])
    following = asyncio.create_task(collect(other, second))
    # Longer than the lease, which is renewed while the first is alive.
    await asyncio.sleep(1.5)
    assert second == []
    # As if its process were killed: nothing is given back.
    monkeypatch.setattr(_kept, "RELEASE", "return 0")
    await stop(working)
    await dying.aclose()
    await eventually("the second has all", lambda: second == [0, 1, 2] and held(redis) == [])
    await stop(following)


async def test_a_worker_that_lost_its_lease_hands_no_more_out(
    redis: RedisServer, redis_worker: Worker, short_lease: None
) -> None:
    keep(redis, 0, 1)
    async with redis_worker.upstream("s-1") as messages:
        assert (await within(anext(messages))).json() == 0
        # Frozen for longer than the lease, in which another worker took over and is done with the next one.
        redis.client.set(LEASE, "another", px=1000)
        redis.client.xdel(LOG, redis.client.xrange(LOG)[1][0])
        time.sleep(0.8)
        following = asyncio.ensure_future(anext(messages))
        redis.client.publish("session:s-1:up", '"live"')
        assert (await within(following)).json() == "live"


async def test_a_lost_answer_loses_no_message(redis: RedisServer) -> None:
    keep(redis, 0, 1, 2)
    async with Proxy(redis.port) as proxy:
        async with Worker.redis(f"redis://127.0.0.1:{proxy.port}", retry_for=0.1) as worker:
            seen: list[Any] = []
            async with worker.upstream("s-1") as messages:
                for _ in range(3):
                    proxy.cut()
                    seen.append((await within(anext(messages))).json())
                proxy.cut()
        assert seen == [0, 1, 2]


async def test_a_redis_that_is_away_for_long_ends_no_iterator(redis: RedisServer) -> None:
    async with Worker.redis(redis.url, retry_for=0.1) as worker, worker.upstream("s-1") as messages:
        following = asyncio.ensure_future(anext(messages))
        redis.client.execute_command("CLIENT", "PAUSE", "1500", "ALL")
        await asyncio.sleep(0.2)
        assert not following.done()
        await eventually("it answers again", redis.client.ping)
        redis.client.publish("session:s-1:up", "1")
        assert (await within(following)).json() == 1


async def test_a_log_of_another_kind_is_said(redis: RedisServer, redis_worker: Worker) -> None:
    redis.client.set(LOG, "x")
    async with redis_worker.upstream("s-1") as messages:
        with pytest.raises(InvalidRequest, match="WRONGTYPE"):
            await within(anext(messages))
