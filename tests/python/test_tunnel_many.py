"""Many requests: one after the other, waiting at once, and watches up to their quota. `--long`: the defaults, and 100,000 requests."""

import asyncio
import contextlib
import random
import time

import pytest
from conftest import free_port, until
from load import Client, Upstream, ask, metric, resident_bytes
from tunnel import Tunnel


async def ask_many(port, count, at_once):
    """Sends requests of several kinds one after the other on some connections; some clients vanish."""
    left = iter(range(count))

    async def one(chance):
        client = await Client.connect(port)
        for number in left:
            kind = chance.random()
            if kind < 0.05:
                vanishing = await Client.connect(port)
                vanishing.send(chance.choice(["/hold", "/begun", "/endless"]))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(vanishing.reader.read(100), 0.1)
                vanishing.leave()
                continue
            body = b"x" * chance.choice([10, 60_000]) if kind < 0.2 else b""
            client.send(f"/{number}?n={number}", method="POST" if body else "GET", headers=[f"X-N: {number}"], body=body)
            answer = await client.answer()
            assert answer.status == 200, answer
        client.leave()

    await asyncio.gather(*(one(random.Random(at)) for at in range(at_once)))


@pytest.mark.timeout(1800)
def test_the_memory_stays_after_many_streams(request, tmp_path, redis):
    warm, more = (20_000, 80_000) if request.config.getoption("--long") else (1000, 3000)
    upstream, port = Upstream(), free_port()
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, agent=["--metrics-port", str(port)])
    try:
        asyncio.run(ask_many(tunnel.gateway.port, warm, 32))
        before = [resident_bytes(process) for process in (tunnel.gateway.process, tunnel.agent)]
        asyncio.run(ask_many(tunnel.gateway.port, more, 32))
        after = [resident_bytes(process) for process in (tunnel.gateway.process, tunnel.agent)]
        growth = [(now - then) / 2**20 for then, now in zip(before, after, strict=True)]
        print("MiB:", [then / 2**20 for then in before], growth)
        assert all(mebibytes < 8 for mebibytes in growth), growth
        until("no stream at the gateway", lambda: metric(tunnel.gateway.port, "wsproxy_tunnel_streams") == 0)
        until("no stream at the agent", lambda: metric(port, "wsproxy_agent_streams") == 0)
        assert metric(tunnel.gateway.port, "wsproxy_tunnel_buffered_bytes") == 0
    finally:
        tunnel.stop()
        upstream.close()


async def reach(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.02)


async def wait_for_heads(port, count, upstream):
    waiting = [asyncio.ensure_future(ask(port, "/gate")) for _ in range(count)]
    await reach(lambda: upstream.active["/gate"] == count)
    began = time.monotonic()
    answer = await ask(port, "/short")
    assert (answer.status, answer.body) == (200, b"ok")
    seconds = time.monotonic() - began
    upstream.open_gate()
    assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}
    return seconds


def test_requests_that_wait_for_their_heads_hold_up_no_other(tmp_path, redis):
    upstream = Upstream()
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None)
    try:
        # The others wait until the gate opens, which is after this answer.
        assert asyncio.run(wait_for_heads(tunnel.gateway.port, 1000, upstream)) < 2
    finally:
        tunnel.stop()
        upstream.close()


async def watch_all(port, quota, all_streams, upstream):
    watches = []
    for _ in range(quota):
        client = await Client.connect(port)
        client.send("/begun?watch=true")
        watches.append(client)
    for client in watches:
        await client.reader.readuntil(b"begun")
    further = await ask(port, "/begun?watch=true")
    assert (further.status, further.code) == (503, "overloaded")
    upgrade = await ask(port, "/switch", headers=["Connection: Upgrade", "Upgrade: x"])
    assert (upgrade.status, upgrade.code) == (503, "overloaded")
    # The quarter that is left takes short requests, all at once.
    short = [asyncio.ensure_future(ask(port, "/gate")) for _ in range(all_streams - quota)]
    await reach(lambda: upstream.active["/gate"] == all_streams - quota)
    upstream.open_gate()
    assert {answer.status for answer in await asyncio.gather(*short)} == {200}
    # The place of a watch that leaves goes to the next one.
    watches.pop().leave()
    client = await Client.connect(port)
    client.send("/begun?watch=true")
    await client.reader.readuntil(b"begun")


@pytest.mark.timeout(600)
def test_watches_beyond_their_quota_are_refused(request, tmp_path, redis):
    streams = 2048 if request.config.getoption("--long") else 64
    config = f'cluster_streams_max = {streams}\nstreams_max = {streams // 2}\nwait = "300ms"\n'
    upstream = Upstream()
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, config=config, agent=["--agent-id", "node-1"])
    second = tunnel.start_agent("second", "--agent-id", "node-2")
    try:
        until("two lanes", lambda: metric(tunnel.gateway.port, "wsproxy_tunnel_lanes") == 2)
        asyncio.run(watch_all(tunnel.gateway.port, streams * 3 // 4, streams, upstream))
        until("no stream is left", lambda: metric(tunnel.gateway.port, "wsproxy_tunnel_streams") == 0)
    finally:
        second.stop()
        tunnel.stop()
        upstream.close()
