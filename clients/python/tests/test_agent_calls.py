"""Calls of tools on a user's agent, over Redis and over HTTP, through the real gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from agents import Tools, answers, issue, start
from conftest import API_KEY, Gateway, RedisServer, StartGateway, eventually, over_both, within
from wsproxy import (
    AgentBusy,
    AgentGone,
    AgentOffline,
    Agents,
    CallCancelled,
    CallDuplicate,
    CallTimeout,
    InvalidRequest,
    Progress,
    ToolError,
    Unauthorized,
    Unavailable,
    Worker,
)


@pytest.fixture
def gateway(start_gateway: StartGateway) -> Gateway:
    return start(start_gateway)


@pytest_asyncio.fixture
async def tools(gateway: Gateway) -> AsyncIterator[Tools]:
    async with Tools(gateway, issue(gateway)) as tools:
        yield tools


@pytest_asyncio.fixture(params=["redis", "http"])
async def agents(request: pytest.FixtureRequest, redis: RedisServer, gateway: Gateway) -> AsyncIterator[Agents]:
    """Calls over each of the two ways."""
    made = Agents.redis(redis.url) if request.param == "redis" else Agents.http(gateway.url, API_KEY)
    async with made as agents:
        yield agents


@pytest.mark.asyncio
async def test_a_tool_gives_its_result(agents: Agents, tools: Tools) -> None:
    assert await within(agents.call("u1", "add", {"a": 2})) == 3
    assert await within(agents.call("u1", "add", {"a": 2, "b": 40}, idempotency_key="k-1")) == 42
    where = await within(agents.call("u1", "where"))
    assert where["is_main"] is False
    values: list[Any] = [
        None,
        True,
        0,
        -1.5,
        2**63 + 1,
        "",
        "ä\u2028\U0001f600",
        [],
        {},
        {"a": [1, {"b": None}]},
        "\x00",
    ]
    for value in values:
        assert await within(agents.call("u1", "echo", {"value": value})) == value
    assert await within(agents.is_connected("u1")) is True
    assert await within(agents.is_connected("u2")) is False


@pytest.mark.asyncio
async def test_a_tool_knows_its_call(agents: Agents, tools: Tools) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    about = await within(agents.call("u1", "about", timeout=5, idempotency_key="k-1", traceparent=trace))
    assert 3 < about.pop("remaining") <= 5
    assert about.pop("traceparent").split("-")[1] == trace.split("-")[1]
    assert about == {"request_id": "k-1", "tool": "about", "cancelled": False}
    assert (await within(agents.call("u1", "about")))["traceparent"] is None
    deep = _deep(119)["value"]
    assert await within(agents.call("u1", "echo", {"value": deep})) == deep


@pytest.mark.asyncio
async def test_a_worker_has_the_calls_too(redis: RedisServer, tools: Tools) -> None:
    async with Worker.redis(redis.url) as worker:
        assert worker.agents is worker.agents
        assert await within(worker.agents.call("u1", "add", {"a": 1})) == 2


@pytest.mark.asyncio
async def test_progress_reaches_the_caller(agents: Agents, tools: Tools) -> None:
    seen: list[Progress] = []
    result = await within(agents.call("u1", "count", {"steps": 5, "pause": 0.2}, on_progress=seen.append))
    assert result == "counted"
    assert seen[0] == Progress(1, 5, "step 1 ä")
    assert seen[-1] == Progress(5, 5, "step 5 ä")
    assert [each.progress for each in seen] == sorted({each.progress for each in seen})


@pytest.mark.asyncio
async def test_a_slow_callback_gets_the_newest_progress(agents: Agents, tools: Tools) -> None:
    seen: list[float] = []

    async def slowly(progress: Progress) -> None:
        seen.append(progress.progress)
        await asyncio.sleep(0.5)

    params = {"steps": 200, "pause": 0.005}
    assert await within(agents.call("u1", "count", params, on_progress=slowly)) == "counted"
    assert len(seen) < 100


@pytest.mark.asyncio
async def test_a_callback_that_fails_ends_the_call(agents: Agents, tools: Tools) -> None:
    # Also where the error is one that calls themselves have.
    errors = [
        TimeoutError("mine"),
        httpx.ConnectError("mine"),
        AgentOffline("mine"),
        Unavailable("mine"),
        KeyError("mine"),
    ]
    for number, error in enumerate(errors, 1):

        async def fails(progress: Progress, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error), match="mine"):
            await within(agents.call("u1", "count", {"steps": 500, "pause": 0.1}, on_progress=fails))
        await eventually("the tool is cancelled", lambda: len(tools.cancelled) == len(tools.ran))
        assert len(tools.ran) == number


@pytest.mark.asyncio
async def test_an_error_of_the_tool_is_the_callers(agents: Agents, tools: Tools) -> None:
    with pytest.raises(ToolError) as raised:
        await within(agents.call("u1", "fails", {"how": "plainly"}))
    assert str(raised.value) == "There is no such file."
    assert raised.value.request_id
    with pytest.raises(ToolError, match="KeyError: 'x'"):
        await within(agents.call("u1", "fails", {"how": "x"}))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("tool", "params", "told"),
    [
        ("add", {}, "add: the parameter 'a' is missing."),
        ("add", {"a": "2", "c": 1}, "add: a must be a whole number, not a string; there is no parameter 'c'."),
        ("no_such", {}, "There is no tool 'no_such'; there are: about, add, "),
        ("odd", {"kind": "nan"}, "cannot be written as JSON"),
        ("odd", {"kind": "bytes"}, "cannot be written as JSON"),
        ("odd", {"kind": "half"}, "half of a surrogate pair"),
        ("odd", {"kind": "circle"}, "cannot be written as JSON"),
        ("odd", {"kind": "inner cancel"}, "what it waited for was cancelled"),
        ("odd", {"kind": "exit"}, "SystemExit: 3"),
        ("odd", {"kind": "stop iteration"}, "StopIteration"),
        ("odd", {"kind": "deep"}, "nested more deeply"),
        ("odd", {"kind": "more digits"}, "cannot be written as JSON"),
        ("big", {"size": 2 * 1024 * 1024}, "The result has 2097"),
    ],
)
async def test_a_call_that_cannot_be_done_says_why(
    agents: Agents, tools: Tools, tool: str, params: dict[str, Any], told: str
) -> None:
    with pytest.raises(ToolError) as raised:
        await within(agents.call("u1", tool, params))
    assert told in str(raised.value)
    # And the agent is still there.
    assert await within(agents.call("u1", "add", {"a": 1})) == 2
    assert await within(agents.call("u1", "odd", {"kind": "nul"})) == "a\x00b"
    assert await within(agents.call("u1", "odd", {"kind": "digits"})) == 10**4299


@pytest.mark.asyncio
async def test_a_large_result_arrives_whole(agents: Agents, tools: Tools) -> None:
    size = 1024 * 1024 - 200
    assert await within(agents.call("u1", "big", {"size": size})) == "x" * size


def _deep(levels: int) -> Any:
    """A value that is nested in so many levels."""
    return {"value": _deep(levels - 1)} if levels else 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "arguments",
    [
        {"user": "u 1"},
        {"user": ""},
        {"user": "a/b"},
        {"tool": ""},
        {"tool": "x" * 257},
        {"tool": "\ud800"},
        {"params": []},
        {"params": {"a": float("nan")}},
        {"params": {"a": b"x"}},
        {"params": {"a": "\udfff"}},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": 1e9},
        {"traceparent": "a\r\nb: c"},
        {"params": _deep(121)},
        {"idempotency_key": "a b"},
        {"idempotency_key": ""},
    ],
)
async def test_a_call_that_makes_no_sense_is_not_sent(arguments: dict[str, Any]) -> None:
    async with Agents.redis("redis://127.0.0.1:1") as agents:
        with pytest.raises(InvalidRequest):
            await within(agents.call(**({"user": "u1", "tool": "echo"} | arguments)), 1)


@pytest.mark.asyncio
@pytest.mark.parametrize("on_progress", [None, lambda progress: None], ids=["plainly", "with progress"])
@pytest.mark.parametrize("tool", ["hold", "hold_in_a_thread"])
async def test_the_deadline_ends_the_call_and_the_tool(
    agents: Agents, tools: Tools, tool: str, on_progress: Any
) -> None:
    begun = time.monotonic()
    with pytest.raises(CallTimeout) as raised:
        await within(agents.call("u1", tool, {"name": "x"}, timeout=0.5, on_progress=on_progress))
    assert 0.4 < time.monotonic() - begun < 2.4
    assert raised.value.request_id
    await eventually("the tool is cancelled", lambda: tools.cancelled == ["x"])
    assert await within(agents.call("u1", "add", {"a": 1})) == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("tool", ["hold", "hold_in_a_thread"])
async def test_a_task_that_is_cancelled_cancels_the_call(agents: Agents, tools: Tools, tool: str) -> None:
    call = asyncio.ensure_future(agents.call("u1", tool, {"name": "x"}))
    await eventually("the tool runs", lambda: tools.ran == ["x"])
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(call)
    await eventually("the tool is cancelled", lambda: tools.cancelled == ["x"])


@pytest.mark.asyncio
async def test_another_process_cancels_a_call_by_its_key(agents: Agents, tools: Tools, redis: RedisServer) -> None:
    call = asyncio.ensure_future(agents.call("u1", "hold", idempotency_key="k-1"))
    await eventually("the tool runs", lambda: tools.ran == ["hold"])
    async with Agents.redis(redis.url) as other:
        await within(other.cancel("u1", "k-1"))
        with pytest.raises(CallCancelled):
            await within(call)
        await eventually("the tool is cancelled", lambda: tools.cancelled == ["hold"])
        await within(other.cancel("u1", "k-1"))
    await within(agents.cancel("u1", "never-was"))


@over_both
@pytest.mark.asyncio
async def test_a_key_runs_once(agents: Agents, tools: Tools) -> None:
    calls = [asyncio.ensure_future(agents.call("u1", "hold", idempotency_key="k-1")) for _ in range(4)]
    await eventually("the tool runs", lambda: tools.ran == ["hold"])
    # All of them are at the gateway.
    await within(agents.call("u1", "add", {"a": 1}))
    await asyncio.sleep(0.3)
    with pytest.raises(InvalidRequest, match="another call"):
        await within(agents.call("u1", "hold", {"name": "other"}, idempotency_key="k-1"))
    # One of several gives up, and the others go on.
    calls.pop().cancel()
    await within(agents.call("u1", "add", {"a": 1}))
    tools.release.set()
    assert await within(asyncio.gather(*calls)) == ["hold"] * 3
    assert tools.ran == ["hold"]
    with pytest.raises(CallDuplicate):
        await within(agents.call("u1", "hold", idempotency_key="k-1"))


@pytest.mark.asyncio
async def test_two_users_may_have_the_same_key(agents: Agents, tools: Tools, gateway: Gateway) -> None:
    async with Tools(gateway, issue(gateway, "u2"), "u2") as others:
        mine = asyncio.ensure_future(agents.call("u1", "hold", {"name": "mine"}, idempotency_key="k-1"))
        theirs = asyncio.ensure_future(agents.call("u2", "hold", {"name": "theirs"}, idempotency_key="k-1"))
        await eventually("both run", lambda: tools.ran and others.ran)
        others.release.set()
        assert await within(theirs) == "theirs"
        assert not mine.done()
        tools.release.set()
        assert await within(mine) == "mine"


@pytest.mark.asyncio
async def test_many_calls_get_their_own_answers(agents: Agents, tools: Tools) -> None:
    # As many at once as the gateway takes, and in all more than a client may send messages in this time.
    for start_at in range(0, 500, 250):
        numbers = range(start_at, start_at + 250)
        calls = [agents.call("u1", "echo", {"value": number}) for number in numbers]
        assert await within(asyncio.gather(*calls)) == list(numbers)


@pytest.mark.asyncio
async def test_as_many_calls_wait_as_the_gateway_takes(agents: Agents, gateway: Gateway) -> None:
    async with Tools(gateway, issue(gateway), concurrency=250) as tools:
        calls = [asyncio.ensure_future(agents.call("u1", "hold", {"name": str(number)})) for number in range(200)]
        await eventually("all of them run", lambda: len(tools.ran) == 200)
        tools.release.set()
        assert await within(asyncio.gather(*calls)) == [str(number) for number in range(200)]


@over_both
@pytest.mark.asyncio
async def test_an_absent_agent_is_told(agents: Agents, gateway: Gateway) -> None:
    begun = time.monotonic()
    with pytest.raises(AgentOffline) as raised:
        await within(agents.call("u1", "echo", retry_for=0))
    assert time.monotonic() - begun < 2
    assert "u1" in str(raised.value)
    # Tried again, and then the same.
    begun = time.monotonic()
    with pytest.raises(AgentOffline):
        await within(agents.call("u1", "echo", timeout=1.0))
    assert 0.1 < time.monotonic() - begun < 3


@pytest.mark.asyncio
async def test_an_agent_that_comes_in_time_gets_the_call(agents: Agents, gateway: Gateway, redis: RedisServer) -> None:
    secret = issue(gateway)
    async with Tools(gateway, secret):
        assert await within(agents.call("u1", "add", {"a": 1})) == 2
    # A call that comes while it leaves may still reach it.
    await eventually("it has left", lambda: not redis.client.exists("agent:u1:server"))
    call = asyncio.ensure_future(agents.call("u1", "add", {"a": 2}))
    await asyncio.sleep(0.5)
    assert not call.done()
    async with Tools(gateway, secret):
        assert await within(call) == 3


@pytest.mark.asyncio
async def test_an_agent_that_dies_with_a_call_in_flight_is_gone(agents: Agents, tools: Tools) -> None:
    call = asyncio.ensure_future(agents.call("u1", "hold"))
    await eventually("the tool runs", lambda: tools.ran == ["hold"])
    begun = time.monotonic()
    abort(tools)
    with pytest.raises(AgentGone) as raised:
        await within(call)
    assert time.monotonic() - begun < 1
    assert raised.value.request_id
    # It comes back.
    await answers(agents)


@pytest.mark.asyncio
async def test_a_call_with_a_key_survives_the_agents_reconnect_and_runs_once(agents: Agents, tools: Tools) -> None:
    call = asyncio.ensure_future(agents.call("u1", "hold", idempotency_key="k-1"))
    await eventually("the tool runs", lambda: tools.ran == ["hold"])
    abort(tools)
    await answers(agents)
    tools.release.set()
    assert await within(call) == "hold"
    assert tools.ran == ["hold"]


def abort(tools: Tools) -> None:
    """Ends the agent's connection as a lost network does, at once."""
    socket = tools.agent._socket
    assert socket is not None
    socket._connection.transport.abort()


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["redis", "http"])
async def test_an_agent_with_too_many_calls_is_busy(start_gateway: StartGateway, redis: RedisServer, way: str) -> None:
    gateway = start(start_gateway, WSPROXY_AGENTS__IN_FLIGHT_MAX="1")
    made = Agents.redis(redis.url) if way == "redis" else Agents.http(gateway.url, API_KEY)
    async with made as agents, Tools(gateway, issue(gateway)) as tools:
        first = asyncio.ensure_future(agents.call("u1", "hold"))
        await eventually("the tool runs", lambda: tools.ran == ["hold"])
        with pytest.raises(AgentBusy):
            await within(agents.call("u1", "echo", retry_for=0))
        second = asyncio.ensure_future(agents.call("u1", "echo", {"value": 2}))
        await asyncio.sleep(0.3)
        tools.release.set()
        assert await within(first) == "hold"
        assert await within(second) == 2


@pytest.mark.asyncio
async def test_a_call_reaches_an_agent_at_another_instance(start_gateway: StartGateway, redis: RedisServer) -> None:
    one, two = start(start_gateway), start(start_gateway)
    async with (
        Agents.http(one.url, API_KEY) as here,
        Agents.http(two.url, API_KEY) as there,
        Tools(two, issue(one)) as tools,
    ):
        for agents in (here, there):
            seen: list[Progress] = []
            params = {"steps": 2, "pause": 0.1}
            assert await within(agents.call("u1", "count", params, on_progress=seen.append)) == "counted"
            assert seen[-1].progress == 2
        call = asyncio.ensure_future(here.call("u1", "hold"))
        await eventually("the tool runs", lambda: "hold" in tools.ran)
        call.cancel()
        await eventually("the tool is cancelled", lambda: tools.cancelled == ["hold"])


@pytest.mark.asyncio
async def test_a_wrong_api_key_is_refused(gateway: Gateway) -> None:
    async with Agents.http(gateway.url, "another-key-0123456789abcdef0123456789") as agents:
        with pytest.raises(Unauthorized):
            await within(agents.call("u1", "echo"))
