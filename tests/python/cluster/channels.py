"""Streams of exec and port-forward over one upgraded connection, in each of their forms. Knows nothing of pods.

A `Link` is the bytes of the upgraded connection. `exec_channels` and `forwarded` say what a client does over it,
whether it speaks SPDY or WebSocket.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from wsproto.connection import Connection as WebSocket
from wsproto.connection import ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping

import spdy

# Channels of exec by their number in WebSocket messages, and by their name in SPDY.
STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSED = 0, 1, 2, 3, 4, 255
NAMES = {"stdin": STDIN, "stdout": STDOUT, "stderr": STDERR, "error": ERROR, "resize": RESIZE}


class Link(Protocol):
    """Bytes of an upgraded connection."""

    async def read(self) -> bytes:
        """Returns the next bytes; none at the end."""

    async def write(self, data: bytes) -> None:
        """Sends bytes."""


class Socket:
    """The bytes of a socket, of which some came behind the head of the request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, early: bytes) -> None:
        self._reader, self._writer, self._early = reader, writer, early

    async def read(self) -> bytes:
        early, self._early = self._early, b""
        return early or await self._reader.read(65536)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()


class Messages:
    """The binary messages of a WebSocket, as bytes."""

    def __init__(self, socket: Link) -> None:
        self._socket = socket
        self._protocol = WebSocket(ConnectionType.SERVER)
        self._parts: list[bytes] = []
        # One iterator for all calls of `read`: several messages can come at once.
        self._whole = self.messages()

    async def messages(self) -> AsyncIterator[bytes]:
        """Yields whole messages until the client closes."""
        while data := await self._socket.read():
            self._protocol.receive_data(data)
            for event in self._protocol.events():
                if isinstance(event, Ping):
                    await self._socket.write(self._protocol.send(event.response()))
                elif isinstance(event, BytesMessage):
                    self._parts.append(bytes(event.data))
                    if event.message_finished:
                        message, self._parts = b"".join(self._parts), []
                        yield message
                elif isinstance(event, CloseConnection):
                    await self._socket.write(self._protocol.send(event.response()))
                    return

    async def read(self) -> bytes:
        async for message in self._whole:
            if message:
                return message
        return b""

    async def write(self, data: bytes) -> None:
        await self._socket.write(self._protocol.send(BytesMessage(data)))

    async def close(self) -> None:
        """Closes the WebSocket."""
        await self._socket.write(self._protocol.send(CloseConnection(code=1000)))


class WebSocketChannels:
    """Channels of exec in messages of `v4.channel.k8s.io` and `v5…`: each begins with the number of its channel."""

    def __init__(self, socket: Link) -> None:
        self._messages = Messages(socket)

    async def input(self) -> AsyncIterator[bytes | None]:
        """Yields the bytes of stdin; None at its end."""
        async for message in self._messages.messages():
            channel, data = message[0], message[1:]
            if channel == STDIN and data:
                yield data
            elif channel == CLOSED and data[:1] == bytes([STDIN]):
                yield None

    async def send(self, channel: int, data: bytes) -> None:
        await self._messages.write(bytes([channel]) + data)

    async def finish(self, status: dict) -> None:
        await self.send(ERROR, json.dumps(status).encode())
        await self._messages.close()


class SpdyChannels:
    """Channels of exec as SPDY streams of `v4.channel.k8s.io`."""

    def __init__(self, link: Link, wanted: set[int]) -> None:
        self._link, self._wanted = link, wanted
        self._spdy = spdy.Connection()
        self._streams: dict[int, int] = {}
        self._early: list[bytes | None] = []

    async def open(self) -> None:
        """Waits for the streams that the request asked for."""
        while set(self._streams) != self._wanted:
            if not await self._receive():
                raise ConnectionError("the client left before its streams were open")

    async def _receive(self) -> bool:
        data = await self._link.read()
        for event in self._spdy.receive(data):
            if isinstance(event, spdy.Opened):
                self._streams[NAMES[event.headers["streamtype"]]] = event.stream
                self._spdy.accept(event.stream)
            elif isinstance(event, spdy.Data) and event.stream == self._streams.get(STDIN):
                self._early += [event.data] if event.data else []
                self._early += [None] if event.end else []
        await self._flush()
        return bool(data)

    async def input(self) -> AsyncIterator[bytes | None]:
        """Yields the bytes of stdin; None at its end."""
        while True:
            while self._early:
                yield self._early.pop(0)
            if not await self._receive():
                return

    async def send(self, channel: int, data: bytes) -> None:
        self._spdy.send(self._streams[channel], data)
        await self._flush()

    async def finish(self, status: dict) -> None:
        for channel, stream in self._streams.items():
            self._spdy.send(stream, json.dumps(status).encode() if channel == ERROR else b"", end=True)
        await self._flush()

    async def _flush(self) -> None:
        data, self._spdy.output = bytes(self._spdy.output), bytearray()
        if data:
            await self._link.write(data)


async def forwarded(link: Link, dial: Callable[[int], Awaitable[tuple]]) -> None:
    """Serves one port-forward: `dial` opens a connection to a port of the pod for each pair of streams."""
    connection = spdy.Connection()
    writers: dict[int, asyncio.StreamWriter] = {}
    copies: set[asyncio.Task] = set()

    async def flush() -> None:
        data, connection.output = bytes(connection.output), bytearray()
        if data:
            await link.write(data)

    async def copy(stream: int, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(16384):
            connection.send(stream, data)
            await flush()
        connection.send(stream, b"", end=True)
        await flush()

    try:
        while data := await link.read():
            for event in connection.receive(data):
                if isinstance(event, spdy.Opened):
                    connection.accept(event.stream)
                    if event.headers["streamtype"] == "error":
                        connection.send(event.stream, b"", end=True)
                        continue
                    reader, writers[event.stream] = await dial(int(event.headers["port"]))
                    copies.add(asyncio.create_task(copy(event.stream, reader)))
                elif isinstance(event, spdy.Data) and (writer := writers.get(event.stream)):
                    writer.write(event.data)
                    await writer.drain()
                    if event.end:
                        writer.write_eof()
                elif isinstance(event, spdy.Reset) and (writer := writers.pop(event.stream, None)):
                    writer.close()
            await flush()
    finally:
        for task in copies:
            task.cancel()
        for writer in writers.values():
            writer.close()
