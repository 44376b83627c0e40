"""The samples in deploy/, with the real nginx, HAProxy and Caddy: addresses, limits, logs, instances that come and go."""

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time

import pytest
from conftest import free_port, until
from samples import ACCEPT, CLIENT, SAMPLES, status
from websockets.asyncio.client import connect

FORGED = "192.0.2.66"
HEADERS = [
    [],
    [("X-Forwarded-For", FORGED)],
    [("Forwarded", f"for={FORGED}")],
    [("X-Forwarded-For", FORGED), ("Forwarded", f"for={FORGED}")],
    [("X-Forwarded-For", FORGED), ("X-Forwarded-For", FORGED), ("Forwarded", f"for={FORGED}"), ("Forwarded", "for=x")],
    [("X-Forwarded-For", f"{FORGED}, {FORGED}"), ("Forwarded", f'for="{FORGED}:1", for={FORGED}')],
    [("X-Forwarded-For", ""), ("Forwarded", 'for="')],
    [("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=127.0.0.1")],
    [("x-forwarded-for", CLIENT), ("forwarded", f"for={FORGED}")],
    # Names that are spelled differently are other headers.
    [("X_Forwarded_For", FORGED), ("X-Real-IP", FORGED), ("X-Forwarded", f"for={FORGED}")],
]
# At this level no line about a refused handshake is left out.
TRUST = {"WSPROXY_SERVER__TRUSTED_PROXIES": "127.0.0.1", "LOG_LEVEL": "debug"}
UPGRADE = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]

behind_all = pytest.mark.parametrize("name", SAMPLES)


def refused_addresses(gateway):
    """The addresses of clients that were refused, in their order."""
    lines = [json.loads(line) for line in gateway.process.output().splitlines() if line.startswith("{")]
    return [line["address"] for line in lines if line["message"] == "Handshake refused."]


@behind_all
@pytest.mark.parametrize("header", ["auto", "x-forwarded-for"])
def test_a_client_cannot_choose_its_address(start_gateway, start_proxy, name, header):
    gateway = start_gateway(**TRUST, WSPROXY_SERVER__FORWARDED_HEADER=header)
    proxy = start_proxy(name, gateway)
    for headers in HEADERS:
        assert proxy.ask("/demo/ws/s-1", headers) == 426, headers
    until("all are logged", lambda: len(refused_addresses(gateway)) == len(HEADERS))
    assert refused_addresses(gateway) == [CLIENT] * len(HEADERS)


@behind_all
def test_attempts_are_counted_whatever_a_client_says(start_gateway, start_proxy, name):
    limit = {"WSPROXY_RATE_LIMIT__MAX_REQUESTS": "3", "WSPROXY_RATE_LIMIT__WINDOW_SECONDS": "600"}
    proxy = start_proxy(name, start_gateway(**TRUST, **limit))
    forged = ([("Forwarded", f"for=192.0.2.{n}"), ("X-Forwarded-For", f"192.0.2.{n}")] for n in range(6))
    assert [proxy.ask("/demo/ws/s-1", headers) for headers in forged] == [426] * 3 + [429] * 3


# One thread reads and writes: two on one TLS connection disturb each other before Python 3.13 (python/cpython#143756).
@behind_all
@pytest.mark.asyncio
async def test_a_websocket_carries_messages_both_ways(start_gateway, start_proxy, session, redis, name):
    proxy = start_proxy(name, start_gateway(**TRUST))
    protocols = ["wsproxy.v1", f"bearer.{session()}"]
    with redis.client.pubsub() as worker:
        worker.subscribe("session:s-1:up")
        url = f"{proxy.ws}/demo/ws/s-1"
        async with connect(url, subprotocols=protocols, ssl=proxy.context, proxy=None) as client:
            redis.client.publish("session:s-1:down", "dreißig")
            async with asyncio.timeout(10):
                assert await client.recv() == "dreißig"
            await client.send('["up"]')
            message = until("it comes up", lambda: worker.get_message(ignore_subscribe_messages=True))
            assert message["data"] == '["up"]'


@behind_all
@pytest.mark.asyncio
async def test_a_unix_socket_takes_the_place_of_a_port(start_gateway, start_proxy, redis, tmp_path, name):
    """A WebSocket, an event stream, the client's address, and what the gateway leaves behind."""
    path = tmp_path / "wsproxy.sock"
    settings = {**TRUST, "WSPROXY_SERVER__UNIX": str(path), "WSPROXY_SERVER__TRUSTED_PROXIES": "unix:"}
    gateway = start_gateway(**settings)
    proxy = start_proxy(name, gateway)
    redis.client.set("session:s-1:auth", "a-token", ex=60)
    protocols = ["wsproxy.v1", "bearer.a-token"]
    async with connect(f"{proxy.ws}/demo/ws/s-1", subprotocols=protocols, ssl=proxy.context, proxy=None) as client:
        redis.client.publish("session:s-1:down", "over a file")
        async with asyncio.timeout(10):
            assert await client.recv() == "over a file"
    redis.client.set("session:s-2:auth", "sse.t", ex=60)
    with proxy.connect("/demo/ws/s-2?token=sse.t", [ACCEPT]) as stream:
        assert status(stream) == 200
    assert proxy.ask("/demo/ws/s-1", [("X-Forwarded-For", FORGED), ("Forwarded", f"for={FORGED}")]) == 426
    until("it is logged", lambda: refused_addresses(gateway))
    assert refused_addresses(gateway) == [CLIENT]
    assert gateway.process.stop() == 0
    assert not path.exists()


@behind_all
def test_plain_text_is_sent_to_tls(start_gateway, start_proxy, name):
    proxy = start_proxy(name, start_gateway())
    with socket.create_connection(("127.0.0.1", proxy.plain_port), 10) as client:
        client.sendall(b"GET /demo/ws/s-1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = client.recv(4096).decode().lower()
    assert head.split(" ")[1] in {"301", "308"}
    assert "\nlocation: https://localhost" in head


@behind_all
def test_no_log_of_a_proxy_has_a_token(start_gateway, start_proxy, redis, name):
    gateway = start_gateway(**TRUST)
    proxy = start_proxy(name, gateway)
    token = "sse.a-token-that-no-log-may-have"
    redis.client.set("session:s-1:auth", token, ex=600)
    shown = [
        (f"/demo/ws/s-1?token={token}", [ACCEPT]),
        ("/demo/ws/s-1", [ACCEPT, ("Authorization", f"Bearer {token}")]),
        ("/demo/ws/s-1", [*UPGRADE, ("Sec-WebSocket-Protocol", f"wsproxy.v1, bearer.{token}")]),
    ]
    streams = [proxy.connect(path, headers) for path, headers in shown]
    assert [status(stream) for stream in streams] == [200, 200, 403]
    # In the middle of a stream, and then no client is there.
    gateway.process.child.kill()
    gateway.process.child.wait()
    for path, headers in shown:
        assert proxy.ask(path, headers) in {502, 503}
    for stream in streams:
        stream.close()
    # A request that cannot be parsed, and one that is cut short.
    assert proxy.ask(f"/demo/ws/s-1?token={token}", [("A b", "c")]) in {200, 400, 502, 503}
    with contextlib.suppress(OSError):
        proxy.connect(f"/demo/ws/s-1?token={token}&" + "x" * 100_000).close()
    proxy.stop()
    logs = proxy.logs()
    assert "/demo/ws/s-1" in logs, "requests are logged"
    assert "a-token-that-no-log-may-have" not in logs


@behind_all
def test_more_clients_than_a_distribution_allows_are_served(start_gateway, start_proxy, redis, name):
    proxy = start_proxy(name, start_gateway(**TRUST, WSPROXY_LIMITS__CONNECTIONS_PER_SESSION="0"))
    redis.client.set("session:s-1:auth", "sse.t", ex=600)
    clients = [proxy.connect("/demo/ws/s-1?token=sse.t", [ACCEPT]) for _ in range(500)]
    try:
        assert {status(client) for client in clients} == {200}
    finally:
        for client in clients:
            client.close()


class Crowd:
    """Clients that come one after the other, each with a fresh token, and stay for a moment."""

    def __init__(self, proxy, redis, pause=0.02):
        self.proxy, self.redis, self.pause = proxy, redis, pause
        self.answers, self.over = [], threading.Event()
        self.thread = threading.Thread(target=self.run)

    def come(self):
        session = f"s-{len(self.answers)}"
        self.redis.client.set(f"session:{session}:auth", "once", ex=60)
        transport = [ACCEPT] if len(self.answers) % 2 else UPGRADE
        try:
            with self.proxy.connect(f"/demo/ws/{session}?token=once", transport) as client:
                self.answers.append(status(client))
        except (OSError, IndexError) as error:
            self.answers.append(repr(error))

    def run(self):
        while not self.over.wait(self.pause):
            self.come()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


@behind_all
def test_a_rolling_restart_refuses_nobody(start_gateway, start_proxy, redis, name):
    """The instances have an admin port, as they should: checks find `/ready` beside the clients."""
    settings = {**TRUST, "WSPROXY_SERVER__DRAIN_SPREAD": "0s", "WSPROXY_SERVER__DRAIN_DELAY": "5s"}
    instances = [start_gateway(**settings, METRICS_PORT=str(free_port())) for _ in range(2)]
    proxy = start_proxy(name, *instances)
    with Crowd(proxy, redis) as crowd:
        for instance in instances:
            before = len(crowd.answers)
            assert instance.process.stop() == 0
            instance.start()
            # The next one at once, as a careful operator would not.
            assert len(crowd.answers) > before + 20
        time.sleep(1)
    assert set(crowd.answers) <= {200, 101}, [answer for answer in crowd.answers if answer not in {200, 101}]
    openings = [instance.process.output().count('"Connection opened."') for instance in instances]
    assert min(openings) > 20, "both took part"
    for instance in instances:
        # Their drains were seen; the next test need not wait for two more.
        instance.process.stop(signal.SIGKILL)


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_an_instance_that_is_full_sends_clients_to_the_next(start_gateway, start_proxy, redis, name):
    full, other = start_gateway(**TRUST, WSPROXY_LIMITS__MAX_CONNECTIONS="1"), start_gateway(**TRUST)
    proxy = start_proxy(name, full, other)
    redis.client.set("session:s-0:auth", "sse.t", ex=600)
    with socket.create_connection(("127.0.0.1", full.port), 10) as guest:
        guest.sendall(b"GET /demo/ws/s-0?token=sse.t HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n")
        assert status(guest) == 200
        crowd = Crowd(proxy, redis)
        for _ in range(20):
            crowd.come()
    assert set(crowd.answers) == {200, 101}
    assert '"full"' in full.process.output(), "it was asked"


def test_where_all_are_full_nginx_hands_on_what_they_say(start_gateway, start_proxy, redis):
    proxy = start_proxy("nginx", *(start_gateway(**TRUST, WSPROXY_LIMITS__MAX_CONNECTIONS="1") for _ in range(2)))
    redis.client.set("session:s-0:auth", "sse.t", ex=600)
    clients = [proxy.connect("/demo/ws/s-0?token=sse.t", [ACCEPT]) for _ in range(2)]
    assert [status(client) for client in clients] == [200, 200]
    for _ in range(6):
        with proxy.connect("/demo/ws/s-0?token=sse.t", [ACCEPT, ("Connection", "close")]) as client:
            answer = b"".join(iter(lambda: client.recv(4096), b"")).decode().lower()
        assert answer.split(" ")[1] == "503" and "\nretry-after: 1" in answer and '"code":"full"' in answer
    for client in clients:
        client.close()


@behind_all
def test_a_stream_whose_client_left_ends_within_seconds(start_gateway, start_proxy, redis, name):
    gateway = start_gateway(**TRUST)
    proxy = start_proxy(name, gateway)
    redis.client.set("session:s-1:auth", "sse.t", ex=600)
    client = proxy.connect("/demo/ws/s-1?token=sse.t", [ACCEPT])
    assert status(client) == 200
    until("it listens", lambda: redis.client.pubsub_numsub("session:s-1:down")[0][1] == 1)
    client.close()
    # Comments come every 15 s: nothing is written meanwhile.
    until("it is gone", lambda: redis.client.pubsub_numsub("session:s-1:down")[0][1] == 0, deadline=5)
