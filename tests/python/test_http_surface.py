"""The HTTP surface: worker API, probes, metrics and documents, without a worker that knows Redis."""

import asyncio
import json
import re

import httpx
import pytest
from conftest import ROOT, until
from websockets.asyncio.client import connect

KEY = "a-key-for-tests-0123456789abcdef"


@pytest.fixture
def api_gateway(start_gateway):
    return start_gateway(WSPROXY_API__KEYS=KEY, WSPROXY_SESSIONS__NO_RECEIVER="queue")


@pytest.fixture
def api(api_gateway):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"{api_gateway.http}/api/v1/", headers=headers, timeout=20) as client:
        yield client


def open_session(gateway, token):
    return connect(f"{gateway.ws}/demo/ws/s-1", subprotocols=["wsproxy.v1", f"bearer.{token}"], proxy=None)


def make_token(api):
    answer = api.post("sessions/s-1/token")
    assert answer.status_code == 201
    body = answer.json()
    assert set(body) == {"session_id", "token", "expires_in"}
    return body["token"]


class Events:
    """Server-sent events, parsed as the format says."""

    def __init__(self, response):
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        self.lines = response.iter_lines()

    def next(self):
        event, data = "message", []
        for line in self.lines:
            name, _, value = line.partition(":")
            if name == "event":
                event = value.removeprefix(" ")
            elif name == "data":
                data.append(value.removeprefix(" "))
            elif not line and data:
                return event, "\n".join(data)
        raise AssertionError("the stream ended")


@pytest.mark.asyncio
async def test_a_worker_needs_nothing_but_http(api_gateway, api):
    async with open_session(api_gateway, make_token(api)) as client:
        with api.stream("GET", "agents/demo/sessions/events") as announced, api.stream("GET", "sessions/s-1/upstream") as up:
            announcements, upstream = Events(announced), Events(up)
            await client.send('{"a":\n 1}')
            event, data = await asyncio.to_thread(upstream.next)
            assert event == "message" and json.loads(data) == {"a": 1}
            assert api.post("sessions/s-1/messages", content='{"b" :2}').json() == {"receivers": 1}
            async with asyncio.timeout(20):
                assert await client.recv() == '{"b" :2}'
            assert api.post("sessions/s-1/close", json={"code": 4004, "reason": "bye"}).json() == {"receivers": 1}
            async with asyncio.timeout(20):
                await client.wait_closed()
            assert (client.close_code, client.close_reason) == (4004, "bye")
            closed = json.loads((await asyncio.to_thread(announcements.next))[1])
            assert closed["event"] == "closed" and closed["messages_in"] == 1 and closed["messages_out"] == 1


@pytest.mark.asyncio
async def test_the_log_is_replayed_to_a_follower_that_comes_late(api_gateway, api, redis):
    async with open_session(api_gateway, make_token(api)) as client:
        await client.send("1")
        await client.send("2")
        until("both are kept", lambda: redis.client.xlen("{session:s-1:up}:log") == 2)
        with api.stream("GET", "sessions/s-1/upstream", params={"log": "true"}) as response:
            upstream = Events(response)
            await client.send("3")
            assert [(await asyncio.to_thread(upstream.next))[1] for _ in range(3)] == ["1", "2", "3"]


def test_a_long_log_is_replayed_to_its_end(api, redis):
    wanted = [str(number) for number in range(1_500)]
    with redis.client.pipeline() as pipeline:
        for number in wanted:
            pipeline.xadd("{session:s-1:up}:log", {"data": number})
        pipeline.execute()
    with api.stream("GET", "sessions/s-1/upstream", params={"log": "true"}) as response:
        upstream = Events(response)
        assert [upstream.next()[1] for _ in wanted] == wanted


def test_nobody_is_let_in_without_a_key(api_gateway, start_gateway):
    for gateway, key, expected in [
        (api_gateway, None, (401, "missing_credentials")),
        (api_gateway, "Basic abc", (401, "missing_credentials")),
        (api_gateway, "Bearer wrong", (403, "invalid_token")),
    ]:
        headers = {"Authorization": key} if key else {}
        for method, path in [("GET", "info"), ("POST", "sessions/s-1/token"), ("POST", "sessions/s-1/messages")]:
            answer = httpx.request(method, f"{gateway.http}/api/v1/{path}", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == expected, path


def test_bad_requests_are_told_what_is_wrong(api):
    for path, body, status, code in [
        ("sessions/a%20b/token", None, 400, "bad_id"),
        ("sessions/s-1/token", {"ttl_seconds": 0}, 400, "bad_request"),
        ("sessions/s-1/token", {"ttl": 5}, 400, "bad_request"),
        ("sessions/s-1/close", {"code": 1006}, 400, "bad_request"),
        ("nothing/here", None, 404, "not_found"),
    ]:
        answer = api.post(path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["retryable"]) == (status, code, False), path
    assert api.delete("info").status_code == 405
    assert api.post("sessions/s-1/messages", content=b"x" * (2 << 20)).status_code == 413


def test_the_served_document_describes_what_is_served(api_gateway, api):
    document = httpx.get(f"{api_gateway.http}/api/v1/openapi.json").json()
    assert document == json.loads((ROOT / "crates/wsproxy/openapi.json").read_text())
    codes = document["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["code"]["enum"]
    assert api.get("nothing").json()["error"]["code"] in codes
    for path in ["/health", "/ready", "/api/v1/info"]:
        schema = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        shape = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        body = api.get(f"{api_gateway.http}{path}").json()
        assert set(shape["required"]) <= set(body) <= set(shape["properties"]), path


@pytest.mark.asyncio
async def test_the_documented_metrics_are_the_served_ones(api_gateway, api, start_gateway):
    # Counters with labels appear with their first value: one refusal, one connection.
    httpx.get(f"{api_gateway.http}/demo/ws/s-1")
    async with open_session(api_gateway, make_token(api)):
        pass
    until("the end is counted", lambda: "wsproxy_disconnects_total{" in httpx.get(f"{api_gateway.http}/metrics").text)
    served = set()
    # The database has metrics only where it is used.
    with_database = start_gateway(WSPROXY_ENDPOINTS__AGENTS="true")
    pages = [httpx.get(f"{gateway.http}/metrics").text for gateway in (api_gateway, with_database)]
    for line in "".join(pages).splitlines():
        if found := re.match(r"# TYPE (\w+) (\w+)", line):
            name, kind = found.groups()
            served.add(name if kind != "counter" or name.endswith("_total") else f"{name}_total")
    documented = set(re.findall(r"^\| `(wsproxy_\w+)` \|", (ROOT / "docs/reference/metrics.md").read_text(), re.MULTILINE))
    assert served - documented == set(), "served, but not documented"
    assert documented - served == set(), "documented, but not served"


def test_metrics_as_json_are_those_of_the_text(api_gateway):
    samples = httpx.get(f"{api_gateway.http}/metrics", headers={"Accept": "application/json"}).json()["metrics"]
    assert all(set(sample) == {"name", "labels", "value"} for sample in samples)
    names = {sample["name"] for sample in samples}
    assert {"wsproxy_active_connections", "wsproxy_messages_sent_total", "wsproxy_message_latency_seconds_count"} <= names


def test_health_and_readiness_follow_redis(api_gateway, api, redis):
    def answers(path):
        return httpx.get(f"{api_gateway.http}{path}")

    assert answers("/health").json() == {"status": "healthy"}
    assert api.get(f"{api_gateway.http}/health").json()["bus"]["kind"] == "redis"
    redis.kill()
    until("not ready", lambda: answers("/ready").status_code == 503)
    assert answers("/ready").json()["ready"] is False
    until("degraded", lambda: answers("/health").status_code == 503)
    assert answers("/health").json() == {"status": "degraded"}, "why is for those who show a key"
    assert api.get(f"{api_gateway.http}/health").json()["bus"]["error"]
    refused = httpx.get(
        f"{api_gateway.http}/demo/ws/s-1",
        headers={
            "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Authorization": "Bearer x",
        },
        timeout=20,
    )
    assert refused.status_code == 503 and refused.headers["Retry-After"] and refused.json()["error"]["retryable"] is True
    redis.start()
    until("ready again", lambda: answers("/ready").status_code == 200)
