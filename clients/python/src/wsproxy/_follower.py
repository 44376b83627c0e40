"""One stream of server-sent events of the worker API, followed for ever by any number of readers."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable

import httpx

from ._backoff import Backoff
from ._feeds import Consumer
from ._sse import Parser, ServerSentEvent
from .errors import Unavailable, WsproxyError
from .types import Gap, UpstreamMessage

_log = logging.getLogger("wsproxy")

# The gateway sends a comment every 15 s of silence.
_SILENCE_MAX = 40.0


class Follower:
    """Follows ``path`` while it has readers, and comes back after every loss."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        path: str,
        error_of: Callable[[httpx.Response], WsproxyError],
        forget: Callable[[], object] = lambda: None,
        *,
        resumes: bool = False,
        paced: bool = False,
    ) -> None:
        """A stream that is not followed yet.

        ``resumes``: where its messages have ids it can go on behind the last one, so an interruption loses none.
        ``paced``: it has one reader, and is read no faster than that one takes messages. It begins at a position of
        its own, so it loses nothing even before the first message.
        """
        self._client = client
        self._path = path
        self._error_of = error_of
        self._forget = forget
        self._consumers: list[Consumer] = []
        self._task: asyncio.Task[None] | None = None
        self._standing = False
        self._heard = time.monotonic()
        # Ids of kept entries. A stream that can go on behind the last one does; others send them again.
        self._last_kept = (0, 0)
        self._resumes = resumes
        self._paced = paced
        self.over = False

    def open(self) -> Consumer:
        """A reader; the first one starts the stream."""
        consumer = Consumer(self._drop, self._path)
        self._consumers.append(consumer)
        if self._standing:
            consumer.confirm(0.0)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name=f"wsproxy-follow {self._path}")
        return consumer

    async def aclose(self) -> None:
        """Ends the stream."""
        self._end()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def _drop(self, consumer: Consumer) -> None:
        if consumer in self._consumers:
            self._consumers.remove(consumer)
        if not self._consumers:
            self._end()

    def _end(self) -> None:
        if self.over:
            # A second cancellation would keep the task from closing its connection.
            return
        self.over = True
        self._forget()
        # A reader may be let go of by the garbage collector when the loop is gone.
        if self._task is not None and not self._task.get_loop().is_closed():
            self._task.cancel()

    async def _run(self) -> None:
        backoff, warned = Backoff(base=0.1, cap=5.0), 0.0
        while True:
            pause = 0.0
            try:
                await self._follow(backoff)
            except Unavailable as error:
                pause = error.retry_after or 0.0
                if time.monotonic() - warned > 30:
                    warned = time.monotonic()
                    _log.warning("%s cannot be followed and is tried again: %s", self._path, error)
            except WsproxyError as error:
                self.over = True
                self._forget()
                for consumer in self._consumers:
                    consumer.fail(error)
                return
            except (httpx.HTTPError, ValueError) as error:
                _log.debug("%s was lost and is followed anew: %r", self._path, error)
            finally:
                self._standing = False
            await asyncio.sleep(backoff.next(pause))

    async def _follow(self, backoff: Backoff) -> None:
        timeout = httpx.Timeout(10.0, read=_SILENCE_MAX)
        headers = {"accept": "text/event-stream"}
        if self._resumes and self._last_kept > (0, 0):
            headers["last-event-id"] = "{}-{}".format(*self._last_kept)
        async with self._client.stream("GET", self._path, headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                await response.aread()
                raise self._error_of(response)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise Unavailable("The answer is no event stream, so it is not the gateway's.")
            backoff.reset()
            lost_for, self._standing = time.monotonic() - self._heard, True
            for consumer in self._consumers:
                consumer.confirm(None if self._loses_nothing() else lost_for)
            parser = Parser()
            async for chunk in response.aiter_bytes():
                self._heard = time.monotonic()
                for event in parser.feed(chunk):
                    self._deliver(event)
                if self._paced:
                    for consumer in self._consumers:
                        await consumer.room()

    def _deliver(self, event: ServerSentEvent) -> None:
        if event.data is None:
            return
        if event.event == "message":
            if not event.own_id:
                self._push(UpstreamMessage(event.data.encode()))
            elif (position := entry(event.last_event_id)) is not None and position > self._last_kept:
                self._last_kept = position
                self._push(UpstreamMessage(event.data.encode(), event.last_event_id))
        elif event.event == "bus_recovered":
            self._push(Gap(float(json.loads(event.data).get("gap_ms", 0)) / 1000, "bus"))
        elif event.event == "overflow":
            if not self._loses_nothing():
                self._push(Gap(0.0, "overflow"))
        elif event.event == "history_lost":
            self._last_kept = (0, 0)
            self._push(Gap(0.0, "history_lost"))

    def _loses_nothing(self) -> bool:
        return self._paced or (self._resumes and self._last_kept > (0, 0))

    def _push(self, item: UpstreamMessage | Gap) -> None:
        for consumer in self._consumers:
            consumer.push(item)


def entry(text: str | None) -> tuple[int, int] | None:
    """Returns the id of a log's entry, which orders entries; ``None`` for other texts."""
    milliseconds, _, sequence = (text or "").partition("-")
    if not (milliseconds.isdigit() and sequence.isdigit()):
        return None
    return int(milliseconds), int(sequence)
