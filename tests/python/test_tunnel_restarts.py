"""Restarts of instances under load, and Redis away: no short request fails. `--long`: Redis is away for a minute."""

import asyncio
import collections
import signal
import threading
import time

import pytest
from conftest import until
from load import Broken, Relay, Upstream, ask, metric
from tunnel import Tunnel, TunnelGateway, peer


class Load(threading.Thread):
    """Clients that send short requests, each on a connection of its own, to a port until they are told to end."""

    def __init__(self, port, methods=("GET", "POST")):
        super().__init__()
        self.port, self.methods, self.over = port, methods, False
        self.outcomes = collections.Counter()

    def run(self):
        asyncio.run(self.ask_all())

    async def ask_all(self):
        await asyncio.gather(*(self.ask(method) for method in self.methods * (8 // len(self.methods))))

    async def ask(self, method):
        body = b"x" * 1000 if method == "POST" else b""
        while not self.over:
            try:
                answer = await asyncio.wait_for(ask(self.port, "/short", method=method, body=body), 20)
                self.outcomes[answer.status if answer.status == 200 else answer.code] += 1
            except (Broken, OSError) as error:
                self.outcomes[repr(error)] += 1
            await asyncio.sleep(0.005)

    def end(self):
        """Ends the load, and returns the outcomes of all requests."""
        self.over = True
        self.join()
        return self.outcomes


class Balancer(Relay):
    """Carries each new connection to an instance that is ready, as a balancer does that asks them."""

    def __init__(self, instances):
        self.instances = instances
        super().__init__(instances[0].port)
        self.asking = threading.Thread(target=self.choose, daemon=True)
        self.over = threading.Event()
        self.asking.start()

    def choose(self):
        turn = 0
        while not self.over.wait(0.02):
            for _ in self.instances:
                turn += 1
                instance = self.instances[turn % len(self.instances)]
                try:
                    if instance.is_ready():
                        self.target = instance.port
                        break
                except Exception:
                    continue

    def close(self):
        self.over.set()
        self.asking.join()
        super().close()


def test_a_restart_of_an_instance_fails_no_short_request(tmp_path, redis):
    # The delay is the time in which the balancer sees that an instance ends.
    upstream, delay = Upstream(), {"WSPROXY_SERVER__DRAIN_DELAY": "1s"}
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, config=peer(), agent=["--agent-id", "node-1"], **delay)
    second = TunnelGateway(tmp_path, redis.url, tunnel.write("second", peer()), None, **delay)
    other = tunnel.start_agent("other", "--agent-id", "node-2", port=second.port)
    instances = [tunnel.gateway, second]
    balancer, load = Balancer(instances), None
    try:
        tunnel.ready(other, second)
        load = Load(balancer.port)
        load.start()
        for instance in instances:
            for each in instances:
                until("a lane", lambda each=each: metric(each.port, "wsproxy_tunnel_lanes") == 1)
            before = load.outcomes.total()
            assert instance.process.stop() == 0
            instance.start()
            until("further answers", lambda before=before: load.outcomes.total() > before + 50)
        outcomes = load.end()
        assert set(outcomes) == {200}, outcomes
    finally:
        if load:
            load.end()
        balancer.close()
        other.stop()
        second.process.stop()
        tunnel.stop()
        upstream.close()


@pytest.mark.timeout(300)
def test_requests_to_another_instance_pass_while_redis_is_away(request, tmp_path, redis):
    seconds = 60 if request.config.getoption("--long") else 5
    upstream = Upstream()
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, config=peer())
    second, load = TunnelGateway(tmp_path, redis.url, tunnel.write("second", peer()), None), None
    try:
        tunnel.ready(tunnel.agent, second)
        # A POST whose body has been given to the other instance just when its agent left is refused, as one to repeat.
        load = Load(second.port, ["GET"])
        load.start()
        time.sleep(0.5)
        redis.kill()
        time.sleep(seconds / 2)
        # Requests wait for the agent, which comes back while Redis is away.
        tunnel.agent.stop(signal.SIGTERM)
        tunnel.agent = tunnel.start_agent("again")
        until("the lane", lambda: metric(tunnel.gateway.port, "wsproxy_tunnel_lanes") == 1)
        before = load.outcomes[200]
        until("further answers", lambda: load.outcomes[200] > before + 20)
        time.sleep(seconds / 2)
        answered = load.outcomes[200]
        redis.start()
        until("the entry of the lane", lambda: redis.client.hlen("tunnel:c1") == 1)
        until("further answers", lambda: load.outcomes.total() > answered + 50)
        outcomes = load.end()
        assert set(outcomes) == {200}, outcomes
        assert answered > 20 * seconds
        # All of them took the hop to the instance with the agent.
        assert metric(second.port, "wsproxy_tunnel_forwarded_total") >= outcomes[200]
    finally:
        if load:
            load.end()
        second.process.stop()
        tunnel.stop()
        upstream.close()


async def ask_steadily(port, per_second, seconds):
    """Sends GETs at a rate, whatever becomes of them, and returns their answers with their times, in the order of sending."""

    async def one():
        began = time.monotonic()
        answer = await ask(port, "/short")
        return answer, time.monotonic() - began

    asking, began = [], time.monotonic()
    for number in range(int(per_second * seconds)):
        await asyncio.sleep(max(0, began + number / per_second - time.monotonic()))
        asking.append(asyncio.ensure_future(one()))
    return await asyncio.gather(*asking)


@pytest.mark.parametrize("per_second", [60, 300])
def test_requests_wait_for_an_agent_that_is_away(tmp_path, redis, per_second):
    upstream = Upstream()
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None)
    port = tunnel.gateway.port

    def leave_and_return():
        tunnel.agent.stop(signal.SIGKILL)
        time.sleep(3)
        tunnel.agent = tunnel.start_agent("again")

    leaving = threading.Timer(0.5, leave_and_return)
    try:
        leaving.start()
        answers = asyncio.run(ask_steadily(port, per_second, 4.5))
        codes = collections.Counter(answer.code for answer, _ in answers)
        if per_second == 60:
            assert set(codes) == {""}, codes
            return
        # The first 256 wait and are answered; the others are told at once, and again answered behind the return.
        # Just when the agent is back, what it has free belongs to those that wait.
        assert codes["cluster_reconnecting"] > 300 > 50 > codes["overloaded"], codes
        assert set(codes) <= {"", "cluster_reconnecting", "overloaded"}, codes
        first_refused = next(at for at, (answer, _) in enumerate(answers) if answer.code)
        waited = [at for at, (_, seconds) in enumerate(answers[:first_refused]) if seconds > 0.5]
        assert len(waited) >= 200, len(waited)
        assert max(seconds for answer, seconds in answers if answer.code) < 1
        assert not answers[-1][0].code
    finally:
        leaving.join()
        tunnel.stop()
        upstream.close()
