"""The rate of a client's messages."""

from __future__ import annotations

import asyncio
import json

import pytest

from conftest import Gateway, RedisServer, eventually
from wsproxy.client import connect_session
from wsproxy.client._pace import Pace
from wsproxy.worker import Worker

pytestmark = pytest.mark.asyncio


async def test_a_burst_then_the_rate_and_never_more_than_both_allow() -> None:
    now = 0.0
    pace = Pace(per_second=10, burst=3, clock=lambda: now)
    for _ in range(3):
        assert pace.wait() == 0.0
        await pace.turn()
    assert pace.wait() == pytest.approx(0.1)
    now = 60.0
    for _ in range(3):
        assert pace.wait() == 0.0
        await pace.turn()
    assert pace.wait() == pytest.approx(0.1)


async def test_who_waits_is_served_in_order() -> None:
    pace = Pace(per_second=1000, burst=1)
    served: list[int] = []

    async def one(number: int) -> None:
        await pace.turn()
        served.append(number)

    await asyncio.gather(*(one(number) for number in range(20)))
    assert served == list(range(20))


async def test_more_than_the_gateway_lets_come_at_once_arrives_whole(
    redis: RedisServer, gateway: Gateway, redis_worker: Worker
) -> None:
    token = await redis_worker.issue_token("demo", "s-1")

    def kept() -> list[int]:
        return [json.loads(text)["n"] for text in redis.texts("{session:s-1:up}:log")]

    async with connect_session(gateway.url, "demo", "s-1", token=token) as client:
        await asyncio.gather(*(client.send({"n": number}) for number in range(300)))
        await eventually("all have arrived", lambda: len(kept()) >= 300)
        assert client.state == "open"
    assert kept() == list(range(300))
