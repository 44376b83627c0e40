"""Clients that vanish in any state leave no slot taken, at no instance and at no agent. `--long`: ten times as many."""

import asyncio
import contextlib
import random
import signal

import pytest
from conftest import free_port, until
from load import Broken, Client, Upstream, ask, metric, stand_still
from tunnel import Tunnel, TunnelGateway, peer

# Request, and what its client waits for when it vanishes.
STATES = {
    "a head": {"path": "/hold"},
    "a body": {"path": "/begun"},
    "its own reading": {"path": "/endless"},
    "credit": {"path": "/stuck", "method": "PUT", "body": b"x" * 1_000_000},
    "100": {"path": "/hold", "method": "PUT", "headers": ["Expect: 100-continue", "Content-Length: 10"]},
    "its first byte": {"path": "/switch", "headers": ["Connection: Upgrade", "Upgrade: x"]},
}


async def vanish(port, state, chance):
    """Asks, and leaves at any time: before the request is whole, before its answer, or in the middle of that."""
    client = await Client.connect(port, receive_bytes=4096)
    try:
        client.send(**STATES[state])
        with contextlib.suppress(TimeoutError, OSError):
            await asyncio.wait_for(client.reader.read(10_000), chance.expovariate(8))
    finally:
        client.leave(with_reset=chance.random() < 0.5)


async def vanish_all(ports, count, at_once):
    """Lets `count` clients vanish, of which `at_once` are there at a time."""
    chance, places = random.Random(count), asyncio.Semaphore(at_once)

    async def one(number):
        async with places:
            # An instance that is full refuses connections, which is no matter here.
            with contextlib.suppress(OSError):
                await vanish(ports[number % len(ports)], chance.choice(list(STATES)), chance)

    await asyncio.gather(*(one(number) for number in range(count)))


async def ask_at_once(ports, count, upstream):
    """Sends so many requests that are all at the upstream at the same time, and returns their statuses."""
    asking = [asyncio.ensure_future(ask(ports[number % len(ports)], "/gate")) for number in range(count)]
    end = asyncio.get_running_loop().time() + 60
    while upstream.active["/gate"] < count and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.02)
    there = upstream.active["/gate"]
    upstream.open_gate()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    return there, [answer.status if not isinstance(answer, (Broken, OSError)) else repr(answer) for answer in answers]


@pytest.mark.timeout(900)
def test_clients_that_vanish_leave_no_slot_taken(request, tmp_path, redis):
    clients, streams_max = (5000, 1024) if request.config.getoption("--long") else (500, 96)
    limits = f"streams_max = {streams_max}\ncluster_streams_max = {2 * streams_max}\n"
    upstream, port = Upstream(), free_port()
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, config=limits + peer(), agent=["--metrics-port", str(port)])
    second = TunnelGateway(tmp_path, redis.url, tunnel.write("second", limits + peer()), None)
    instances = [tunnel.gateway.port, second.port]
    try:
        tunnel.ready(tunnel.agent, second)
        # More at once than there are streams: some wait for a slot.
        asyncio.run(vanish_all(instances, clients, streams_max + streams_max // 2))
        assert all(upstream.seen[state["path"]] > clients // 50 for state in STATES.values()), upstream.seen
        assert metric(second.port, "wsproxy_tunnel_forwarded_total") > 0
        # The agent stands still: what it has is as if on its way.
        stand_still(tunnel.agent)
        asyncio.run(vanish_all(instances, clients // 5, streams_max))
        tunnel.agent.child.send_signal(signal.SIGCONT)
        # Without an agent, all wait for a lane.
        tunnel.agent.stop(signal.SIGKILL)
        asyncio.run(vanish_all(instances, clients // 5, streams_max))
        agent = tunnel.agent = tunnel.start_agent("agent", "--metrics-port", str(port))
        tunnel.ready(agent, second)
        asyncio.run(vanish_all(instances, clients // 5, streams_max))
        for what in ["wsproxy_tunnel_streams", "wsproxy_tunnel_queue_depth"]:
            for instance in instances:
                until(f"{what} 0", lambda instance=instance, what=what: metric(instance, what) == 0)
        until("no stream at the agent", lambda: metric(port, "wsproxy_agent_streams") == 0)
        until("no request at the upstream", lambda: sum(upstream.active.values()) == 0)
        # Every slot can be taken, half of them over the hop between instances.
        there, statuses = asyncio.run(ask_at_once(instances, streams_max, upstream))
        assert (there, set(statuses)) == (streams_max, {200})
    finally:
        second.process.stop()
        tunnel.stop()
        upstream.close()
