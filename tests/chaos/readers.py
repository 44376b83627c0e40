"""Readers of histories over the HTTP API: workers that ask again and again for what came behind what they have."""

import asyncio
import contextlib
import time

import httpx
import names
from oracle import Item, View

POLL_SECONDS = 0.15


class Reader:
    """Reads one channel from its start, page by page; to the oracle it is a client that never goes away."""

    user = None
    connection_id = None

    def __init__(self, world, name, channel):
        self.world, self.channel = world, channel
        self.view = View(f"{name} (HTTP history of {channel})", [channel])
        self._task = None

    @property
    def is_open(self):
        """Whether it reads."""
        return self._task is not None and not self._task.done()

    async def come(self, gateway):
        """Begins to read, at `gateway` first; then at any that is up."""
        self._note("connect", event_id="0", text=gateway.name)
        self._note("resumed")
        self._task = asyncio.create_task(self._read())

    async def leave(self):
        """Ends."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _read(self):
        after = None
        while True:
            up = [gateway for gateway in self.world.gateways if gateway.is_up]
            if up:
                with contextlib.suppress(OSError, httpx.HTTPError):
                    after = await self._page(self.world.random.choice(up), after)
            await asyncio.sleep(POLL_SECONDS)

    async def _page(self, gateway, after):
        query = {"limit": "20"} | ({"after": after} if after else {})
        if names.is_session(self.channel):
            path = f"sessions/{names.session_of(self.channel)}/history"
        else:
            path, query["channel"] = "events/history", self.channel.removeprefix("ws:")
        answer = await gateway.client.get(f"/api/v1/{path}", params=query, timeout=4)
        if answer.status_code != 200:
            self._note("refused", text=f"{answer.status_code} {answer.text[:120]}")
            return after
        page = answer.json()
        if page["history_lost"]:
            self._note("gap", event_id=page["position"], said={"reason": page["history_lost"]})
        for event in page["events"]:
            data = event.get("data", "").encode()
            if label := names.label(data):
                self._note("message", label, event["event_id"], data.decode())
            after = event["event_id"]
        return after if page["events"] else page["position"]

    def _note(self, kind, label="", event_id=None, text="", said=None):
        self.view.add(Item(kind, time.monotonic(), label, event_id, text, said or {}))
