"""An answer that breaks in the middle never ends well for a client: whatever broke, however the body is framed, at each hop.

`--long`: readers that are too slow as well, which have to be so for half a minute.
"""

import contextlib
import http.client
import re
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import free_port, until
from tunnel import CLIENT, PROXY, Tunnel, TunnelGateway, peer

FRAMES = ["length", "chunked", "close"]
PART = b"x" * 40_000


def reset(connection):
    """Ends a connection with RST in place of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Upstream:
    """Sends half of a body, framed as the path says, and then waits: the rest never comes. `endless`: it goes on instead."""

    def __init__(self, endless=False):
        self.endless = endless
        self.listener = socket.create_server(("127.0.0.1", free_port()))
        self.url = "http://{}:{}".format(*self.listener.getsockname())
        self.held = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=[connection], daemon=True).start()

    def serve(self, connection):
        head = b""
        while b"\r\n\r\n" not in head:
            data = connection.recv(65536)
            if not data:
                return
            head += data
        frame = head.split()[1].decode().strip("/")
        if frame == "healthz":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            connection.close()
            return
        self.held.append(connection)
        if frame == "hold":
            return
        length = 10**8 if self.endless else 2 * len(PART)
        head = {
            "length": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length,
            "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "close": b"HTTP/1.0 200 OK\r\n\r\n",
        }
        piece = b"%x\r\n%s\r\n" % (len(PART), PART) if frame == "chunked" else PART
        connection.sendall(head[frame] + piece)
        with contextlib.suppress(OSError):
            while self.endless:
                connection.sendall(piece)

    def close(self):
        self.listener.close()
        for connection in self.held:
            connection.close()


class Relay:
    """Carries connections to a port until they are cut."""

    def __init__(self, port):
        self.listener = socket.create_server(("127.0.0.1", free_port()))
        self.port, self.target, self.sockets = self.listener.getsockname()[1], port, []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            self.sockets += [near, far]
            for ends in [(near, far), (far, near)]:
                threading.Thread(target=self.carry, args=ends, daemon=True).start()

    def carry(self, source, target):
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            target.close()

    def cut(self):
        """Ends all connections, and takes no other."""
        self.listener.close()
        for end in self.sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Reader:
    """A client that has read the first half of an answer."""

    def __init__(self, port, frame):
        self.frame = frame
        self.socket = socket.socket()
        # Little of an answer that is not read is on its way.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(("127.0.0.1", port))
        if frame == "close":  # HTTP/1.0 has no other framing: only a reset tells that something is missing.
            head = f"GET {PROXY}/close HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {CLIENT}\r\n\r\n"
            self.socket.sendall(head.encode())
            seen = b""
            while seen.count(b"x") < len(PART):
                data = self.socket.recv(4096)
                assert data, seen[:300]
                seen += data
            return
        self.connection = http.client.HTTPConnection("127.0.0.1", port)
        self.connection.sock = self.socket
        self.connection.request("GET", f"{PROXY}/{frame}", headers={"Authorization": f"Bearer {CLIENT}"})
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        assert self.answer.read(len(PART)) == PART

    def rest(self):
        """Reads on, and returns the error, or the last bytes of an answer that ended well."""
        try:
            # Only a read of the whole rest looks at the length.
            while data := self.socket.recv(65536) if self.frame == "close" else self.answer.read():
                pass
            return data
        except (http.client.IncompleteRead, OSError) as error:
            return error


@pytest.mark.parametrize("hop", ["here", "other instance"])
@pytest.mark.parametrize("cause", ["upstream", "agent", "lane"])
def test_a_broken_answer_is_an_error(tmp_path, redis, cause, hop):
    upstream, port = Upstream(), free_port()
    relay = Relay(port)
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, port=port, dial=relay.port, config=peer())
    second = TunnelGateway(tmp_path, redis.url, tunnel.write("second", peer()), None) if hop != "here" else None
    asked = second.port if second else port
    try:
        readers = [Reader(asked, frame) for frame in FRAMES]
        with ThreadPoolExecutor() as pool:
            rests = [pool.submit(reader.rest) for reader in readers]
            if cause == "upstream":
                until("three answers", lambda: len(upstream.held) == 3)
                for connection in upstream.held:
                    reset(connection)
            elif cause == "agent":
                tunnel.agent.stop(signal.SIGKILL)
            else:
                relay.cut()
            ends = {frame: rest.result(20) for frame, rest in zip(FRAMES, rests, strict=True)}
        assert all(isinstance(end, Exception) for end in ends.values()), ends
    finally:
        if second:
            second.process.stop()
        tunnel.stop()
        relay.listener.close()
        upstream.close()


def hold(port):
    """Sends a request that is never answered. Returns its connection."""
    connection = socket.create_connection(("127.0.0.1", port))
    head = f"GET {PROXY}/hold HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {CLIENT}\r\n\r\n"
    connection.sendall(head.encode())
    return connection


def refused(port):
    """Returns the code with which a request is refused."""
    with hold(port) as connection:
        connection.settimeout(20)
        return connection.recv(65536).decode().lower().partition("x-wsproxy-error: ")[2].split()[0]


@pytest.mark.parametrize("hop", ["here", "other instance"])
def test_a_reader_that_is_too_slow_gets_an_error(request, tmp_path, redis, hop):
    if not request.config.getoption("--long"):
        pytest.skip("a reader is too slow after half a minute: --long")
    upstream = Upstream(endless=True)
    # A mebibyte is sixteen streams.
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, config=f'memory = "1MiB"\n{peer()}')
    second = TunnelGateway(tmp_path, redis.url, tunnel.write("second", peer()), None) if hop != "here" else None
    asked = second.port if second else tunnel.gateway.port
    held = []
    try:
        if second:
            tunnel.ready(tunnel.agent, second)
        readers = [Reader(asked, frame) for frame in FRAMES]
        began = time.monotonic()
        # Requests that wait for an answer are no readers: none of these has to leave.
        held += [hold(asked) for _ in range(12)]
        time.sleep(20)
        young = Reader(asked, "length")
        until("the requests", lambda: len(upstream.held) == 16)
        assert refused(asked) == "overloaded"
        time.sleep(began + 32 - time.monotonic())
        # Three places are taken from the three that have read nothing for so long, and none from the younger one.
        held += [hold(asked) for _ in FRAMES]
        until("the requests", lambda: len(upstream.held) == 19)
        assert refused(asked) == "overloaded"
        ends = {reader.frame: reader.rest() for reader in readers}
        assert all(isinstance(end, Exception) for end in ends.values()), ends
        assert len(young.answer.read(10_000_000)) == 10_000_000
        page = httpx.get(f"{tunnel.gateway.http}/metrics").text
        assert re.findall(r'wsproxy_tunnel_requests_total{.*code="slow_reader"} (\d+)', page) == ["3"]
    finally:
        for connection in held:
            connection.close()
        if second:
            second.process.stop()
        tunnel.stop()
        upstream.close()
