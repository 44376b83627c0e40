"""The PROXY protocol with real proxies that do not look into HTTP: HAProxy with both versions, and nginx."""

import asyncio
import pathlib
import signal

import pytest
from conftest import until
from samples import ACCEPT, BLIND, CLIENT, NGINX_STREAM, status
from test_proxies import FORGED, TRUST, Crowd, refused_addresses
from websockets.asyncio.client import connect

PROXIES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "nginx_stream" and not pathlib.Path(NGINX_STREAM).exists(), reason="apt-get install libnginx-mod-stream"
        ),
    )
    for name in BLIND
]
PROXY_PROTOCOL = {**TRUST, "WSPROXY_SERVER__PROXY_PROTOCOL": "true"}

behind_blind = pytest.mark.parametrize("name", PROXIES)


@behind_blind
@pytest.mark.asyncio
async def test_a_websocket_and_a_stream_pass(start_gateway, start_proxy, session, redis, name):
    gateway = start_gateway(**PROXY_PROTOCOL)
    proxy = start_proxy(name, gateway)
    protocols = ["wsproxy.v1", f"bearer.{session()}"]
    async with connect(f"{proxy.ws}/demo/ws/s-1", subprotocols=protocols, ssl=proxy.context, proxy=None) as client:
        redis.client.publish("session:s-1:down", "dreißig")
        async with asyncio.timeout(10):
            assert await client.recv() == "dreißig"
    redis.client.set("session:s-2:auth", "sse.t", ex=60)
    with proxy.connect("/demo/ws/s-2?token=sse.t", [ACCEPT]) as stream:
        assert status(stream) == 200
        until("it listens", lambda: redis.client.pubsub_numsub("session:s-2:down")[0][1] == 1)
    # The end of a client reaches the gateway at once.
    until("it is gone", lambda: redis.client.pubsub_numsub("session:s-2:down")[0][1] == 0, deadline=5)


@behind_blind
def test_the_address_is_the_clients_own(start_gateway, start_proxy, name):
    limit = {"WSPROXY_RATE_LIMIT__MAX_REQUESTS": "2", "WSPROXY_RATE_LIMIT__WINDOW_SECONDS": "600"}
    gateway = start_gateway(**PROXY_PROTOCOL, **limit)
    proxy = start_proxy(name, gateway)
    forged = [("X-Forwarded-For", FORGED), ("Forwarded", f"for={FORGED}")]
    assert [proxy.ask("/demo/ws/s-1", headers) for headers in [[], forged, forged]] == [426, 426, 429]
    until("all are logged", lambda: len(refused_addresses(gateway)) == 3)
    assert refused_addresses(gateway) == [CLIENT] * 3


def test_a_rolling_restart_behind_tcp_refuses_nobody(start_gateway, start_proxy, redis):
    settings = {**PROXY_PROTOCOL, "WSPROXY_SERVER__DRAIN_SPREAD": "0s", "WSPROXY_SERVER__DRAIN_DELAY": "5s"}
    # The harness asks without a header, so from an address that is not trusted.
    instances = [start_gateway(**settings) for _ in range(2)]
    proxy = start_proxy("haproxy_tcp", *instances)
    with Crowd(proxy, redis) as crowd:
        for instance in instances:
            before = len(crowd.answers)
            assert instance.process.stop() == 0
            instance.start()
            assert len(crowd.answers) > before + 20
    assert set(crowd.answers) <= {200, 101}, [answer for answer in crowd.answers if answer not in {200, 101}]
    for instance in instances:
        instance.process.stop(signal.SIGKILL)
