"""docs/guides/migrate-rooms.md: what clients and operators of an existing server find again, and what is different."""

import asyncio
import json
import os
import re
import struct
import subprocess

import httpx
import pytest
from conftest import ROOT
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

PAGE = (ROOT / "docs/guides/migrate-rooms.md").read_text()
SETTINGS = {"WSPROXY_ENDPOINTS__ROOMS": "true", "WSPROXY_ROOMS__DEVELOPMENT": "true", "WSPROXY_SERVER__BIND": "127.0.0.1"}
ALIVE = '{"messageId":"ping-1732190000000","timestamp":1732190000000,"type":255,"payload":null}'
CHAT = '{"type":"CHAT_MESSAGE","text":"hi"}'
# `messageId`, a time, a type and JSON, as the web client writes them.
OWN = b"\x24" + b"6fa459ea-ee8a-3ca4-894e-db77e160355e" + struct.pack(">QB", 1732190000000, 30) + b'{"message":"hi"}'


async def heard(socket):
    async with asyncio.timeout(20):
        return await socket.recv()


def urls(gateway, *clients):
    return [f"{gateway.ws}/ws/lobby?room_id=lobby&user_id={each}&client_id={each}-1&display_name={each}" for each in clients]


@pytest.mark.asyncio
async def test_messages_of_existing_clients_are_relayed_byte_for_byte(start_gateway):
    ann, bob = urls(start_gateway(**SETTINGS, WSPROXY_ROOMS__VALIDATE="relay"), "ann", "bob")
    async with connect(ann) as one, connect(bob) as other:
        await other.send(ALIVE)
        assert "serverHello" in json.loads(await heard(other))
        assert await heard(other) == ALIVE
        await one.send(OWN)
        # The gateway's hello is in the form of the client's first message.
        assert isinstance(await heard(one), bytes)
        assert await heard(other) == OWN
        await one.send(CHAT)
        assert await heard(other) == CHAT
        # An envelope keeps its checks beside them.
        await one.send('{"chatMessage":{"message":"hi","fromClientId":"bob-1"}}')
        assert b"wrong_sender" in await heard(one)


@pytest.mark.asyncio
async def test_messages_of_other_forms_are_refused_without_relay(start_gateway):
    [ann] = urls(start_gateway(**SETTINGS), "ann")
    async with connect(ann) as one:
        await one.send(ALIVE)
        await heard(one)
        assert await heard(one) == ALIVE
        for _ in range(9):
            await one.send(CHAT)
            assert json.loads(await heard(one))["error"]["code"] == "invalid_message"
        await one.send(CHAT)
        with pytest.raises(ConnectionClosed):
            await heard(one)
        assert one.close_code == 1008


@pytest.mark.asyncio
async def test_stats_have_the_shape_of_the_old_server(start_gateway):
    gateway = start_gateway(**SETTINGS, REDIS_CHANNEL_PREFIX="graphwiz")
    [ann] = urls(gateway, "ann")
    async with connect(ann):
        room = httpx.get(f"{gateway.http}/ws/lobby/stats").json()
        assert (room["room_id"], room["connection_count"]) == ("lobby", 1)
        [connection] = room["connections"]
        assert connection.keys() == {"id", "room_id", "user_id", "client_id", "connected_at"}
        assert {"total_connections", "timestamp"} <= httpx.get(f"{gateway.http}/ws/stats").json().keys()


@pytest.mark.asyncio
async def test_names_and_limits_are_those_of_the_old_server(start_gateway, redis):
    gateway = start_gateway(**SETTINGS, REDIS_CHANNEL_PREFIX="graphwiz", RATE_LIMIT_MAX_REQUESTS="2", RATE_LIMIT_WINDOW_SECONDS="30")
    ann, bob = urls(gateway, "ann", "bob")
    async with connect(ann), connect(bob):
        assert redis.client.pubsub_numsub("graphwiz:room:lobby")[0][1] == 1
        with pytest.raises(InvalidStatus) as refused:
            await connect(ann)
        response = refused.value.response
        assert response.status_code == 429
        seconds = response.headers["Retry-After"]
        expected = {"error": "Rate limit exceeded", "message": f"Rate limit exceeded. Try again in {seconds} seconds."}
        assert json.loads(bytes(response.body)) == expected


def test_old_variables_are_read(tmp_path):
    variables = {
        "REDIS_URL": "redis://127.0.0.1:1",
        "REDIS_CHANNEL_PREFIX": "graphwiz",
        "RATE_LIMIT_MAX_REQUESTS": "60",
        "RATE_LIMIT_WINDOW_SECONDS": "60",
        "MESSAGE_QUEUE_SIZE": "1000",
        "MESSAGE_RETRY_INTERVAL": "5",
        "METRICS_SAMPLE_SIZE": "1000",
        "LATENCY_TRACKING_ENABLED": "true",
        "SECRET_KEY": "a-secret-for-tests-0123456789abcdef",
        "WSPROXY_ENDPOINTS__ROOMS": "true",
    }
    binary = os.environ.get("WSPROXY_BIN", str(ROOT / "target/debug/wsproxy"))
    checked = subprocess.run([binary, "config", "check"], env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert checked.returncode == 0, checked
    said = checked.stdout + checked.stderr
    assert "METRICS_SAMPLE_SIZE" in said
    assert "LATENCY_TRACKING_ENABLED" in said
    named = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", PAGE)) - {"SECRET_KEY"}
    assert {each for each in named if not each.startswith("WSPROXY_")} == variables.keys() - {"SECRET_KEY", "WSPROXY_ENDPOINTS__ROOMS"}
