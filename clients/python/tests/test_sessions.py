"""Workers over both ways, the gateway, and clients over both transports."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from conftest import API_KEY, Gateway, RedisServer, StartGateway, eventually, over_both, within
from proxy import Proxy
from wsproxy import (
    Gap,
    NotSupported,
    Receipt,
    Refused,
    SessionToken,
    StreamEnded,
    StreamExists,
    Unauthorized,
    Unavailable,
    Worker,
)
from wsproxy.client import Client, connect_session
from wsproxy.client import TransportName as Transport

pytestmark = pytest.mark.asyncio
BOTH = pytest.mark.parametrize("transport", ["websocket", "sse"])


def client(worker: Worker, url: str, transport: Transport = "websocket", **options: Any) -> Client:
    async def token() -> SessionToken:
        return await worker.issue_token("demo", "s-1")

    if transport == "websocket":
        options = {"proxy": None, **options}
    return connect_session(url, "demo", "s-1", token=token, transport=transport, **options)


async def opened(client: Client) -> None:
    await eventually("the client is connected", lambda: client.state == "open" and client.connection_id)


async def messages(client: Client, count: int) -> list[Any]:
    return [(await within(anext(client))).json() for _ in range(count)]


def without_id(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "event_id"}


@over_both
@BOTH
async def test_what_a_worker_sends_arrives_with_its_id(worker: Worker, gateway: Gateway, transport: Transport) -> None:
    async with client(worker, gateway.url, transport) as connection:
        await opened(connection)
        receipt = await worker.send("s-1", {"text": "ä\n"})
        assert receipt.receivers == 1
        message = await within(anext(connection))
        assert without_id(message.json()) == {"text": "ä\n"}
        assert message.event_id == receipt.event_id == connection.last_event_id
        await worker.send("s-1", "no json\nat all")
        assert (await within(anext(connection))).data == "no json\nat all"
        plain = await worker.send("s-1", {"n": 1}, history=False)
        assert plain == Receipt(1, None, False)
        message = await within(anext(connection))
        assert (message.json(), message.event_id) == ({"n": 1}, None)
        assert connection.last_event_id != receipt.event_id


async def test_messages_of_any_bytes_keep_their_ids(worker: Worker, gateway: Gateway) -> None:
    async with client(worker, gateway.url) as connection:
        await opened(connection)
        for payload in (b"\xff\x00\n", "[1,2]", '"text"'):
            receipt = await worker.send("s-1", payload)
            message = await within(anext(connection))
            assert (message.data, message.event_id) == (payload, receipt.event_id)


@BOTH
async def test_a_connection_that_is_cut_over_and_over_loses_nothing(
    worker: Worker, gateway: Gateway, transport: Transport
) -> None:
    dice = random.Random(7)
    async with Proxy(gateway.port) as proxy, client(worker, proxy.url, transport) as connection:
        await opened(connection)

        async def send() -> None:
            for number in range(120):
                await worker.send("s-1", {"n": number})
                if number % 30 == 15:
                    proxy.cut()
                await asyncio.sleep(dice.uniform(0, 0.02))

        sending = asyncio.create_task(send())
        assert [each["n"] for each in await messages(connection, 120)] == list(range(120))
        await sending
        assert proxy.accepted >= 3


@BOTH
async def test_another_client_goes_on_where_the_first_stopped(
    worker: Worker, gateway: Gateway, transport: Transport
) -> None:
    receipts = [await worker.send("s-1", {"n": number}) for number in range(4)]
    async with client(worker, gateway.url, transport, last_event_id="0") as connection:
        assert [each["n"] for each in await messages(connection, 2)] == [0, 1]
        position = connection.last_event_id
    assert position == receipts[1].event_id
    async with client(worker, gateway.url, transport, last_event_id=position) as connection:
        assert [each["n"] for each in await messages(connection, 2)] == [2, 3]
        await worker.send("s-1", {"n": 4})
        assert [each["n"] for each in await messages(connection, 1)] == [4]


async def test_an_id_of_the_workers_own_resumes(worker: Worker, gateway: Gateway) -> None:
    for number in range(3):
        await worker.send("s-1", {"n": number}, event_id=f"mine-{number}")
    async with client(worker, gateway.url, last_event_id="mine-0") as connection:
        assert await messages(connection, 2) == [{"event_id": f"mine-{n}", "n": n} for n in (1, 2)]


async def test_an_id_that_two_messages_have_is_said_to_be_lost(worker: Worker, gateway: Gateway) -> None:
    for number in range(2):
        await worker.send("s-1", {"n": number}, event_id="mine")
    async with client(worker, gateway.url, last_event_id="mine") as connection:
        notice = await within(anext(connection))
        assert (notice.is_history_lost, notice.json()["reason"]) == (True, "ambiguous")


@BOTH
async def test_messages_that_share_a_member_event_id_all_arrive_over_a_cut(
    worker: Worker, gateway: Gateway, transport: Transport
) -> None:
    async with Proxy(gateway.port) as proxy, client(worker, proxy.url, transport) as connection:
        await opened(connection)
        for number in range(6):
            message = {"event_id": "evt_9", "n": number}
            await worker.send("s-1", message, history=number % 3 != 2)
            assert await messages(connection, 1) == [message]
            if number == 3:
                proxy.cut()


@BOTH
async def test_a_position_that_is_not_held_is_said_to_be_lost(
    worker: Worker, gateway: Gateway, transport: Transport
) -> None:
    await worker.send("s-1", {"n": 0})
    async with client(worker, gateway.url, transport, last_event_id="77-7-0123abcd") as connection:
        message = await within(anext(connection))
        assert message.is_history_lost
        await opened_or_lost(connection)
        await worker.send("s-1", {"n": 1})
        assert [each["n"] for each in await messages(connection, 1)] == [1]


async def opened_or_lost(client: Client) -> None:
    await eventually("the client is connected", lambda: client.state == "open")


async def test_a_gateway_that_is_restarted_and_one_that_is_killed(worker: Worker, gateway: Gateway) -> None:
    async with client(worker, gateway.url) as connection:
        await opened(connection)
        await worker.send("s-1", {"n": 0})
        gateway.process.stop()
        await asyncio.to_thread(gateway.start)
        await worker.send("s-1", {"n": 1})
        assert [each["n"] for each in await messages(connection, 2)] == [0, 1]
        gateway.kill()
        sending = asyncio.create_task(worker.send("s-1", {"n": 2}))
        await asyncio.to_thread(gateway.start)
        await within(sending)
        assert [each["n"] for each in await messages(connection, 1)] == [2]


async def test_a_redis_that_comes_back_empty_is_told(worker: Worker, gateway: Gateway, redis: RedisServer) -> None:
    async with client(worker, gateway.url) as connection:
        await opened(connection)
        await worker.send("s-1", {"n": 0})
        assert [each["n"] for each in await messages(connection, 1)] == [0]
        redis.kill()
        redis.start()
        sent = await within(worker.send("s-1", {"n": 1}))
        notice = await within(anext(connection))
        assert notice.is_history_lost
        # The notice covers messages sent before the gateway looked; later ones come.
        await worker.send("s-1", {"n": 2})
        covered = order(notice.json()["event_id"]) >= order(sent.event_id)
        expected = [2] if covered else [1, 2]
        assert [each["n"] for each in await messages(connection, len(expected))] == expected


def order(position: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (position or "").split("-")[:2])


@over_both
async def test_what_clients_send_reaches_the_worker(worker: Worker, gateway: Gateway, redis: RedisServer) -> None:
    async with client(worker, gateway.url) as connection:
        await connection.send({"n": 0})
        await connection.send({"n": 1})
        await eventually("both are kept", lambda: redis.client.xlen("{session:s-1:up}:log") == 2)
        async with worker.upstream("s-1") as upstream:
            await connection.send({"n": 2})
            seen = [(await within(anext(upstream))) for _ in range(3)]
            assert [each.json()["n"] for each in seen] == [0, 1, 2]
            assert [each.event_id is not None for each in seen] == [True, True, False]


async def test_following_survives_the_gateway(worker: Worker, gateway: Gateway, redis: RedisServer) -> None:
    gaps: list[Gap] = []
    async with (
        worker.upstream("s-1", kept=False, on_gap=gaps.append) as upstream,
        client(worker, gateway.url) as connection,
    ):
        await connection.send(1)
        assert (await within(anext(upstream))).json() == 1
        gateway.kill()
        following = asyncio.ensure_future(anext(upstream))
        await asyncio.to_thread(gateway.start)
        await eventually("the client is back", lambda: connection.state == "open")
        await eventually("the worker listens", lambda: redis.heard("session:s-1:up"))
        await connection.send(2)
        assert (await within(following)).json() == 2
    assert len(gaps) <= 1


@over_both
async def test_sessions_are_announced_and_closed(worker: Worker, gateway: Gateway) -> None:
    async with worker.session_events("demo") as events, client(worker, gateway.url) as connection:
        event = await within(anext(events))
        assert (event.event, event.session_id, event.agent_id) == ("opened", "s-1", "demo")
        await opened(connection)
        assert event.connection_id == connection.connection_id
        assert await worker.close_session("s-1", reason="bye") == 1
        assert [message async for message in connection] == []
        assert connection.closed == (4004, "bye")
        event = await within(anext(events))
        assert (event.event, event.code) == ("closed", 4004)


async def test_a_token_opens_once(worker: Worker, gateway: Gateway) -> None:
    token = await worker.issue_token("demo", "s-1")
    async with connect_session(gateway.url, "demo", "s-1", token=token, proxy=None) as connection:
        await opened(connection)
        async with connect_session(gateway.url, "demo", "s-1", token=token, proxy=None) as second:
            with pytest.raises(Refused) as raised:
                await within(anext(second))
            assert (raised.value.status, raised.value.code) == (403, "invalid_token")
            with pytest.raises(Refused):
                await second.send({})


async def test_an_event_stream_token_opens_event_streams_until_it_expires(worker: Worker, gateway: Gateway) -> None:
    token = await worker.issue_token("demo", "s-1", event_stream=True)
    assert token.event_stream
    for _ in range(2):
        async with connect_session(gateway.url, "demo", "s-1", token=token, transport="sse") as stream:
            await opened(stream)
    async with connect_session(gateway.url, "demo", "s-1", token=token, proxy=None) as websocket:
        with pytest.raises(Refused) as raised:
            await within(anext(websocket))
        assert (raised.value.status, raised.value.code) == (403, "invalid_token")


async def test_a_token_opens_its_agents_path_only(worker: Worker, gateway: Gateway) -> None:
    bound = await worker.issue_token("demo", "s-1")
    async with connect_session(gateway.url, "other", "s-1", token=bound, proxy=None) as other:
        with pytest.raises(Refused):
            await within(anext(other))
    async with connect_session(gateway.url, "demo", "s-1", token=bound, proxy=None) as connection:
        await opened(connection)
    unbound = await worker.issue_token("demo", "s-1", bound=False)
    async with connect_session(gateway.url, "other", "s-1", token=unbound, proxy=None) as connection:
        await opened(connection)


async def test_a_key_sends_once_over_both_ways(gateway: Gateway, redis: RedisServer) -> None:
    async with Worker.redis(redis.url) as one, Worker.http(gateway.url, API_KEY) as other:
        first = await one.send("s-1", {"n": 1}, idempotency_key="k")
        second = await other.send("s-1", {"n": 1}, idempotency_key="k")
        assert (second.event_id, second.duplicate) == (first.event_id, True)
        page = await other.history(session="s-1")
        assert [each.event_id for each in page.events] == [first.event_id]


async def test_history_is_the_same_over_both_ways(gateway: Gateway, redis: RedisServer) -> None:
    async with Worker.redis(redis.url) as one, Worker.http(gateway.url, API_KEY) as other:
        empty = [await each.history(session="s-1") for each in (one, other)]
        assert [(each.events, each.lost, each.complete) for each in empty] == [((), None, True)] * 2
        receipts = [await one.send("s-1", {"n": number}) for number in range(4)]
        receipts.append(await one.send("s-1", {"n": 4}, event_id="mine"))
        await other.send("s-1", b"\xff")
        for after in ("0-0", "0", receipts[1].event_id, receipts[4].event_id, "mine", "5-5-00000000", "5-5", "other"):
            for limit in (2, 100):
                pages = [await each.history(session="s-1", after=after or "", limit=limit) for each in (one, other)]
                assert pages[0].events == pages[1].events
                assert (pages[0].complete, pages[0].position) == (pages[1].complete, pages[1].position)
                assert (pages[0].lost is None) == (pages[1].lost is None)


async def test_a_wrong_key_is_refused(gateway: Gateway) -> None:
    async with Worker.http(gateway.url, "wrong") as worker:
        with pytest.raises(Unauthorized):
            await worker.send("s-1", {})
        with pytest.raises(Unauthorized):
            async with worker.upstream("s-1"):
                pass
    async with Worker.http("http://127.0.0.1:1", API_KEY, retry_for=0.2) as worker:
        with pytest.raises(Unavailable):
            await worker.send("s-1", {})


# ---- token streams ----


@BOTH
async def test_a_stream_is_one_text_whenever_the_client_comes(
    worker: Worker, gateway: Gateway, transport: Transport
) -> None:
    async with Proxy(gateway.port) as proxy, client(worker, proxy.url, transport) as early:
        await opened(early)
        async with worker.stream("s-1", "t-1", meta={"model": "m"}, watch_stop=False) as stream:
            for number in range(60):
                await stream.append(f"{number} ä, ")
                if number % 20 == 10:
                    proxy.cut()
        async for _ in early:
            if "t-1" in early.streams and early.streams["t-1"].ended:
                break
        async with client(worker, gateway.url, transport, last_event_id="0") as late:
            async for _ in late:
                if "t-1" in late.streams and late.streams["t-1"].ended:
                    break
            for each in (early, late):
                merged = each.streams["t-1"]
                assert (merged.text, merged.state, merged.complete) == (stream.text, "finish", True)
                assert merged.meta == {"model": "m"}


@over_both
async def test_a_client_that_comes_late_gets_the_text_and_then_the_tail(worker: Worker, gateway: Gateway) -> None:
    async with worker.stream("s-1", "t-1", watch_stop=False) as stream:
        await stream.append("Hel")
        async with client(worker, gateway.url) as late:
            await opened(late)
            await stream.append("lo")
            await stream.finish()
            async for _ in late:
                if late.streams.get("t-1") and late.streams["t-1"].ended:
                    break
            assert late.streams["t-1"].text == "Hello"


async def test_a_stream_is_whole_though_redis_came_back_empty(
    worker: Worker, gateway: Gateway, redis: RedisServer
) -> None:
    async with client(worker, gateway.url) as connection:
        await opened(connection)
        async with worker.stream("s-1", "t-1", meta={"a": 1}, watch_stop=False) as stream:
            for number in range(20):
                await stream.append(f"{number} ")
                if number == 10:
                    redis.kill()
                    redis.start()
        async for _ in connection:
            merged = connection.streams.get("t-1")
            if merged and merged.ended:
                break
        assert merged is not None
        assert (merged.text, merged.complete, merged.state) == (stream.text, True, "finish")


@pytest.mark.parametrize("interrupt", [False, True])
async def test_a_clients_stop_reaches_the_worker(worker: Worker, gateway: Gateway, interrupt: bool) -> None:
    async with client(worker, gateway.url) as connection:
        await opened(connection)

        async def press_stop() -> None:
            while (await anext(connection)).type != "stream_append":
                pass
            await connection.stop_stream("t-1")

        pressing = asyncio.create_task(press_stop())
        async with worker.stream("s-1", "t-1", cancel_on_stop=interrupt) as stream:
            async with asyncio.timeout(20):
                while not stream.stopped.is_set():
                    await stream.append("word ")
                    await asyncio.sleep(0.05)
        await pressing
        assert stream.outcome == "cancelled"
        async for message in connection:
            if message.type == "stream_end":
                assert message.json()["outcome"] == "cancelled"
                break


async def test_a_worker_that_died_is_noticed(worker: Worker, gateway: Gateway) -> None:
    async with client(worker, gateway.url) as connection:
        await opened(connection)
        async with worker.stream("s-1", "t-1", lease=1, watch_stop=False) as stream:
            await stream.append("half")
            stream.leave()
        seen = [each["type"] for each in await messages(connection, 3)]
        assert seen == ["stream_open", "stream_append", "stream_end"]
        merged = connection.streams["t-1"]
        assert (merged.text, merged.state, (merged.error or {}).get("code")) == ("half", "error", "worker_lost")


async def test_another_worker_goes_on_with_a_stream(worker: Worker, gateway: Gateway) -> None:
    async with worker.stream("s-1", "t-1", meta={"a": 1}, watch_stop=False) as first:
        await first.append("Hel")
        first.leave()
    async with worker.stream("s-1", "t-1", watch_stop=False, adopt=True) as second:
        assert (second.text, second.seq) == ("Hel", 1)
        await second.append("lo")
    async with client(worker, gateway.url, last_event_id="0") as connection:
        async for _ in connection:
            if connection.streams["t-1"].ended:
                break
        assert connection.streams["t-1"].text == "Hello"
    with pytest.raises(StreamEnded):
        async with worker.stream("s-1", "t-1", adopt=True):
            pass
    async with worker.stream("s-1", "t-2", watch_stop=False, adopt=True) as fresh:
        assert fresh.seq == 0


async def test_only_redis_adopts_what_is_no_longer_in_the_history(
    start_gateway: StartGateway, redis: RedisServer
) -> None:
    gateway = start_gateway(WSPROXY_HISTORY__ENTRIES_MAX="3")
    async with Worker.http(gateway.url, API_KEY) as over_http, Worker.redis(redis.url) as over_redis:
        async with over_http.stream("s-1", "t-1", watch_stop=False, flush_interval=0) as stream:
            for _ in range(5):
                await stream.append("word ")
            stream.leave()
        with pytest.raises(NotSupported):
            async with over_http.stream("s-1", "t-1", adopt=True):
                pass
        async with over_redis.stream("s-1", "t-1", watch_stop=False, adopt=True) as stream:
            assert stream.text == "word " * 5


async def test_streams_say_what_is_wrong(worker: Worker, gateway: Gateway) -> None:
    async with worker.stream("s-1", "t-1", meta={"a": 1}, watch_stop=False) as stream:
        await stream.append("x")
        with pytest.raises(StreamExists):
            async with worker.stream("s-1", "t-1", watch_stop=False):
                pass


async def test_a_stopping_gateway_does_not_end_an_upstream(start_gateway: StartGateway, redis: RedisServer) -> None:
    first, second = start_gateway(), start_gateway()
    async with Worker.redis(redis.url) as worker, worker.upstream("s-1") as upstream:
        for gateway in (first, second):
            async with client(worker, gateway.url) as connection:
                await connection.send(gateway.port)
                assert (await within(anext(upstream))).json() == gateway.port
            gateway.process.stop()
