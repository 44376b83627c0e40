"""Clients of the Python package, which come back by themselves: what their loop gets has to be exact all the same."""

import asyncio
import contextlib
import time

import names
from oracle import Item, View
from redis.exceptions import RedisError
from wsproxy import WsproxyError
from wsproxy.client import connect_session


class PackageClient:
    """A client of a session of its own, through an address behind which all instances are."""

    user = None
    connection_id = None

    def __init__(self, world, name, session, transport):
        self.world, self.session, self.transport = world, session, transport
        self.view = View(f"{name} (Python package over {transport}, {session})", [names.session(session)])
        self._task = None
        self._last_id = None

    @property
    def is_open(self):
        """Whether it reads; how its connection is it keeps to itself."""
        return self._task is not None and not self._task.done()

    async def come(self, gateway=None):
        """Begins to read, or goes on behind what it had read."""
        self._note("connect", event_id=self._last_id or "", text="any instance")
        if self._last_id:
            # The package says only what was missed.
            self._note("resumed")
        self._task = asyncio.create_task(self._read())

    async def leave(self):
        """Ends."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _token(self):
        token = names.token(self.transport == "sse")
        try:
            await self.world.workers.set(names.token_key(self.session), token, px=60_000)
        except RedisError as error:
            raise OSError("the application has no token now") from error
        return token

    async def _read(self):
        url = f"http://127.0.0.1:{self.world.front.port}"
        client = connect_session(
            url, "demo", self.session, token=self._token, transport=self.transport, last_event_id=self._last_id
        )
        with contextlib.suppress(WsproxyError):
            async with client:
                async for message in client:
                    self._take(message)
                    self._last_id = client.last_event_id

    def _take(self, message):
        raw = message.data if isinstance(message.data, bytes) else message.data.encode()
        if label := names.label(raw):
            self._note("message", label, message.event_id, raw.decode(), message.object)
        elif message.is_history_lost:
            said = message.object
            self._note("lost", event_id=said.get("event_id"), said=said, text=raw.decode())
        elif message.type == "stream_snapshot":
            self._note("snapshot", said=message.object)

    def _note(self, kind, label="", event_id=None, text="", said=None):
        self.view.add(Item(kind, time.monotonic(), label, event_id, text, said or {}))
