"""No fault of any part has a POST done twice, or one that was answered not done. `--long`: five minutes in place of twelve seconds."""

import asyncio
import collections
import itertools
import random
import signal
import threading
import time

import pytest
from conftest import free_port
from load import Broken, Client, Relay, Upstream, resident_bytes
from tunnel import Tunnel, TunnelGateway, peer

# A lane behind a relay that stands still is dead soon.
FAST = 'ping = "200ms"\nping_timeout = "1s"\nwait = "2s"\nreconnect_grace = "2s"\n'


class Worker:
    """A client that sends one request after the other, each with a number of its own."""

    def __init__(self, numbers, ports, chance):
        self.numbers, self.ports, self.chance = numbers, ports, chance
        # Status, code or error of each request, by method and path.
        self.outcomes = {}
        self.client = None

    async def run(self, until):
        while time.monotonic() < until:
            method, path = self.chance.choice(["POST", "POST", "GET"]), f"/id/{next(self.numbers)}"
            self.outcomes[method, path] = await self.ask(method, path)
            await asyncio.sleep(self.chance.uniform(0, 0.08))

    async def ask(self, method, path):
        try:
            # A connection serves several requests, so that the gateway may have ended it meanwhile.
            if not self.client or self.chance.random() < 0.3:
                self.leave()
                self.client = await Client.connect(self.chance.choice(self.ports))
            body = b"x" * self.chance.choice([1, 100, 50_000]) if method == "POST" else b""
            self.client.send(path, method=method, body=body)
            answer = await asyncio.wait_for(self.client.answer(), 20)
            return answer.status if answer.status == 200 else answer.code
        except (Broken, OSError) as error:
            self.leave()
            return repr(error)

    def leave(self):
        if self.client:
            self.client.leave()
        self.client = None


class Faults(threading.Thread):
    """Stops relays, cuts them, and kills agents and the second instance, until it is told to end."""

    def __init__(self, tunnel, second, relays, agents, seed):
        super().__init__()
        self.tunnel, self.second, self.relays, self.agents = tunnel, second, relays, agents
        self.chance, self.over = random.Random(seed), threading.Event()
        self.counts, self.error = collections.Counter(), None

    def run(self):
        try:
            while not self.over.wait(self.chance.uniform(0.1, 0.5)):
                fault = self.chance.choice([self.stand_still, self.stand_still, self.cut, self.kill_agent, self.kill_instance])
                fault()
                self.counts[fault.__name__] += 1
        except BaseException as error:
            self.error = error

    def stand_still(self):
        relay = self.chance.choice(self.relays)
        relay.stand_still()
        self.over.wait(self.chance.uniform(0.05, 1.8))
        relay.go_on()

    def cut(self):
        self.chance.choice(self.relays).cut()

    def kill_agent(self):
        at = self.chance.randrange(len(self.agents))
        self.agents[at].stop(signal.SIGKILL)
        self.agents[at] = start_agent(self.tunnel, at, self.relays)

    def kill_instance(self):
        self.second.process.stop(signal.SIGKILL)
        self.second.start()


def start_agent(tunnel, at, relays):
    return tunnel.start_agent(f"agent-{at}", "--agent-id", f"node-{at}", "--health-path", "", port=relays[at].port)


async def ask_all(workers, seconds):
    until = time.monotonic() + seconds
    await asyncio.gather(*(worker.run(until) for worker in workers))
    for worker in workers:
        worker.leave()


@pytest.mark.timeout(900)
def test_no_post_is_done_twice(request, tmp_path, redis):
    seconds = 300 if request.config.getoption("--long") else 12
    # Connections without a request end just when the agent may use them again.
    upstream, ports = Upstream(idle=(0.001, 0.1)), [free_port(), free_port()]
    relays = [Relay(port) for port in ports]
    config = FAST + peer()
    tunnel = Tunnel(
        tmp_path,
        redis.url,
        upstream.url,
        None,
        config=config,
        port=ports[0],
        dial=relays[0].port,
        agent=["--agent-id", "node-0"],
    )
    second = TunnelGateway(tmp_path, redis.url, tunnel.write("second", FAST + peer()), None, ports[1])
    agents = [tunnel.agent, start_agent(tunnel, 1, relays)]
    faults = Faults(tunnel, second, relays, agents, seed=seconds)
    try:
        tunnel.ready(agents[1], second)
        numbers = itertools.count()
        workers = [Worker(numbers, ports, random.Random(at)) for at in range(32)]
        before = resident_bytes(tunnel.gateway.process)
        faults.start()
        asyncio.run(ask_all(workers, seconds))
        faults.over.set()
        faults.join()
        if faults.error:
            raise faults.error
        outcomes = {key: outcome for worker in workers for key, outcome in worker.outcomes.items()}
        told = collections.Counter((method, outcome) for (method, _), outcome in outcomes.items())
        print(faults.counts, told)
        for (method, path), outcome in outcomes.items():
            seen = upstream.seen[path]
            assert seen <= (1 if method == "POST" else 3), f"{method} {path} was done {seen} times: {outcome}"
            # An answer of the upstream is one to a request that it has seen.
            assert seen > 0 or outcome != 200, f"{method} {path} was lost"
        posts = sum(count for (method, _), count in told.items() if method == "POST")
        assert posts > 50 * seconds, told
        assert told["POST", 200] > posts / 4, told
        # The faults met requests.
        assert told["POST", "lane_lost"] > 0, told
        assert resident_bytes(tunnel.gateway.process) < before + (100 << 20)
    finally:
        faults.over.set()
        if faults.is_alive():
            # It may be about to start an agent.
            faults.join()
        second.process.stop()
        for agent in agents:
            agent.stop()
        tunnel.stop()
        for part in [*relays, upstream]:
            part.close()


@pytest.mark.timeout(900)
def test_lanes_that_are_cut_are_dialled_within_the_backoff(request, tmp_path, redis):
    seconds = 300 if request.config.getoption("--long") else 12
    upstream, port = Upstream(idle=(0.001, 0.1)), free_port()
    relay = Relay(port)
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, config=FAST, port=port, dial=relay.port)
    over, chance = threading.Event(), random.Random(seconds)

    def cut():
        # A lane is cut while requests are on it, and never becomes old.
        while not over.wait(chance.uniform(0.2, 1)):
            relay.cut()

    cutting = threading.Thread(target=cut)
    try:
        numbers = itertools.count()
        workers = [Worker(numbers, [port], random.Random(at)) for at in range(16)]
        cutting.start()
        asyncio.run(ask_all(workers, seconds))
        over.set()
        cutting.join()
        assert len(relay.dials) >= 5
        doublings = 0
        for end, dial in zip(relay.ends, relay.dials[1:], strict=False):
            # Waits double from 200 ms to 30 s, but not beyond a second in the first ten. Half of each is the least.
            doubled = min(0.2 * 2**doublings, 30)
            length = min(doubled, 1) if end - relay.ends[0] < 10.5 else doubled
            doublings += length == doubled
            assert dial - end > length / 2 - 0.05, (
                f"a dial came {dial - end} s after the end of the lane, which is not {length / 2}"
            )
        outcomes = [(method, path, outcome) for worker in workers for (method, path), outcome in worker.outcomes.items()]
        for method, path, outcome in outcomes:
            assert upstream.seen[path] <= (1 if method == "POST" else 3), f"{method} {path}: {outcome}"
            assert upstream.seen[path] > 0 or outcome != 200, f"{method} {path} was lost"
        assert {200, "lane_lost"} <= {outcome for _, _, outcome in outcomes}
    finally:
        over.set()
        tunnel.stop()
        relay.close()
        upstream.close()
