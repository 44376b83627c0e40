"""An agent at a gateway that is silent, of another version, or none: what the real gateway cannot be made to do."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from typing import Any

import pytest

from conftest import eventually, within
from fake_gateway import FakeGateway, refusal
from wsproxy import AgentReplaced, ConnectionClosed, Refused, WsproxyError
from wsproxy.agent import Agent, Context

SECRET = "wsa_a-secret-of-the-tests-0123456789"


def make(gateway: FakeGateway, secret: str = SECRET, **options: Any) -> Agent:
    agent = Agent(gateway.url, "u1", secret, **options)

    @agent.tool
    def echo(value: Any = None) -> Any:
        return value

    return agent


@pytest.mark.asyncio
@pytest.mark.parametrize("secret", [SECRET, "with a space", "ümläut", "a,b", "=="])
async def test_the_secret_is_in_a_header_and_in_no_log(secret: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with FakeGateway() as gateway, make(gateway, secret) as agent:
        await within(agent.ready())
        [request] = gateway.requests
        assert request.path == "/?userId=u1"
        protocols = request.headers["Sec-WebSocket-Protocol"].split(", ")
        assert protocols[0] == "wsproxy.agent.v2"
        kind, _, value = protocols[1].partition(".")
        text = value if kind == "bearer" else base64.urlsafe_b64decode(value + "==").decode()
        assert (kind in ("bearer", "bearer64"), text) == (True, secret)
        ours = [each for each in caplog.records if each.name.startswith("wsproxy")]
        assert not [each for each in ours if value in each.getMessage()]


@pytest.mark.asyncio
async def test_an_agent_that_never_was_connected_says_so_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async with Agent("http://127.0.0.1:1", "u1", SECRET):
        await eventually("a warning", lambda: caplog.records)
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert "not connected and tries again" in record.getMessage()


@pytest.mark.asyncio
async def test_the_agent_says_hello_and_beats() -> None:
    async with FakeGateway(interval=0.05) as gateway, make(gateway, version="files 1.2") as agent:
        await within(agent.ready())
        hello = await gateway.hears(lambda each: each["type"] == "hello")
        assert (hello["version"], hello["capabilities"]) == ("files 1.2", ["cancel", "progress"])
        first = await gateway.hears(lambda each: each["type"] == "heartbeat")
        assert abs(first["timestamp"] / 1000 - time.time()) < 60
        await gateway.hears(lambda each: sum(one["type"] == "heartbeat" for one in gateway.heard) > 3)


@pytest.mark.asyncio
@pytest.mark.parametrize("is_async", [True, False])
async def test_progress_just_before_the_result_is_sent(is_async: bool) -> None:
    async with FakeGateway() as gateway:
        agent = make(gateway)

        async def coroutine(ctx: Context) -> None:
            ctx.progress(1, 2)
            ctx.progress(2, 2)

        def function(ctx: Context) -> None:
            ctx.progress(1, 2)
            ctx.progress(2, 2)

        agent.tool(name="quick")(coroutine if is_async else function)
        async with agent:
            await within(agent.ready())
            await gateway.call("q-1", "quick")
            await gateway.answer("q-1")
            done = [each["progress"] for each in gateway.heard if each["type"] == "tool_progress"]
            assert done[-1] == 2
            assert [each["type"] for each in gateway.heard].index("tool_response") == len(gateway.heard) - 1


@pytest.mark.asyncio
async def test_a_gateway_of_the_first_version_gets_no_more_than_it_knows() -> None:
    async with FakeGateway(v2=False) as gateway:
        agent = make(gateway)

        @agent.tool
        async def slow(ctx: Context) -> str:
            ctx.progress(1, 2, "half")
            await asyncio.sleep(0.2)
            return f"{ctx.remaining} {ctx.cancelled}"

        async with agent:
            await within(agent.ready())
            await gateway.call("q-1", "slow")
            answer = await gateway.answer("q-1")
            assert set(answer) == {"type", "requestId", "success", "result", "error", "executionTime"}
            assert (answer["success"], answer["result"], answer["error"]) == (True, "None False", None)
            assert answer["executionTime"] >= 150
            assert {each["type"] for each in gateway.heard} == {"heartbeat", "tool_response"}


@pytest.mark.asyncio
async def test_a_gateway_that_falls_silent_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsproxy.agent._agent._ACK_WITHIN", 0.2)
    async with FakeGateway(acknowledges=False, interval=0.2) as gateway, make(gateway) as agent:
        await within(agent.ready())
        await gateway.connections(2)
        await within(agent.ready())


@pytest.mark.asyncio
@pytest.mark.parametrize("body", [refusal("invalid_credentials"), refusal("missing_credentials")])
async def test_a_refused_secret_ends_the_agent(body: str) -> None:
    async with FakeGateway() as gateway:
        gateway.refusals = [(403, body)]
        with pytest.raises(Refused) as raised:
            await within(make(gateway).run())
        assert (raised.value.status, gateway.attempts) == (403, 1)
        assert SECRET not in str(raised.value)


@pytest.mark.asyncio
async def test_an_agent_that_was_replaced_while_it_connected_ends() -> None:
    async with FakeGateway() as gateway:
        gateway.refusals = [(409, refusal("replaced"))]
        with pytest.raises(AgentReplaced):
            await within(make(gateway).run())
        assert gateway.attempts == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(("code", "error"), [(4001, AgentReplaced), (4401, ConnectionClosed), (4004, ConnectionClosed)])
async def test_a_close_for_good_ends_the_agent(code: int, error: type[Exception]) -> None:
    async with FakeGateway() as gateway:
        agent = make(gateway)
        async with agent:
            await within(agent.ready())
            await gateway.sockets[0].close(code, "reason")
            with pytest.raises(error):
                await within(agent.wait())
            with pytest.raises(error):
                await within(agent.ready())
        assert gateway.attempts == 1


@pytest.mark.asyncio
async def test_what_is_no_answer_of_a_gateway_passes() -> None:
    async with FakeGateway() as gateway:
        gateway.refusals = [(403, "<html>firewall</html>"), (502, ""), (404, "404 page not found")]
        async with make(gateway) as agent:
            await within(agent.ready())
            assert gateway.attempts == 4


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [1000, 1001, 1006, 1011, 1012, 4002])
async def test_every_other_close_is_followed_by_a_new_connection(code: int) -> None:
    async with FakeGateway() as gateway, make(gateway) as agent:
        await within(agent.ready())
        if code == 1006:
            gateway.sockets[0].transport.abort()
        else:
            await gateway.sockets[0].close(code)
        await gateway.connections(2)
        await within(agent.ready())
        await gateway.call("q-1", "echo", {"value": 1})
        assert (await gateway.answer("q-1"))["result"] == 1


@pytest.mark.asyncio
async def test_messages_that_are_none_do_no_harm() -> None:
    digits = "9" * 5000
    async with FakeGateway() as gateway, make(gateway) as agent:
        await within(agent.ready())
        junk: list[str | bytes] = [
            "",
            "{",
            "[]",
            "null",
            "{}",
            '{"type":"owner"}',
            '{"type":5}',
            '{"type":"tool_cancel"}',
            '{"type":"tool_cancel","requestId":{}}',
            '{"type":"tool_call"}',
            '{"type":"tool_call","requestId":7,"tool":"echo"}',
            '{"type":"error","code":"x"}',
            '{"type":"connected","heartbeat":{"interval":-1}}',
            '{"type":"connected","heartbeat":7}',
            "[" * 100_000,
            b"\xff\x00",
        ]
        for each in junk:
            await gateway.send(each)
        await gateway.send(f'{{"type":"tool_call","requestId":"q-1","tool":"echo","params":{{"value":{digits}}}}}')
        assert "too many digits" in (await gateway.answer("q-1"))["error"]
        await gateway.send('{"type":"tool_call","requestId":"q-2","tool":["echo"]}')
        assert "no tool" in (await gateway.answer("q-2"))["error"]
        await gateway.send('{"type":"tool_call","requestId":"q-3","tool":"echo","params":null}')
        assert "must be an object" in (await gateway.answer("q-3"))["error"]
        await gateway.send('{"type":"tool_call","requestId":"q-4","tool":"echo","deadlineMs":"soon","traceparent":4}')
        assert (await gateway.answer("q-4"))["success"] is True
        assert len(gateway.sockets) == 1


@pytest.mark.asyncio
async def test_a_call_that_is_sent_again_runs_once() -> None:
    ran: list[str] = []
    async with FakeGateway() as gateway:
        agent = make(gateway)

        @agent.tool
        async def slow(name: str) -> int:
            ran.append(name)
            await asyncio.sleep(0.5)
            return len(ran)

        async with agent:
            await within(agent.ready())
            await gateway.call("q-1", "slow", {"name": "x"}, deadlineMs=30_000)
            await gateway.call("q-2", "echo", {"value": 5}, deadlineMs=30_000)
            await gateway.answer("q-2")
            gateway.sockets[0].transport.abort()
            await gateway.connections(2)
            gateway.heard.clear()
            # One that runs still, and one that is over.
            await gateway.call("q-1", "slow", {"name": "x"}, deadlineMs=30_000)
            await gateway.call("q-2", "echo", {"value": 5}, deadlineMs=30_000)
            assert (await gateway.answer("q-1"))["result"] == 1
            assert (await gateway.answer("q-2"))["result"] == 5
            # Another call of the same id is another call.
            await gateway.call("q-1", "slow", {"name": "y"}, deadlineMs=30_000)
            assert (await gateway.hears(lambda each: each.get("result") == 2))["requestId"] == "q-1"
            assert ran == ["x", "y"]


@pytest.mark.asyncio
async def test_a_call_that_is_cancelled_before_it_begins_leaves_nothing() -> None:
    async with FakeGateway() as gateway, make(gateway) as agent:
        await within(agent.ready())
        socket = gateway.sockets[0]
        frames = []
        for number in range(50):
            call = {"type": "tool_call", "requestId": f"q-{number}", "tool": "echo", "params": {}}
            frames += [call, {"type": "tool_cancel", "requestId": f"q-{number}", "reason": "cancelled"}]
        # In one write, so that the agent reads them one behind the other.
        await asyncio.gather(*(socket.send(json.dumps(each)) for each in frames))
        await gateway.call("q-last", "echo")
        await gateway.answer("q-last")
        assert agent._running is not None
        assert agent._running.count == 0


@pytest.mark.asyncio
async def test_an_answer_whose_connection_is_gone_goes_to_no_other() -> None:
    release = asyncio.Event()
    async with FakeGateway() as gateway:
        agent = make(gateway)

        @agent.tool
        async def slow() -> str:
            await release.wait()
            return "done"

        async with agent:
            await within(agent.ready())
            await gateway.call("q-1", "slow", deadlineMs=30_000)
            await gateway.call("q-2", "echo")
            await gateway.answer("q-2")
            gateway.sockets[0].transport.abort()
            await gateway.connections(2)
            release.set()
            await gateway.call("q-3", "echo")
            await gateway.answer("q-3")
            assert not [each for each in gateway.heard if each.get("requestId") == "q-1"]


@pytest.mark.asyncio
async def test_more_calls_than_places_wait_and_more_than_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsproxy.agent._running._CALLS_MAX", 5)
    release, running = asyncio.Event(), 0
    async with FakeGateway() as gateway:
        agent = make(gateway, concurrency=2)

        @agent.tool
        async def hold() -> int:
            nonlocal running
            running += 1
            await release.wait()
            return running

        async with agent:
            await within(agent.ready())
            for number in range(7):
                await gateway.call(f"q-{number}", "hold")
            refused = [await gateway.answer(f"q-{number}") for number in (5, 6)]
            assert {each["error"] for each in refused} == {"The agent has too many calls."}
            assert running == 2
            release.set()
            assert [(await gateway.answer(f"q-{number}"))["success"] for number in range(5)] == [True] * 5


@pytest.mark.asyncio
async def test_the_end_waits_for_tools_that_run_and_takes_no_more() -> None:
    release = asyncio.Event()
    async with FakeGateway() as gateway:
        agent = make(gateway, grace=10)

        @agent.tool
        async def slow() -> str:
            await release.wait()
            return "done"

        async with agent:
            await within(agent.ready())
            await gateway.call("q-1", "slow")
            await gateway.call("q-2", "echo")
            await gateway.answer("q-2")
            ending = asyncio.ensure_future(agent.aclose())
            await asyncio.sleep(0)
            await gateway.call("q-3", "echo")
            assert (await gateway.answer("q-3"))["error"] == "The agent is ending."
            release.set()
            await within(ending)
        assert (await gateway.answer("q-1"))["result"] == "done"
        assert gateway.sockets[0].close_code == 1000


@pytest.mark.asyncio
async def test_an_option_that_the_library_does_not_know_ends_the_agent() -> None:
    async with FakeGateway() as gateway:
        with pytest.raises(WsproxyError, match="no_such_option"):
            await within(make(gateway, no_such_option=1).run())
