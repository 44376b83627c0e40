"""One Redis connection for all subscriptions of a worker, which comes back after any outage.

redis-py's own ``pubsub.listen()`` raises after a few seconds without Redis, and then no task reads. Here a task
keeps the wanted channels and the subscribed ones the same, for as long as it lives.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

from redis import exceptions
from redis.asyncio.connection import AbstractConnection

from ._backoff import Backoff
from ._feeds import Consumer
from ._server import Source
from .errors import Unauthorized
from .types import UpstreamMessage

_log = logging.getLogger("wsproxy")

# Silence is answered with a PING, and a connection that does not answer it is replaced.
_PING_INTERVAL = 3.0
_DEAD_AFTER = 10.0
_CHANNELS_PER_COMMAND = 500


class Listener:
    """The subscriptions of one worker. :meth:`open` never waits; the task does the rest."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._consumers: dict[str, list[Consumer]] = {}
        # Channels that were requested on the present connection, and those that Redis has confirmed.
        self._sent: set[str] = set()
        self._confirmed: set[str] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._heard = time.monotonic()
        self.life = 0
        """Number of the present connection: what was confirmed in another one may have missed messages."""

    def open(self, channel: str) -> Consumer:
        """A reader of a channel. It is confirmed when Redis said so."""
        consumer = Consumer(lambda closed: self._drop(channel, closed), channel)
        self._consumers.setdefault(channel, []).append(consumer)
        if channel in self._confirmed:
            consumer.confirm(0.0)
        elif self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="wsproxy-listener")
        self._changed.set()
        return consumer

    def is_confirmed(self, channel: str) -> bool:
        """Returns true while Redis holds the subscription of a channel, as far as is known."""
        return channel in self._confirmed

    async def aclose(self) -> None:
        """Ends the task and its connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._source.aclose()

    def _drop(self, channel: str, consumer: Consumer) -> None:
        consumers = self._consumers.get(channel, [])
        if consumer in consumers:
            consumers.remove(consumer)
        if not consumers and self._consumers.pop(channel, None) is not None:
            # Still confirmed, until it is really given up: a reader may come back before that.
            self._changed.set()

    async def _run(self) -> None:
        backoff, warned = Backoff(base=0.1, cap=2.0), 0.0
        while True:
            connection: AbstractConnection | None = None
            try:
                async with asyncio.timeout(_DEAD_AFTER):
                    connection = await self._source.make()
                    # A silent channel is no error: the PING decides, not a timeout from the URL.
                    connection.socket_timeout = None
                    await connection.connect()  # type: ignore[no-untyped-call]
                backoff.reset()
                await self._serve(connection)
            except exceptions.AuthenticationError as error:
                self._fail(Unauthorized(f"Redis refused the worker: {error}"))
                return
            except (exceptions.RedisError, OSError, TimeoutError) as error:
                if time.monotonic() - warned > 30:
                    warned = time.monotonic()
                    _log.warning("The subscriptions lost Redis and try again: %s", error)
            finally:
                self._sent, self._confirmed = set(), set()
                # Closing must not wait for a peer that is gone.
                if connection is not None:
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(backoff.next())

    def _fail(self, error: Exception) -> None:
        for consumers in self._consumers.values():
            for consumer in consumers:
                consumer.fail(error)

    async def _serve(self, connection: AbstractConnection) -> None:
        """Runs until the connection is lost, which writer and reader notice by an exception, or should be left."""
        lost_for = time.monotonic() - self._heard
        self.life += 1
        awaited: Counter[str] = Counter()
        tasks = [
            asyncio.ensure_future(self._write(connection, awaited)),
            asyncio.ensure_future(self._read(connection, awaited, lost_for)),
            asyncio.ensure_future(self._source.leave(connection)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    async def _write(self, connection: AbstractConnection, awaited: Counter[str]) -> None:
        self._heard = time.monotonic()
        while True:
            self._changed.clear()
            wanted = set(self._consumers)
            new, old = sorted(wanted - self._sent), sorted(self._sent - wanted)
            self._sent = wanted
            self._confirmed.difference_update(old)
            for start in range(0, len(new), _CHANNELS_PER_COMMAND):
                batch = new[start : start + _CHANNELS_PER_COMMAND]
                awaited.update(batch)
                await connection.send_command("SUBSCRIBE", *batch)
            for start in range(0, len(old), _CHANNELS_PER_COMMAND):
                await connection.send_command("UNSUBSCRIBE", *old[start : start + _CHANNELS_PER_COMMAND])
            try:
                async with asyncio.timeout(_PING_INTERVAL):
                    await self._changed.wait()
            except TimeoutError:
                if time.monotonic() - self._heard > _DEAD_AFTER:
                    raise
                await connection.send_command("PING")

    async def _read(self, connection: AbstractConnection, awaited: Counter[str], lost_for: float) -> None:
        while True:
            response = await connection.read_response(disable_decoding=True)
            self._heard = time.monotonic()
            if not isinstance(response, list):
                continue
            if response[0] == b"message":
                for consumer in self._consumers.get(response[1].decode(), ()):
                    consumer.push(UpstreamMessage(response[2]))
            elif response[0] == b"subscribe":
                channel = response[1].decode()
                awaited[channel] -= 1
                # A channel that was given up and taken again is confirmed only by the last of its confirmations.
                if awaited[channel] <= 0 and channel in self._sent:
                    del awaited[channel]
                    self._confirmed.add(channel)
                    for consumer in self._consumers.get(channel, ()):
                        consumer.confirm(lost_for)
