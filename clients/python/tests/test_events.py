"""The event endpoint: workers over both ways, and clients."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import jwt
import pytest

from conftest import SECRET, Gateway, RedisServer, StartGateway, eventually, over_both, within
from wsproxy import ConnectionClosed, Event, Outgoing, Receipt, Refused, Worker
from wsproxy.client import Client, connect_events
from wsproxy.client import TransportName as Transport

pytestmark = pytest.mark.asyncio
BOTH = pytest.mark.parametrize("transport", ["websocket", "sse"])


def make_token(user: str, seconds: float = 60, **claims: Any) -> str:
    now = int(time.time())
    return jwt.encode({"sub": user, "iat": now, "exp": int(now + seconds), **claims}, SECRET, algorithm="HS256")


def client(gateway: Gateway, user: str, transport: Transport = "websocket", **options: Any) -> Client:
    if transport == "websocket":
        options = {"proxy": None, **options}
    options = {"token": lambda: make_token(user), **options}
    return connect_events(gateway.url, transport=transport, **options)


async def opened(client: Client) -> str:
    await eventually("the client is connected", lambda: client.state == "open" and client.connection_id)
    return client.connection_id or ""


@BOTH
async def test_events_reach_whom_they_are_for(worker: Worker, gateway: Gateway, transport: Transport) -> None:
    async with client(gateway, "ann", transport) as ann, client(gateway, "bob", transport) as bob:
        connection = await opened(ann)
        await opened(bob)
        receipts = [
            await worker.broadcast("all", {"n": 1}),
            await worker.to_user("ann", "ann", {"n": 2}),
            await worker.to_connection(connection, "this", [3], event_id="mine"),
            await worker.to_user("bob", "bob", None),
        ]
        seen = [await within(anext(ann)) for _ in range(3)]
        assert [(each.type, each.json()["data"]) for each in seen] == [
            ("all", {"n": 1}),
            ("ann", {"n": 2}),
            ("this", [3]),
        ]
        assert all(each.json()["timestamp"] for each in seen)
        assert [each.event_id for each in seen[:2]] == [each.event_id for each in receipts[:2]]
        assert [(await within(anext(bob))).type for _ in range(2)] == ["all", "bob"]


@over_both
async def test_one_position_resumes_all_channels(worker: Worker, gateway: Gateway) -> None:
    async with client(gateway, "ann") as ann:
        await opened(ann)
        await worker.broadcast("first")
        await within(anext(ann))
        position = ann.last_event_id
    await worker.to_user("ann", "second")
    await worker.broadcast("third")
    results = await worker.batch([Outgoing("user:ann", Event("fourth")), Outgoing("broadcast", {"type": "fifth"})])
    assert [type(each) for each in results] == [Receipt, Receipt]
    async with client(gateway, "ann", last_event_id=position) as ann:
        assert [(await within(anext(ann))).type for _ in range(4)] == ["second", "third", "fourth", "fifth"]
    page = await worker.history(user="ann")
    assert [each.json()["type"] for each in page.events] == ["second", "fourth"]
    assert [each.json()["type"] for each in (await worker.history()).events] == ["first", "third", "fifth"]


async def test_acknowledgements_are_given_when_the_loop_comes_back(
    worker: Worker, start_gateway: StartGateway, redis: RedisServer
) -> None:
    gateway = start_gateway(WSPROXY_EVENTS__ACK_INTERVAL="300ms")
    acks = redis.client.pubsub()
    acks.subscribe("ws:acks")
    assert acks.get_message(timeout=5)
    async with client(gateway, "ann") as ann:
        await opened(ann)
        receipt = await worker.to_user("ann", "task_status_update", {"n": 1}, ack=True)
        message = await within(anext(ann))
        # Sent again meanwhile, which the loop does not get to see.
        await asyncio.sleep(0.5)
        await worker.to_user("ann", "next")
        assert (await within(anext(ann))).type == "next"
        report = json.loads((await asyncio.to_thread(acks.get_message, True, 10))["data"])
        assert (report["event"], report["user_id"]) == ("acknowledged", "ann")
        assert report["event_id"] == receipt.event_id == message.event_id
    acks.close()


async def test_pings_are_answered_and_tokens_renewed(worker: Worker, start_gateway: StartGateway) -> None:
    gateway = start_gateway(HEARTBEAT_INTERVAL="300", HEARTBEAT_TIMEOUT="900")
    issued: list[str] = []

    def token() -> str:
        issued.append(make_token("ann", 4))
        return issued[-1]

    async with client(gateway, "ann", token=token, refresh_ahead=2.5) as ann:
        connection = await opened(ann)
        end = time.monotonic() + 6
        while time.monotonic() < end:
            await asyncio.sleep(0.1)
            assert ann.connection_id == connection
        await worker.to_user("ann", "still here")
        assert (await within(anext(ann))).type == "still here"
    assert len(issued) >= 3


@BOTH
async def test_presence_and_disconnection(worker: Worker, gateway: Gateway, transport: Transport) -> None:
    # Only tokens that were made up to the revocation are refused, by the second.
    before = make_token("ann")
    async with client(gateway, "ann") as one, client(gateway, "ann", transport) as two:
        ids = {await opened(one), await opened(two)}

        async def present() -> set[str]:
            return {each.connection_id for each in await worker.presence("ann")}

        async with asyncio.timeout(20):
            while await present() != ids:
                await asyncio.sleep(0.05)
        assert await worker.presence("bob") == []
        assert await worker.disconnect(user="ann", code=4004, reason="out", revoke=60) >= 1
        for each in (one, two):
            with pytest.raises((Refused, StopAsyncIteration)):
                await within(anext(each))
        assert one.closed is not None
        async with asyncio.timeout(20):
            while await present():
                await asyncio.sleep(0.05)
    async with client(gateway, "ann", token=before) as third:
        with pytest.raises(Refused) as raised:
            await within(anext(third))
        assert raised.value.status == 403


async def test_one_connection_and_one_token_are_ended(worker: Worker, gateway: Gateway) -> None:
    async with client(gateway, "ann") as one, client(gateway, "ann", token=make_token("ann", jti="j-1")) as two:
        first = await opened(one)
        await opened(two)
        await worker.disconnect(connection=first, code=4004)
        with pytest.raises(StopAsyncIteration):
            await within(anext(one))
        await worker.disconnect(jti="j-1", revoke=60)
        with pytest.raises(ConnectionClosed) as raised:
            await within(anext(two))
        assert raised.value.code == 4401
