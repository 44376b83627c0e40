"""Thousands of connections from one thread: an upstream, a relay, and clients that may vanish."""

import asyncio
import collections
import contextlib
import dataclasses
import pathlib
import random
import signal
import socket
import struct
import threading
import time

import httpx
from processes import free_port, until
from tunnel import CLIENT, PROXY


class Loop:
    """An event loop in a thread of its own, so that tests may block."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, coroutine, timeout=60):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def serve(self, handler, port):
        # Many connections may come at once.
        return self.run(asyncio.start_server(handler, "127.0.0.1", port, backlog=2048))

    def close(self):
        """Ends all tasks, and with them their connections."""

        async def cancel():
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(cancel())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Upstream(Loop):
    """Answers as the path says, and counts.

    `/hold` never answers, `/gate` answers once `open_gate` was called, `/begun` begins an answer, `/endless` never ends
    one, `/stuck` reads no body, `/switch` switches protocols and says nothing,
    `/headers` sends headers without end, `/large` has a large body, `/early` answers before it reads, `/reset` resets, `/words` speaks no HTTP. Others
    get `ok`.
    `idle`: the longest time for which it keeps a connection without a request, in seconds, or a range for a random one.
    """

    def __init__(self, idle=None):
        super().__init__()
        self.idle = idle
        # Requests that wait for an answer or read one, by their paths.
        self.active = collections.Counter()
        self.seen = collections.Counter()
        self.connections = 0
        # Bytes of headers without end that were taken.
        self.header_bytes = 0
        self.gate = asyncio.Event()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = self.serve(self.connection, self.port)

    def open_gate(self):
        self.loop.call_soon_threadsafe(self.gate.set)

    def close_gate(self):
        self.loop.call_soon_threadsafe(self.gate.clear)

    async def connection(self, reader, writer):
        self.connections += 1
        try:
            while await self.request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass
        finally:
            self.connections -= 1
            writer.transport.abort()

    async def request(self, reader, writer):
        idle = random.uniform(*self.idle) if isinstance(self.idle, tuple) else self.idle
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), idle)
        path = head.split(b" ", 2)[1].decode().partition("?")[0]
        self.seen[path] += 1
        self.active[path] += 1
        try:
            await self.answer(path, head.lower(), reader, writer)
            return path not in ENDS_CONNECTION
        finally:
            self.active[path] -= 1

    async def answer(self, path, head, reader, writer):
        if path in ("/stuck", "/hold"):
            return await self.until_gone(reader, path == "/hold")
        if path == "/switch":
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
            return await self.until_gone(reader)
        if path in ("/begun", "/endless"):
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n")
            while path == "/endless":
                writer.write(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
                await writer.drain()
            return await self.until_gone(reader)
        if path in ("/early", "/words"):
            words = (
                b"HTTP/1.1 413 Too Much\r\nContent-Length: 8\r\nConnection: close\r\n\r\n"
                if path == "/early"
                else b"SSH-2.0-x\r\n\r\n"
            )
            writer.write(words + b"too much")
            return await self.until_gone(reader)
        if path == "/reset":
            return reset(writer)
        if path == "/large":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE_BYTES)
            for _ in range(LARGE_BYTES // 65536):
                writer.write(bytes(65536))
                await writer.drain()
            return None
        if path == "/headers":
            writer.write(b"HTTP/1.1 200 OK\r\n")
            while self.header_bytes < 2**30:
                writer.write(b"X-A: " + b"a" * 1000 + b"\r\n")
                await writer.drain()
                self.header_bytes += 1007
            return None
        if b"\r\ncontent-length: " in head:
            await reader.readexactly(int(head.partition(b"\r\ncontent-length: ")[2].split(b"\r\n")[0]))
        if path == "/gate":
            await self.gate.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        return None

    async def until_gone(self, reader, reads=True):
        """Waits for the end of a connection. Without `reads` the kernel's buffers fill up first."""
        if not reads:
            await asyncio.sleep(1)
        while await reader.read(65536):
            pass


LARGE_BYTES = 16 << 20

# Paths whose answers end their connection.
ENDS_CONNECTION = {"/begun", "/endless", "/stuck", "/switch", "/hold", "/headers", "/early", "/reset", "/words"}


class Relay(Loop):
    """Carries connections to a port. It can stand still in both directions, and cut what it carries.

    `delay`: seconds from one end to the other. `rate`: bytes per second of each direction of a connection. What it holds
    itself is 64 KiB in each direction, and with a delay what comes in that time.
    """

    def __init__(self, target, delay=0, rate=None):
        super().__init__()
        self.target, self.port, self.delay, self.rate = target, free_port(), delay, rate
        self.dials, self.ends = [], []
        self.carried = set()
        self.going = asyncio.Event()
        self.loop.call_soon_threadsafe(self.going.set)
        self.server = self.serve(self.connection, self.port)

    async def connection(self, reader, writer):
        self.dials.append(time.monotonic())
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        both = (writer, far_writer)
        self.carried.add(both)
        ways = [asyncio.ensure_future(self.carry(reader, far_writer)), asyncio.ensure_future(self.carry(far_reader, writer))]
        try:
            # The end that leaves first has ended its connection, though the other one may take its time.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            self.ends.append(time.monotonic())
            await asyncio.gather(*ways)
        finally:
            self.carried.discard(both)
            for way in ways:
                way.cancel()
            for end in both:
                end.transport.abort()

    async def carry(self, source, target):
        if self.rate:
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                target.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, 65536)
        with contextlib.suppress(OSError):
            while data := await source.read(16384 if self.rate else 65536):
                await self.going.wait()
                if self.rate:
                    await asyncio.sleep(len(data) / self.rate)
                if self.delay:
                    # Later pieces have later times, so that they keep their order.
                    self.loop.call_later(self.delay, target.write, data)
                else:
                    target.write(data)
                    await target.drain()
            await asyncio.sleep(self.delay)
            target.write_eof()

    def stand_still(self):
        self.loop.call_soon_threadsafe(self.going.clear)

    def go_on(self):
        self.loop.call_soon_threadsafe(self.going.set)

    def cut(self):
        """Ends all connections with RST."""

        def end():
            for both in list(self.carried):
                for writer in both:
                    reset(writer)

        self.loop.call_soon_threadsafe(end)


@dataclasses.dataclass
class Answer:
    """An answer that came whole."""

    status: int
    code: str
    body: bytes


class Broken(Exception):
    """A connection ended before the answer did."""


class Client:
    """A connection to an instance."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port, receive_bytes=None):
        connection = socket.socket()
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=connection, limit=receive_bytes or 65536))

    def send(self, path, method="GET", headers=(), body=b""):
        lines = [f"{method} {PROXY}{path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {CLIENT}", *headers]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def answer(self):
        """Reads an answer to its end, and raises `Broken` where it has none."""
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
            status = int(head.split(" ")[1])
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
            body = b""
            if "content-length" in fields:
                body = await self.reader.readexactly(int(fields["content-length"]))
            elif fields.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readuntil(b"\r\n")
            return Answer(status, fields.get("x-wsproxy-error", ""), body)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Broken(str(error)) from error

    def leave(self, with_reset=False):
        if with_reset:
            reset(self.writer)
        else:
            self.writer.transport.abort()


def reset(writer):
    """Ends a connection with RST in place of FIN."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def ask(port, path, **request):
    """Sends one request on a connection of its own, and returns its answer, which must come within a minute."""
    client = await Client.connect(port)
    try:
        client.send(path, **request)
        return await asyncio.wait_for(client.answer(), 60)
    finally:
        client.leave()


def metric(port, name):
    """Returns the sum of a metric's series on a page of numbers."""
    page = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    rows = [line.rpartition(" ") for line in page.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(value) for _, _, value in rows)


def stand_still(process):
    """Stops a child process, and waits until each of its threads has stopped."""
    process.child.send_signal(signal.SIGSTOP)
    tasks = pathlib.Path(f"/proc/{process.child.pid}/task")
    until("the stop", lambda: all("\nState:\tT" in (task / "status").read_text() for task in tasks.iterdir()))


def resident_bytes(process):
    """Returns the resident memory of a child process."""
    with open(f"/proc/{process.child.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096
