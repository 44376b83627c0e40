"""An answer that breaks in the middle never ends well for a client: whatever broke, however the body is framed, at each hop."""

import contextlib
import http.client
import signal
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import free_port, until
from tunnel import CLIENT, PROXY, Tunnel, TunnelGateway

FRAMES = ["length", "chunked", "close"]
PART = b"x" * 40_000


def reset(connection):
    """Ends a connection with RST in place of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Upstream:
    """Sends half of a body, framed as the path says, and then waits: the rest never comes."""

    def __init__(self):
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
        answer = {
            "length": b"HTTP/1.1 200 OK\r\nContent-Length: 80000\r\n\r\n" + PART,
            "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9c40\r\n" + PART + b"\r\n",
            "close": b"HTTP/1.0 200 OK\r\n\r\n" + PART,
        }
        connection.sendall(answer[frame])
        self.held.append(connection)

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
        if frame == "close":  # HTTP/1.0 has no other framing: only a reset tells that something is missing.
            self.socket = socket.create_connection(("127.0.0.1", port))
            head = f"GET {PROXY}/close HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {CLIENT}\r\n\r\n"
            self.socket.sendall(head.encode())
            seen = b""
            while not seen.endswith(PART):
                data = self.socket.recv(65536)
                assert data, seen[:300]
                seen += data
            return
        self.connection = http.client.HTTPConnection("127.0.0.1", port)
        self.connection.request("GET", f"{PROXY}/{frame}", headers={"Authorization": f"Bearer {CLIENT}"})
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        assert self.answer.read(len(PART)) == PART

    def rest(self):
        """Reads on, and returns the error, or the bytes of an answer that ended well."""
        try:
            return self.socket.recv(65536) if self.frame == "close" else self.answer.read()
        except (http.client.IncompleteRead, OSError) as error:
            return error


@pytest.mark.parametrize("hop", ["here", "other instance"])
@pytest.mark.parametrize("cause", ["upstream", "agent", "lane"])
def test_a_broken_answer_is_an_error(tmp_path, redis, cause, hop):
    upstream, port = Upstream(), free_port()
    relay = Relay(port)
    peer = 'peer_bind = "127.0.0.1:{}"\npeer_secret = "a-secret-of-instances-with-32-bytes"'
    tunnel = Tunnel(tmp_path, redis.url, upstream.url, None, port=port, dial=relay.port, config=peer.format(free_port()))
    second = TunnelGateway(tmp_path, redis.url, tunnel.write("second", peer.format(free_port())), None) if hop != "here" else None
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
