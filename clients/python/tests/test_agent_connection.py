"""A user's agent and the real gateway: secrets, replacement, outages, the end."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from agents import AUTHORIZED, Tools, answers, issue, start
from conftest import API_KEY, Gateway, RedisServer, StartGateway, eventually, within
from proxy import Proxy
from wsproxy import (
    AgentGone,
    AgentOffline,
    AgentReplaced,
    Agents,
    CallError,
    ConnectionClosed,
    Refused,
    Unavailable,
)
from wsproxy._backoff import Backoff


@pytest.fixture
def gateway(start_gateway: StartGateway) -> Gateway:
    return start(start_gateway)


@pytest_asyncio.fixture
async def agents(redis: RedisServer) -> AsyncIterator[Agents]:
    async with Agents.redis(redis.url) as agents:
        yield agents


@pytest.mark.asyncio
async def test_a_wrong_secret_ends_the_agent_and_is_in_no_log(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = issue(gateway)
    wrong = secret[:-6] + "wrong_"
    for user, presented in [("u1", wrong), ("u2", secret)]:
        with pytest.raises(Refused) as raised:
            await within(Tools(gateway, presented, user).agent.run())
        assert (raised.value.status, raised.value.code) == (403, "invalid_credentials")
    async with Tools(gateway, secret):
        pass
    texts = [gateway.process.output(), *(each.getMessage() for each in caplog.records if "wsproxy" in each.name)]
    assert not [text for text in texts if secret in text or wrong in text]


@pytest.mark.asyncio
async def test_the_newer_agent_of_a_user_replaces_the_older(
    start_gateway: StartGateway, gateway: Gateway, agents: Agents
) -> None:
    secret, other = issue(gateway), start(start_gateway)
    async with Tools(gateway, secret) as old, Tools(other, secret) as new:
        with pytest.raises(AgentReplaced) as raised:
            await within(old.agent.wait())
        assert raised.value.code == 4001
        assert not old.agent.is_connected
        await within(agents.call("u1", "echo"))
        assert (old.ran, new.ran) == ([], ["echo"])


@pytest.mark.asyncio
async def test_a_call_in_flight_at_a_replacement_is_gone(gateway: Gateway, agents: Agents) -> None:
    secret = issue(gateway)
    async with Tools(gateway, secret) as old:
        call = asyncio.ensure_future(agents.call("u1", "hold"))
        await eventually("the tool runs", lambda: old.ran == ["hold"])
        async with Tools(gateway, secret):
            with pytest.raises(AgentGone):
                await within(call)


@pytest.mark.asyncio
async def test_a_revoked_secret_ends_the_agent(gateway: Gateway) -> None:
    secret = issue(gateway)
    async with Tools(gateway, secret) as tools:
        assert httpx.delete(f"{gateway.url}/api/v1/agents/u1", headers=AUTHORIZED).is_success
        with pytest.raises(ConnectionClosed) as raised:
            await within(tools.agent.wait())
        assert raised.value.code == 4401
    with pytest.raises(Refused):
        await within(Tools(gateway, secret).agent.run())


@pytest.mark.asyncio
async def test_an_application_ends_an_agent(gateway: Gateway) -> None:
    async with Tools(gateway, issue(gateway)) as tools:
        url = f"{gateway.url}/api/v1/agents/u1/disconnect"
        assert httpx.post(url, headers=AUTHORIZED, json={"reason": "done"}).is_success
        with pytest.raises(ConnectionClosed) as raised:
            await within(tools.agent.wait())
        assert (raised.value.code, raised.value.reason) == (4004, "done")


@pytest.mark.asyncio
@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGKILL])
async def test_the_agent_comes_back_after_the_gateway_does(
    gateway: Gateway, agents: Agents, with_signal: signal.Signals
) -> None:
    async with Tools(gateway, issue(gateway)) as tools:
        await answers(agents)
        call = asyncio.ensure_future(agents.call("u1", "hold", timeout=4))
        await eventually("the tool runs", lambda: tools.ran == ["hold"])
        await asyncio.to_thread(gateway.process.stop, with_signal)
        # A gateway that was killed tells no caller.
        with pytest.raises(CallError):
            await within(call)
        with pytest.raises(AgentOffline):
            await within(agents.call("u1", "add", {"a": 1}, retry_for=0))
        await asyncio.to_thread(gateway.start)
        await answers(agents)


@pytest.mark.asyncio
async def test_the_agent_goes_to_another_instance(start_gateway: StartGateway, agents: Agents) -> None:
    one, two = start(start_gateway), start(start_gateway)
    async with Proxy(one.port) as proxy, Tools(proxy.url, issue(one)):
        await answers(agents)
        proxy._target = two.port
        one.kill()
        await eventually("it has come back", lambda: proxy.accepted > 1)
        await answers(agents)
        assert proxy.accepted == 2


async def cut_and_come_back(proxy: Proxy) -> None:
    """Cuts the network. An agent may be back sooner than a look at its state would tell, so connections are counted."""
    accepted = proxy.accepted
    proxy.cut()
    await eventually("it has come back", lambda: proxy.accepted > accepted)


@pytest.mark.asyncio
async def test_a_lost_network_is_noticed_and_mended(gateway: Gateway, agents: Agents) -> None:
    async with Proxy(gateway.port) as proxy, Tools(proxy.url, issue(gateway)) as tools:
        for _ in range(3):
            await cut_and_come_back(proxy)
            await eventually("it is connected", lambda: tools.agent.is_connected)
            await answers(agents)


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["redis", "http"])
async def test_calls_go_on_after_redis_was_away(gateway: Gateway, redis: RedisServer, way: str) -> None:
    made = Agents.redis(redis.url) if way == "redis" else Agents.http(gateway.url, API_KEY)
    async with made as agents, Tools(gateway, issue(gateway)) as tools:
        await answers(agents)
        redis.kill()
        # Over HTTP an agent at the same instance needs no Redis.
        call = asyncio.ensure_future(agents.call("u1", "add", {"a": 1}, timeout=15, idempotency_key="k-1"))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(redis.start)
        assert await within(call) == 2
        await answers(agents, 2)
        assert tools.agent.is_connected


@pytest.mark.asyncio
async def test_a_call_in_flight_over_redis_survives_its_restart(
    gateway: Gateway, redis: RedisServer, agents: Agents
) -> None:
    async with Tools(gateway, issue(gateway)) as tools:
        keyed = asyncio.ensure_future(agents.call("u1", "hold", {"name": "keyed"}, idempotency_key="k-1"))
        plain = asyncio.ensure_future(agents.call("u1", "hold", {"name": "plain"}))
        await eventually("both run", lambda: set(tools.ran) == {"keyed", "plain"})
        redis.kill()
        await asyncio.to_thread(redis.start)
        await answers(agents)
        tools.release.set()
        assert await within(keyed) == "keyed"
        assert await within(plain) == "plain"
        assert sorted(tools.ran) == ["keyed", "plain"]


@pytest.mark.asyncio
async def test_an_answer_between_two_attempts_is_taken(
    gateway: Gateway, redis: RedisServer, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = asyncio.Event()

    class Long(Backoff):
        def next(self, at_least: float = 0.0) -> float:
            paused.set()
            return 20.0

    async with Tools(gateway, issue(gateway)) as tools, Agents.redis(redis.url) as others:
        with monkeypatch.context() as patch:
            # The next attempt of this call would come too late.
            patch.setattr("wsproxy._calls.Backoff", Long)
            call = asyncio.ensure_future(agents.call("u1", "hold", idempotency_key="k-1"))
            await eventually("the tool runs", lambda: tools.ran == ["hold"])
        redis.kill()
        await asyncio.to_thread(redis.start)
        await within(paused.wait())
        await answers(others)
        tools.release.set()
        assert await within(call) == "hold"
        assert tools.ran == ["hold"]


@pytest.mark.asyncio
async def test_an_answer_that_was_lost_with_redis_is_in_doubt(
    gateway: Gateway, redis: RedisServer, agents: Agents
) -> None:
    async with Tools(gateway, issue(gateway)) as tools:
        await answers(agents)
        call = asyncio.ensure_future(agents.call("u1", "hold", timeout=4))
        await eventually("the tool runs", lambda: tools.ran == ["hold"])
        redis.kill()
        tools.release.set()
        await asyncio.sleep(1)
        await asyncio.to_thread(redis.start)
        [outcome] = await within(asyncio.gather(call, return_exceptions=True))
        # The gateway may keep the answer until Redis is back.
        assert outcome == "hold" or (isinstance(outcome, Unavailable) and outcome.in_doubt), outcome


@pytest.mark.asyncio
async def test_redis_that_is_away_is_told_within_the_timeout(
    gateway: Gateway, redis: RedisServer, agents: Agents
) -> None:
    async with Tools(gateway, issue(gateway)):
        await answers(agents)
        redis.kill()
        begun = time.monotonic()
        with pytest.raises(Unavailable):
            await within(agents.call("u1", "echo", timeout=1))
        assert time.monotonic() - begun < 4


@pytest.mark.asyncio
async def test_an_agent_that_only_beats_stays(start_gateway: StartGateway, agents: Agents) -> None:
    gateway = start(start_gateway, HEARTBEAT_INTERVAL="1000", HEARTBEAT_TIMEOUT="2500")
    async with Proxy(gateway.port) as proxy, Tools(proxy.url, issue(gateway)) as tools:
        await asyncio.sleep(5)
        assert tools.agent.is_connected
        assert proxy.accepted == 1


@pytest.mark.asyncio
async def test_an_agent_that_ends_answers_what_runs(gateway: Gateway, agents: Agents) -> None:
    async with Tools(gateway, issue(gateway), grace=10) as tools:
        call = asyncio.ensure_future(agents.call("u1", "hold"))
        await eventually("the tool runs", lambda: tools.ran == ["hold"])
        ending = asyncio.ensure_future(tools.agent.aclose())
        await asyncio.sleep(0.1)
        tools.release.set()
        assert await within(call) == "hold"
        await within(ending)
    with pytest.raises(AgentOffline):
        await within(agents.call("u1", "echo", retry_for=0))


@pytest.mark.asyncio
async def test_run_ends_with_its_task(gateway: Gateway, agents: Agents) -> None:
    tools = Tools(gateway, issue(gateway), grace=0)
    running = asyncio.ensure_future(tools.agent.run())
    await answers(agents)
    call = asyncio.ensure_future(agents.call("u1", "hold"))
    await eventually("the tool runs", lambda: tools.ran == ["hold"])
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(running)
    assert tools.cancelled == ["hold"]
    with pytest.raises(AgentGone):
        await within(call)
