"""Clients of sessions and of events, over WebSocket and server-sent events, that note everything they get."""

import asyncio
import contextlib
import json
import time
from urllib.parse import quote

import httpx
import websockets
from redis.exceptions import RedisError
from websockets.asyncio.client import connect

import names
from oracle import Item, View

# A handshake that a frozen instance never answers.
OPEN_SECONDS = 4.0


class Refused(Exception):
    """A handshake was refused, or got no answer."""


class Client:
    """One person in front of one device: comes, reads, goes, and comes back behind what it has read.

    `form` is `ws` (ids inside of JSON), `id` (the subprotocol with an id before every message) or `sse`.
    """

    def __init__(self, world, name, channels, form, *, user=None):
        self.world, self.form, self.user = world, form, user
        self.session = None if user else names.session_of(channels[0])
        self.view = View(f"{name} ({form}, {user or self.session})", channels)
        self.connection_id = None
        self._reader = None
        self._close = None
        self._changed = asyncio.Event()

    @property
    def is_open(self):
        """Whether it is connected, as far as it knows."""
        return self._reader is not None and not self._reader.done()

    # ---- coming and going ----

    async def come(self, gateway, asked=None, *, in_frame=False):
        """Connects; by default behind the last id that it has seen, or to what is live."""
        if asked is None:
            asked = self.view.last_id or ""
        async with contextlib.AsyncExitStack() as stack:
            if self.session:
                await stack.enter_async_context(self.world.session_lock(self.session))
            # Noted before the handshake: messages may come before it has returned.
            self._note("connect", text=gateway.name, event_id=asked)
            self.connection_id = None
            try:
                credential = await self._credential()
                if self.form == "sse":
                    await self._open_stream(gateway, credential, asked)
                else:
                    await self._open_socket(gateway, credential, asked, in_frame)
            except (OSError, RedisError, httpx.HTTPError, websockets.WebSocketException, TimeoutError) as error:
                # Nothing has begun: the client stands where it stood.
                self._note("refused", text=f"{type(error).__name__} {str(error)[:80]}")
                raise Refused(str(error)) from error

    async def _credential(self):
        if self.user:
            return self.world.jwt(self.user)
        token = names.token(self.form == "sse")
        await self.world.workers.set(names.token_key(self.session), token, px=60_000)
        return token

    def _path(self, asked, in_frame):
        path = "/ws" if self.user else f"/demo/ws/{self.session}"
        if in_frame:
            return f"{path}?resume=frame"
        return f"{path}?last_event_id={quote(asked, safe='')}"

    async def _open_socket(self, gateway, credential, asked, in_frame):
        protocols = ["wsproxy.id.v1"] if self.form == "id" else ["wsproxy.v1"]
        socket = await connect(
            gateway.ws + self._path(asked, in_frame),
            additional_headers={"Authorization": f"Bearer {credential}"},
            subprotocols=protocols,
            open_timeout=OPEN_SECONDS,
            ping_interval=None,
            max_size=None,
            compression=None,
            proxy=None,
        )
        self._close = socket
        if in_frame:
            await socket.send(json.dumps({"type": "resume", "last_event_id": asked}))
        self._reader = asyncio.create_task(self._read_socket(socket))

    async def _open_stream(self, gateway, credential, asked):
        client = httpx.AsyncClient(timeout=httpx.Timeout(OPEN_SECONDS, read=None), trust_env=False)
        path, headers = self._path("", False), {"Accept": "text/event-stream", "Authorization": f"Bearer {credential}"}
        if asked:
            headers["Last-Event-ID"] = asked
        request = client.build_request("GET", gateway.http + path, headers=headers)
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                response = await client.send(request, stream=True)
            if response.status_code != 200:
                raise httpx.HTTPError(f"{response.status_code} {(await response.aread())[:80]!r}")
        except BaseException:
            await client.aclose()
            raise
        self._close = client
        self._reader = asyncio.create_task(self._read_stream(client, response))

    async def leave(self, politely=False):
        """Goes away; without a word unless `politely`."""
        if self._reader is None:
            return
        if self.form == "sse":
            self._reader.cancel()
        elif politely:
            with contextlib.suppress(TimeoutError, OSError):
                async with asyncio.timeout(2):
                    await self._close.close()
        else:
            self._close.transport.abort()
        await asyncio.wait([self._reader], timeout=5)
        self._reader.cancel()

    async def until(self, label, seconds=10.0):
        """Waits until a message has come; `False` where it does not come in time, or the connection has ended."""
        end = time.monotonic() + seconds
        while label not in self.view.labels:
            if time.monotonic() > end or not self.is_open:
                return False
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await self._changed.wait()
        return True

    # ---- reading ----

    async def _read_socket(self, socket):
        try:
            async for message in socket:
                raw = message.encode() if isinstance(message, str) else message
                event_id = None
                if self.form == "id":
                    head, _, raw = raw.partition(b"\n")
                    event_id = head.decode() or None
                self._message(raw, event_id)
                if raw.startswith(b'{"type":"ping"'):
                    await socket.send('{"type":"pong"}')
        except (OSError, websockets.WebSocketException):
            pass
        finally:
            self._note("end_of_connection", text=str(socket.close_code))
            socket.transport.abort()

    async def _read_stream(self, client, response):
        code = ""
        try:
            event_id, data, kind = None, [], "message"
            async for line in response.aiter_lines():
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if name == "id":
                    event_id = value
                elif name == "data":
                    data.append(value)
                elif name == "event":
                    kind = value
                elif not line and (data or event_id):
                    if kind == "close":
                        code = "\n".join(data)
                    elif kind == "position":
                        # Where the stream is before anything has happened.
                        self._note("opened", event_id=event_id)
                    else:
                        self._message("\n".join(data).encode(), event_id)
                    event_id, data, kind = None, [], "message"
        except (OSError, httpx.HTTPError):
            pass
        finally:
            self._note("end_of_connection", text=code)
            await client.aclose()

    def _message(self, raw, event_id):
        said = {}
        if raw.startswith(b"{"):
            with contextlib.suppress(ValueError):
                said = json.loads(raw)
        if label := names.label(raw):
            own = said.get("event_id") if self.form == "ws" else None
            self._note("message", label, event_id or (own if isinstance(own, str) else None), raw, said)
            return
        told = event_id or said.get("event_id")
        match said.get("type"):
            case "error" if said.get("code") == "history_lost":
                self._note("lost", event_id=said.get("event_id"), raw=raw, said=said)
            case "connected":
                self.connection_id = said["connection_id"]
                self._note("connected", event_id=told, raw=self.connection_id.encode())
            case "opened":
                self._note("opened", event_id=told, raw=raw)
            case "resumed":
                self._note("resumed", raw=str(said.get("count")).encode(), said=said)
            case "bus_recovered":
                self._note("recovered", raw=raw)
            case "stream_snapshot":
                self._note("snapshot", raw=raw, said=said)
            case _:
                self._note("other", raw=raw)

    def _note(self, kind, label="", event_id=None, raw=b"", said=None, text=None):
        shown = text if text is not None else raw.decode(errors="replace")
        item = Item(kind, time.monotonic(), label, event_id, shown, said or {})
        # The requested id is none that the client has seen.
        last = self.view.last_id
        self.view.add(item)
        if kind in ("connect", "refused"):
            self.view.last_id = last
        self._changed.set()
