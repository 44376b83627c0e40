"""Rooms, from a worker: over Redis and over HTTP, in front of the real gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
import redis as redis_py

from conftest import API_KEY, Gateway, RedisServer, StartGateway, eventually, over_both, within
from room_clients import member, start
from wsproxy import (
    Gap,
    InvalidRequest,
    NotSupported,
    RoomEvent,
    RoomJoin,
    RoomLeave,
    RoomMember,
    RoomMessage,
    Rooms,
    Subscription,
    Unavailable,
    Worker,
)
from wsproxy._envelope import addressed

pytestmark = pytest.mark.asyncio

# A chat message `{"message": "hi"}`.
HI = bytes.fromhex("c2020412026869")


@pytest.fixture
def rooms_gateway(start_gateway: StartGateway) -> Gateway:
    return start(start_gateway)


@pytest_asyncio.fixture(params=["redis", "http"])
async def rooms(request: pytest.FixtureRequest, redis: RedisServer, rooms_gateway: Gateway) -> AsyncIterator[Rooms]:
    """Rooms over each of the two ways, with a gateway."""
    made = Worker.redis(redis.url) if request.param == "redis" else Worker.http(rooms_gateway.url, API_KEY)
    async with made as worker:
        yield worker.rooms


async def first(events: Subscription[RoomEvent], wanted: Callable[[RoomEvent], bool]) -> Any:
    async def found() -> RoomEvent:
        async for each in events:
            if wanted(each):
                return each
        raise AssertionError("the events ended")

    return await within(found())


def of_kind(kind: str) -> Callable[[RoomEvent], bool]:
    return lambda each: isinstance(each, RoomMessage) and each.kind == kind


async def test_a_message_reaches_all_members_in_each_form(rooms: Rooms, rooms_gateway: Gateway) -> None:
    async with member(rooms_gateway, "a") as ann, member(rooms_gateway, "b", "bob") as bob:
        for message in ({"chatMessage": {"message": "hi"}}, '{"chatMessage": {"message": "hi"}}', HI):
            receipt = await rooms.publish("lobby", message)
            assert (receipt.receivers, receipt.event_id) == (1, None)
            for each in (ann, bob):
                heard = await each.hear("chatMessage")
                assert heard["chatMessage"]["message"] == "hi"
                assert heard.get("sender", "") == ""


async def test_a_message_to_one_client_reaches_no_other(rooms: Rooms, rooms_gateway: Gateway) -> None:
    async with member(rooms_gateway, "a") as ann, member(rooms_gateway, "b", "bob") as bob:
        await rooms.publish("lobby", {"chatMessage": {"message": "one"}}, to="a")
        await rooms.publish("lobby", HI, to="a")
        await rooms.publish("lobby", '{"chatMessage": {"message": "three"}}', to="a")
        await rooms.publish("lobby", {"chatMessage": {"message": "all"}})
        assert (await bob.hear("chatMessage"))["chatMessage"]["message"] == "all"
        texts = [(await ann.hear("chatMessage"))["chatMessage"]["message"] for _ in range(4)]
        assert texts == ["one", "hi", "three", "all"]


async def test_members_are_listed_over_all_instances(
    rooms: Rooms, rooms_gateway: Gateway, start_gateway: StartGateway
) -> None:
    other = start(start_gateway)
    assert await rooms.members("lobby") == []
    async with member(rooms_gateway, "b", "bob"), member(other, "a"):
        first, second = await rooms.members("lobby")
        assert (first.client_id, first.user_id, first.name) == ("a", "ann", "A")
        assert (second.client_id, second.user_id, second.name) == ("b", "bob", "B")
        assert first.server_id != second.server_id
        assert first.since.endswith("Z")


@over_both
async def test_a_kicked_client_is_closed_and_gone(
    rooms: Rooms, rooms_gateway: Gateway, start_gateway: StartGateway
) -> None:
    async with member(start(start_gateway), "a") as ann, member(rooms_gateway, "b", "bob") as bob:
        assert await rooms.kick("lobby", client="none") == 0
        assert await rooms.kick("lobby", client="a", reason="rude") == 1
        assert await ann.closed() == (4004, "rude")
        left = await bob.hear("presenceEvent")
        assert (left["presenceEvent"]["clientId"], left["presenceEvent"]["eventType"]) == ("a", "LEAVE")
        assert [each.client_id for each in await rooms.members("lobby")] == ["b"]


async def test_all_clients_of_a_user_are_kicked(rooms: Rooms, rooms_gateway: Gateway) -> None:
    async with (
        member(rooms_gateway, "a1") as one,
        member(rooms_gateway, "a2") as two,
        member(rooms_gateway, "b", "bob"),
    ):
        assert await rooms.kick("lobby", user="ann") == 2
        assert [(await each.closed())[0] for each in (one, two)] == [4004, 4004]
        assert [each.user_id for each in await rooms.members("lobby")] == ["bob"]


async def test_a_member_whose_connection_is_lost_is_kicked_at_once(rooms: Rooms, rooms_gateway: Gateway) -> None:
    async with member(rooms_gateway, "a") as ann:
        ann.socket.transport.abort()
    # It stays for `leave_grace`.
    assert [each.client_id for each in await rooms.members("lobby")] == ["a"]
    assert await rooms.kick("lobby", client="a") == 1
    assert await rooms.members("lobby") == []


async def test_a_closed_room_has_no_members_and_no_state(
    rooms: Rooms, rooms_gateway: Gateway, redis: RedisServer
) -> None:
    async with member(rooms_gateway, "a") as ann, member(rooms_gateway, "b", "bob") as bob:
        await ann.say(entitySpawn={"entityId": "e", "templateId": "t"})
        await bob.hear("entitySpawn")
        assert await rooms.close("lobby", reason="the end") == 2
        assert [await each.closed() for each in (ann, bob)] == [(4004, "the end"), (4004, "the end")]
    assert await rooms.members("lobby") == []
    # The version of the members stays for a while, so that the next life of the room goes on from it.
    names = [f"{{room:lobby}}:{name}" for name in ("members", "entities", "positions")]
    await eventually("the state is gone", lambda: not redis.client.exists(*names))
    assert redis.client.ttl("{room:lobby}:meta") <= 60
    assert await rooms.close("lobby") == 0


async def test_a_listener_hears_members_come_speak_move_and_go(
    redis_worker: Worker, rooms_gateway: Gateway, start_gateway: StartGateway
) -> None:
    other = start(start_gateway)
    async with redis_worker.rooms.listen("lobby") as events:
        async with member(rooms_gateway, "a") as ann, member(other, "b", "bob") as bob:
            joined = await first(events, lambda each: isinstance(each, RoomJoin))
            assert (joined.member.client_id, joined.member.user_id) == ("a", "ann")
            joined = await first(events, lambda each: isinstance(each, RoomJoin))
            assert (joined.member.client_id, joined.member.name) == ("b", "B")
            await bob.say(chatMessage={"message": "hello"})
            chat = await first(events, of_kind("chat_message"))
            assert (chat.sender, chat.body) == ("b", {"message": "hello"})
            assert chat.message["type"] == "CHAT_MESSAGE"
            await ann.say(custom={"name": "move", "data": "AQI="})
            assert (await first(events, of_kind("custom"))).body == {"name": "move", "data": "AQI="}
            await ann.say(entitySpawn={"entityId": "e", "templateId": "t"})
            assert (await first(events, of_kind("entity_spawn"))).sender == "a"
            await ann.say(positionUpdate={"entityId": "e", "position": {"x": 0.1}})
            (entry,) = (await first(events, of_kind("position_batch"))).body["entries"]
            assert entry == {"sender": "a", "update": {"entityId": "e", "position": {"x": 0.1}}}
        left = {(await first(events, lambda each: isinstance(each, RoomLeave))).client_id for _ in range(2)}
        assert left == {"a", "b"}


async def test_a_listener_hears_workers_too(redis_worker: Worker, rooms_gateway: Gateway) -> None:
    async with redis_worker.rooms.listen("lobby") as events:
        await redis_worker.rooms.publish("lobby", {"custom": {"name": "go"}, "sender": "forged"})
        heard = await first(events, of_kind("custom"))
        assert (heard.sender, heard.message) == ("", {"custom": {"name": "go"}})
        await redis_worker.rooms.publish("lobby", HI)
        assert (await first(events, of_kind("chat_message"))).raw == HI


async def test_a_listener_goes_on_after_redis_was_away(
    redis: RedisServer, redis_worker: Worker, rooms_gateway: Gateway
) -> None:
    gaps: list[Gap] = []
    async with redis_worker.rooms.listen("lobby", on_gap=gaps.append) as events:
        redis.kill()
        redis.start()

        async def speak() -> None:
            while True:
                with contextlib.suppress(Unavailable):
                    await redis_worker.rooms.publish("lobby", HI)
                await asyncio.sleep(0.05)

        speaking = asyncio.create_task(speak())
        try:
            await first(events, of_kind("chat_message"))
        finally:
            speaking.cancel()
        assert [gap.reason for gap in gaps] == ["connection"]


async def test_a_prefix_is_that_of_the_gateway(redis: RedisServer, start_gateway: StartGateway) -> None:
    gateway = start(start_gateway, REDIS_CHANNEL_PREFIX="graphwiz")
    async with (
        Worker.redis(redis.url, prefix="graphwiz") as worker,
        worker.rooms.listen("lobby") as events,
        member(gateway, "a") as ann,
    ):
        assert (await first(events, lambda each: isinstance(each, RoomJoin))).member.client_id == "a"
        await worker.rooms.publish("lobby", HI)
        await ann.hear("chatMessage")
        assert redis.heard("graphwiz:room:lobby") == 2
        assert [each.client_id for each in await worker.rooms.members("lobby")] == ["a"]
        assert await worker.rooms.kick("lobby", client="a") == 1
        assert (await ann.closed())[0] == 4004


async def test_messages_that_gateways_would_misread_are_refused(redis_worker: Worker) -> None:
    rooms = redis_worker.rooms
    refused: list[tuple[Any, str | None]] = [
        (b"\xff", None),
        (b"\xffR\x01K" + bytes(17) + b"a ", None),
        (b"\xff", "a"),
        ({}, None),
        ({"chat": {}}, None),
        ({"chatMessage": {}, "custom": {}}, None),
        ({"chatMessage": {}, "custom": {}}, "a"),
        ({"custom": {"data": float("nan")}}, None),
        (b"no envelope", "a"),
        (b"", "a"),
        ("no JSON", "a"),
        ("[]", "a"),
        ('{"a":1}', "a"),
        ({"chatMessage": {}}, "a b"),
    ]
    for message, to in refused:
        with pytest.raises(InvalidRequest):
            await rooms.publish("lobby", message, to=to)
    for room in ("stats", "health", "", "a/b", "x" * 129):
        with pytest.raises(InvalidRequest):
            await rooms.publish(room, HI)
        with pytest.raises(InvalidRequest):
            rooms.listen(room)
    for arguments in (
        {},
        {"client": "a", "user": "b"},
        {"client": "a b"},
        {"user": ""},
        {"client": "a", "reason": "x" * 124},
    ):
        with pytest.raises(InvalidRequest):
            await rooms.kick("lobby", **arguments)
    with pytest.raises(InvalidRequest):
        await rooms.close("lobby", reason="\ud800")


async def test_calls_without_redis_say_what_is_in_doubt(redis: RedisServer) -> None:
    async with Worker.redis(redis.url, retry_for=0.2) as worker:
        await worker.rooms.members("lobby")
        redis.kill()
        with pytest.raises(Unavailable):
            await worker.rooms.members("lobby")
        with pytest.raises(Unavailable) as raised:
            await worker.rooms.publish("lobby", HI)
        assert raised.value.in_doubt
        with pytest.raises(Unavailable):
            await worker.rooms.kick("lobby", client="a")


@over_both
async def test_records_that_no_gateway_wrote_are_no_members(redis: RedisServer, redis_worker: Worker) -> None:
    client: redis_py.Redis = redis.client
    good = '00000000000000ab-1 ann {"server":"s","since":"2026-01-01T00:00:00Z"}'
    for name, record in [("a", good), ("b", "x"), ("c", "k u {}"), ("d", "k u []"), ("e", ' u {"server":"s"}')]:
        client.hset("{room:lobby}:members", name, record)
    client.hset("{room:lobby}:members", "f", b"\xff\xfe")
    assert await redis_worker.rooms.members("lobby") == [RoomMember("a", "ann", None, "s", "2026-01-01T00:00:00Z")]


async def test_listening_needs_redis() -> None:
    async with Worker.http("http://127.0.0.1:1", API_KEY) as worker:
        with pytest.raises(NotSupported):
            worker.rooms.listen("lobby")


async def test_calls_over_http_are_those_of_the_api() -> None:
    asked: list[tuple[str, str, bytes, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        content_type = request.headers.get("content-type", "")
        asked.append((request.method, request.url.raw_path.decode(), request.content, content_type))
        member = {"client_id": "a", "user_id": "ann", "name": None, "server_id": "s", "since": "t"}
        return httpx.Response(200, json={"receivers": 1, "members": [member] if request.method == "GET" else 3})

    transport = httpx.MockTransport(answer)
    async with Worker.http("http://gateway", API_KEY, transport=transport) as worker:
        await worker.rooms.publish("a|b", {"chatMessage": {"message": "ä"}}, to="c")
        await worker.rooms.publish("lobby", HI, to="c")
        assert await worker.rooms.kick("lobby", user="ann") == 3
        assert await worker.rooms.close("lobby", reason="end") == 3
        assert await worker.rooms.members("lobby") == [RoomMember("a", "ann", None, "s", "t")]
    json, binary = "application/json", "application/octet-stream"
    text = '{"chatMessage":{"message":"ä"},"to":"c"}'.encode()
    assert asked == [
        ("POST", "/api/v1/rooms/a%7Cb/messages", text, json),
        ("POST", "/api/v1/rooms/lobby/messages", addressed(HI, "c"), binary),
        ("POST", "/api/v1/rooms/lobby/kick", b'{"user_id":"ann"}', json),
        ("POST", "/api/v1/rooms/lobby/close", b'{"reason":"end"}', json),
        ("GET", "/api/v1/rooms/lobby/members?limit=10000", b"", ""),
    ]
