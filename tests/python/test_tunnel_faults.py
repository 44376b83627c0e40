"""Agents that stand still, lose their clock or attack the gateway, and upstreams that misbehave: each fault is told by its code."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from conftest import free_port, until
from load import LARGE_BYTES, Relay, Upstream, ask, metric, resident_bytes, stand_still
from tunnel import CLIENT, Tunnel, digest


@pytest.fixture
def upstream():
    upstream = Upstream()
    yield upstream
    upstream.close()


def test_an_upstream_that_misbehaves_is_told_by_its_code(tmp_path, redis, upstream):
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None)
    port = tunnel.gateway.port
    try:
        before = [resident_bytes(process) for process in (tunnel.gateway.process, tunnel.agent)]
        for path, status, code in [
            ("/headers", 502, "head_too_large"),
            ("/reset", 502, "upstream_reset"),
            ("/words", 502, "upstream_protocol"),
            ("/early", 413, ""),
        ]:
            # An answer that comes early is whole, though its request never was.
            answer = asyncio.run(ask(port, path, method="POST", body=b"x" * 2_000_000))
            assert (answer.status, answer.code) == (status, code), path
        assert answer.body == b"too much"
        # Of a gigabyte of headers hardly more was taken than fits into a head and the kernel's buffers.
        assert 0 < upstream.header_bytes < 20 << 20
        growth = [
            resident_bytes(process) - then for process, then in zip((tunnel.gateway.process, tunnel.agent), before, strict=True)
        ]
        assert max(growth) < 16 << 20, growth
        until("no request at the upstream", lambda: sum(upstream.active.values()) == 0)
        assert asyncio.run(ask(port, "/short")).status == 200
    finally:
        tunnel.stop()


def test_an_agent_that_stands_still_is_left_and_comes_back(tmp_path, redis, upstream):
    config = 'ping = "200ms"\nping_timeout = "1s"\n'
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, config=config, agent=["--agent-id", "node-1"])
    port = tunnel.gateway.port
    other = None
    try:
        stand_still(tunnel.agent)

        async def faults():
            get, post = (asyncio.ensure_future(ask(port, "/short", method=method)) for method in ("GET", "POST"))
            await asyncio.sleep(0.3)
            # Requests without an answer cannot be told from those that are done: only a GET may be sent again.
            nonlocal other
            other = tunnel.start_agent("other", "--agent-id", "node-2")
            return await get, await post

        get, post = asyncio.run(faults())
        assert (get.status, get.body) == (200, b"ok")
        assert (post.status, post.code) == (502, "lane_lost")
        until("the lane is given up", lambda: metric(port, "wsproxy_tunnel_lanes") == 1)
        tunnel.agent.child.send_signal(signal.SIGCONT)
        until("the agent is back", lambda: metric(port, "wsproxy_tunnel_lanes") == 2)
        other.stop()
        assert asyncio.run(ask(port, "/short", method="POST")).status == 200
    finally:
        tunnel.agent.child.send_signal(signal.SIGCONT)
        if other:
            other.stop()
        tunnel.stop()


def set_back(offset):
    """Returns the begin of a command whose clock is off. The program `faketime` would stand between: a signal ends it, and not its child."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return ["env", f"LD_PRELOAD={library}", f"FAKETIME={offset}"]


def test_no_clock_decides_which_lane_is_newer(tmp_path, redis, upstream):
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, agent=["--agent-id", "node-1"])
    port, later = tunnel.gateway.port, None
    try:
        # The same id, started later, with a clock that is ten years back.
        later = tunnel.start_agent("later", "--agent-id", "node-1", command=set_back("-10y"))
        until("the earlier one says so", lambda: "two processes use one agent id" in tunnel.agent.output())
        until("one lane is left", lambda: metric(port, "wsproxy_tunnel_lanes") == 1)
        assert "The lane is ready." in later.output()
        assert "two processes" not in later.output()
        for method in ("GET", "POST"):
            assert asyncio.run(ask(port, "/short", method=method)).status == 200
        tunnel.agent.stop()
        assert asyncio.run(ask(port, "/short")).status == 200
    finally:
        if later:
            later.stop()
        tunnel.stop()


def test_a_long_line_is_filled(tmp_path, redis, upstream):
    port = free_port()
    relay = Relay(port, delay=0.025)
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, port=port, dial=relay.port)
    try:
        began = time.monotonic()
        answer = asyncio.run(ask(port, "/large"))
        seconds = time.monotonic() - began
        print(f"{seconds:.2f} s")
        assert len(answer.body) == LARGE_BYTES
        # At the window that a stream begins with, this is 25 s.
        assert seconds < 10
    finally:
        tunnel.stop()
        relay.close()


async def ask_beside(upstream, port, bulk):
    """Returns the longest time of a small request beside large answers."""
    reading = [asyncio.ensure_future(ask(port, "/large")) for _ in range(bulk)]
    while upstream.active["/large"] < bulk:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    times = []
    for _ in range(6):
        began = time.monotonic()
        assert (await ask(port, "/short")).status == 200
        times.append(time.monotonic() - began)
    assert not any(read.done() for read in reading)
    for read in reading:
        read.cancel()
    return max(times)


def test_small_requests_pass_bulk_on_a_slow_line(tmp_path, redis, upstream):
    port = free_port()
    relay = Relay(port, rate=1_000_000)
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, port=port, dial=relay.port)
    try:
        beside_one = asyncio.run(ask_beside(upstream, port, 1))
        until("no stream is left", lambda: metric(port, "wsproxy_tunnel_streams") == 0)
        beside_many = asyncio.run(ask_beside(upstream, port, 64))
        print(f"beside one {beside_one * 1000:.0f} ms, beside 64 {beside_many * 1000:.0f} ms")
        # Bytes that the line and the kernel hold have to go first. A further piece of each answer would take a second.
        assert beside_one < 1.5
        assert beside_many < beside_one + 0.6
    finally:
        tunnel.stop()
        relay.close()


# ---- an agent that attacks ----


def frame(stream, kind, payload=b"", flags=0):
    return struct.pack(">IBBH", stream, kind, flags, len(payload)) + payload


def message(payload, opcode=0x82):
    """Returns a WebSocket frame whose mask is all zeros, and so changes nothing."""
    length = len(payload)
    if length < 126:
        head = struct.pack(">BB", opcode, 0x80 | length)
    elif length < 1 << 16:
        head = struct.pack(">BBH", opcode, 0xFE, length)
    else:
        head = struct.pack(">BBQ", opcode, 0xFF, length)
    return head + bytes(4) + payload


HELLO = frame(0, 1, b"\x01\x00\x02\x01\x01")


class Attacker:
    """A connection of the cluster `c2`'s agent, which reads nothing after its handshake unless it is told to."""

    numbers = itertools.count(1)

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port))
        lines = ["GET /clusters/c2/connect HTTP/1.1", "Host: localhost", "Connection: Upgrade", "Upgrade: websocket"]
        lines += [
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Protocol: wsproxy.tunnel.v1",
        ]
        lines += ["Authorization: Bearer attacker", f"X-Wsproxy-Agent: node {os.urandom(16).hex()} {next(self.numbers)}"]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.socket.recv(1)
        assert head.startswith(b"HTTP/1.1 101"), head
        self.socket.sendall(message(HELLO))

    def hears_open(self):
        """Reads until a request comes."""
        heard = b""
        while b"/attacked" not in heard:
            data = self.socket.recv(65536)
            assert data
            heard += data

    def flood(self, data, seconds):
        """Sends the same bytes again and again, as long as the gateway takes them."""
        end = time.monotonic() + seconds
        self.socket.settimeout(0.2)
        view, sent = memoryview(data), 0
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                with contextlib.suppress(TimeoutError):
                    # A piece of a message is followed by its rest.
                    sent += self.socket.send(view[sent % len(data) :])
        return sent

    def close(self):
        self.socket.close()


OPENED = 1
FLOODS = {
    "pings": message(frame(0, 9, bytes(8)) * 10_000),
    "pongs": message(frame(0, 10, bytes(12)) * 10_000),
    "health": message(frame(0, 12, bytes(29) + b"x" * 100) * 1000),
    "unknown frames": message(frame(0, 100, bytes(60_000)) * 4),
    "resets of a stream that has ended": message(frame(OPENED, 7, struct.pack(">HBI", 1, 0, 0) + b"x" * 500) * 400),
    "credit of a stream that has ended": message(
        frame(OPENED, 7, struct.pack(">HBI", 1, 0, 0)) + frame(OPENED, 6, struct.pack(">I", 1)) * 10_000
    ),
    "pings of WebSocket": message(b"x" * 125, 0x89) * 1000,
    "pieces of a message": message(b"x", 0x02) + message(b"x", 0x00) * 300_000,
    "a message without end": struct.pack(">BBQ", 0x82, 0xFF, 2**40) + bytes(1 << 20),
    "farewells": message(frame(0, 11, struct.pack(">IHI", 2**31 - 1, 12, 0)) * 10_000),
    "heads": message(frame(OPENED, 3, b"\x00\x64\x00" + b"\x01a\x00\x00" * 8000) * 8),
    "bodies": message(frame(OPENED, 3, b"\x00\xc8\x00") + frame(OPENED, 4, bytes(16_384)) * 15),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_an_agent_harms_no_other(request, tmp_path, redis, upstream, flood):
    seconds = 10 if request.config.getoption("--long") else 1
    redis.client.set("tunnel:c2:auth", digest("attacker"))
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None)
    port, attacker = tunnel.gateway.port, None
    try:
        attacker = Attacker(port)
        # A request that the attacker has.
        attacked = socket.create_connection(("127.0.0.1", port))
        attacked.sendall(
            f"GET /clusters/c2/proxy/attacked HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CLIENT}\r\n\r\n".encode()
        )
        attacker.hears_open()
        before, most, slowest = resident_bytes(tunnel.gateway.process), 0, 0
        flooding = threading.Thread(target=attacker.flood, args=[FLOODS[flood], seconds])
        flooding.start()
        while flooding.is_alive():
            began = time.monotonic()
            assert asyncio.run(ask(port, "/short")).status == 200
            slowest = max(slowest, time.monotonic() - began)
            most = max(most, resident_bytes(tunnel.gateway.process) - before)
            time.sleep(0.02)
        print(f"{most / 2**20:.1f} MiB, {slowest * 1000:.0f} ms")
        assert most < 24 << 20
        assert slowest < 2
        attacker.close()
        attacked.close()
        until(
            "nothing is left", lambda: metric(port, "wsproxy_tunnel_streams") == 0 and metric(port, "wsproxy_tunnel_lanes") == 1
        )
        assert metric(port, "wsproxy_tunnel_buffered_bytes") == 0
    finally:
        if attacker:
            attacker.close()
        tunnel.stop()
