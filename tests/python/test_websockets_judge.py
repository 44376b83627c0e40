"""Another implementation judges the gateway: what the Python library `websockets` sees, and refuses to see."""

import asyncio
import base64
import json
import os
import signal
import uuid

import httpx
import pytest
from conftest import until
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

PATH = "/demo/ws/s-1"


def client(gateway, token=None, query="", **options):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return connect(f"{gateway.ws}{PATH}{query}", additional_headers=headers, proxy=None, **options)


async def refused(gateway, **options):
    with pytest.raises(InvalidStatus) as caught:
        await client(gateway, **options)
    response = caught.value.response
    assert response.headers["Content-Type"].startswith("application/json")
    error = json.loads(response.body)["error"]
    assert set(error) == {"code", "message", "retryable"}
    return response.status_code, error["code"], response.headers


def listen(redis, *channels):
    """A subscription that is confirmed before this returns."""
    pubsub = redis.client.pubsub()
    pubsub.subscribe(*channels)
    for _ in channels:
        assert pubsub.get_message(timeout=5)["type"] == "subscribe"
    return pubsub


def heard(pubsub):
    message = pubsub.get_message(timeout=5)
    assert message, "nothing was published"
    return message["data"]


async def receive(connection):
    async with asyncio.timeout(20):
        return await connection.recv()


async def opened(handshake):
    return await handshake


async def closing(connection):
    """The close code and reason, after whatever still came."""
    with pytest.raises(ConnectionClosed):
        async with asyncio.timeout(20):
            while True:
                await connection.recv()
    return connection.close_code, connection.close_reason


@pytest.mark.asyncio
async def test_credentials_are_taken_from_header_subprotocol_and_query(gateway, session):
    async with client(gateway, token=session()) as connection:
        assert connection.subprotocol is None
    async with client(gateway, subprotocols=["wsproxy.v1", f"bearer.{session()}"]) as connection:
        assert connection.subprotocol == "wsproxy.v1"
    odd = session("with / and ü")
    encoded = base64.urlsafe_b64encode(odd.encode()).decode().rstrip("=")
    async with client(gateway, subprotocols=["wsproxy.v1", f"bearer64.{encoded}"]) as connection:
        assert connection.subprotocol == "wsproxy.v1"
    async with client(gateway, query=f"?token={session()}"):
        pass


@pytest.mark.asyncio
async def test_a_refusal_is_an_http_status_with_a_json_body(gateway, session, redis):
    status, code, headers = await refused(gateway)
    assert (status, code) == (401, "missing_credentials") and headers["WWW-Authenticate"].startswith("Bearer")
    token = session()
    assert (await refused(gateway, token="wrong"))[:2] == (403, "invalid_token")
    assert redis.client.get("session:s-1:auth") == token, "a wrong token must not burn the right one"
    async with client(gateway, token=token):
        assert redis.client.get("session:s-1:auth") is None
    assert (await refused(gateway, token=token))[:2] == (403, "invalid_token")


@pytest.mark.asyncio
async def test_of_two_handshakes_with_one_token_one_wins_across_instances(start_gateway, session):
    gateways = [start_gateway(), start_gateway()]
    for round_ in range(10):
        token = session(f"token-{round_}")
        tries = (client(gateways[number % 2], token=token) for number in range(8))
        results = await asyncio.gather(*map(opened, tries), return_exceptions=True)
        won = [result for result in results if not isinstance(result, BaseException)]
        assert len(won) == 1, results
        assert all(isinstance(r, InvalidStatus) and r.response.status_code == 403 for r in results if r is not won[0])
        await won[0].close()


@pytest.mark.asyncio
async def test_messages_pass_verbatim_in_both_directions(gateway, session, redis):
    upstream = listen(redis, "session:s-1:up")
    async with client(gateway, token=session()) as connection:
        odd = '{"b" : 1,\n "a":[ 1.0e2, "\\u00e4ä" ] }'
        await connection.send(odd)
        assert heard(upstream) == odd
        for payload in ["", "not json", "ä" * 70_000, "x" * 125, "x" * 126, "x" * 65_535, "x" * 65_536]:
            redis.client.publish("session:s-1:down", payload)
            assert await receive(connection) == payload
        redis.client.publish("session:s-1:down", b"\xff\x00")
        assert await receive(connection) == b"\xff\x00"


@pytest.mark.asyncio
async def test_two_instances_serve_the_two_ends_of_one_session(start_gateway, session, redis):
    one, two = start_gateway(), start_gateway()
    upstream = listen(redis, "session:s-1:up")
    async with client(one, token=session()) as first, client(two, token=session()) as second:
        assert redis.client.publish("session:s-1:down", "both") == 2
        assert [await receive(first), await receive(second)] == ["both", "both"]
        await first.send("1")
        assert heard(upstream) == "1"
        await second.send("2")
        assert heard(upstream) == "2"


@pytest.mark.asyncio
async def test_compression_is_negotiated_and_round_trips(gateway, session, redis):
    upstream = listen(redis, "session:s-1:up")
    async with client(gateway, token=session()) as connection:
        extension = connection.response.headers["Sec-WebSocket-Extensions"]
        assert "permessage-deflate" in extension and "server_max_window_bits" not in extension
        for size in [10, 1_000, 5_000, 300_000]:
            message = json.dumps({"text": "word " * (size // 5)})
            await connection.send(message)
            assert heard(upstream) == message
            redis.client.publish("session:s-1:down", message)
            assert await receive(connection) == message
    async with client(gateway, token=session(), compression=None) as connection:
        assert "Sec-WebSocket-Extensions" not in connection.response.headers
        redis.client.publish("session:s-1:down", "x" * 5_000)
        assert await receive(connection) == "x" * 5_000


@pytest.mark.asyncio
async def test_fragments_and_pings_are_understood(gateway, session, redis):
    upstream = listen(redis, "session:s-1:up")
    async with client(gateway, token=session()) as connection:
        await connection.send(iter(['{"te', 'xt":', '"in three"}']))
        assert heard(upstream) == '{"text":"in three"}'
        async with asyncio.timeout(10):
            await (await connection.ping(b"payload"))
        assert upstream.get_message(timeout=0.2) is None, "pings must not reach the bus"


@pytest.mark.asyncio
async def test_what_is_not_json_is_answered_and_strikes_end_it(start_gateway, session, redis):
    gateway = start_gateway(WSPROXY_SESSIONS__STRIKES_MAX="3")
    upstream = listen(redis, "session:s-1:up")
    async with client(gateway, token=session()) as connection:
        for bad in ["{", "{'a':1}"]:
            await connection.send(bad)
            answer = json.loads(await receive(connection))
            assert (answer["type"], answer["code"]) == ("error", "invalid_json")
        await connection.send("null")
        assert heard(upstream) == "null"
        await connection.send("nope")
        assert (await closing(connection))[0] == 1008


@pytest.mark.asyncio
async def test_a_message_above_the_limit_is_too_big(start_gateway, session):
    gateway = start_gateway(WSPROXY_LIMITS__MAX_MESSAGE_BYTES="4096")
    for compression in [None, "deflate"]:
        async with client(gateway, token=session(), compression=compression) as connection:
            await connection.send(json.dumps("x" * 5_000))
            assert (await closing(connection))[0] == 1009


@pytest.mark.asyncio
async def test_nobody_upstream_is_said_or_kept(start_gateway, session, redis):
    async with client(start_gateway(WSPROXY_SESSIONS__NO_RECEIVER="error"), token=session()) as connection:
        await connection.send("1")
        assert json.loads(await receive(connection))["code"] == "no_receiver"
    async with client(start_gateway(WSPROXY_SESSIONS__NO_RECEIVER="queue"), token=session()) as connection:
        await connection.send("[1]")
        await connection.send("[2]")
        until("both are kept", lambda: redis.client.xlen("{session:s-1:up}:log") == 2)
        assert [fields["data"] for _, fields in redis.client.xrange("{session:s-1:up}:log")] == ["[1]", "[2]"]
        assert redis.client.ttl("{session:s-1:up}:log") > 0


@pytest.mark.asyncio
async def test_a_worker_ends_a_session_and_its_life_is_announced(gateway, session, redis):
    events = listen(redis, "agent:demo:sessions")
    up = listen(redis, "session:s-1:up")
    async with client(gateway, token=session()) as connection:
        opened = json.loads(heard(events))
        assert opened["event"] == "opened" and opened["session_id"] == "s-1" and opened["agent_id"] == "demo"
        await connection.send("12345")
        assert heard(up) == "12345"
        other = json.dumps({"op": "close", "code": 4004, "connection_id": str(uuid.uuid4())})
        redis.client.publish("session:s-1:control", other)
        redis.client.publish("session:s-1:control", json.dumps({"op": "close", "code": 4010, "reason": "enough"}))
        assert await closing(connection) == (4010, "enough")
    closed = json.loads(heard(events))
    assert closed["event"] == "closed" and closed["code"] == 4010
    assert closed["connection_id"] == opened["connection_id"] and closed["server_id"] == opened["server_id"]
    assert closed["messages_in"] == 1 and closed["bytes_in"] == 5 and closed["duration_ms"] >= 0


@pytest.mark.asyncio
async def test_a_drain_sends_clients_away_with_1012_and_exits_0(start_gateway, session, redis):
    gateway = start_gateway(WSPROXY_SERVER__DRAIN_SPREAD="200ms")
    connections = [await client(gateway, token=session(f"t{number}")) for number in range(5)]
    redis.client.publish("session:s-1:down", "last words")
    os.kill(gateway.process.child.pid, signal.SIGTERM)
    for connection in connections:
        assert await receive(connection) == "last words"
        assert (await closing(connection))[0] == 1012
    assert await asyncio.to_thread(gateway.process.child.wait, 20) == 0
    assert redis.client.pubsub_channels("session:*") == []


@pytest.mark.asyncio
async def test_tokens_never_reach_the_log_or_the_metrics(start_gateway, session):
    gateway = start_gateway(WSPROXY_LOG__LEVEL="trace")
    secret = session("s3cr3t-t0ken")
    assert (await refused(gateway, query="?token=wr0ng-t0ken"))[0] == 403
    async with client(gateway, query=f"?token={secret}"):
        metrics = httpx.get(f"{gateway.http}/metrics").text
    gateway.process.stop()
    for where in [metrics, gateway.process.output()]:
        assert "s3cr3t" not in where and "wr0ng" not in where
