"""Readers of channels: a bounded queue for each, and the public iterator on top. They know no transport."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Generic, Protocol, TypeAlias, TypeVar

from .types import Gap, GapCallback, UpstreamMessage

T = TypeVar("T")
_log = logging.getLogger("wsproxy")

# A reader that falls further behind loses the oldest messages and is told so; no other reader waits for it.
_ENTRIES_MAX = 10_000
_BYTES_MAX = 16 * 1024 * 1024
# Losses of readers without `on_gap` are logged this often, in seconds.
_WARN_EVERY = 30.0
# A log is read this often, in seconds, if its channel says nothing.
_LOOK_AFTER = 15.0


class Subscribed:
    """A mark in a queue: from here on the subscription is confirmed (anew)."""


SUBSCRIBED = Subscribed()
Item: TypeAlias = UpstreamMessage | Gap | Subscribed


ReadLog: TypeAlias = Callable[[], Awaitable["list[UpstreamMessage | Gap] | None"]]
"""Reads on in a log; ``None`` where there is no log."""


class Consumer:
    """The queue of one reader: at most ``entries_max`` items and ``bytes_max`` bytes, or one message.

    Beyond that the oldest are dropped, only as many as must be, and a gap is in their place.
    """

    def __init__(
        self,
        drop: Callable[[Consumer], None],
        name: str,
        *,
        entries_max: int = _ENTRIES_MAX,
        bytes_max: int = _BYTES_MAX,
    ) -> None:
        """``name`` names the channel in the log."""
        self._drop = drop
        self._name = name
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._items: deque[Item] = deque()
        self._bytes = 0
        # Messages that were dropped.
        self._dropped = 0
        # The reader was told of a loss and has got no message since then.
        self._is_told = False
        self._warned: float | None = None
        self.warns = False
        """True where a loss is logged at once, since the reader has no ``on_gap``."""
        self._arrived = asyncio.Event()
        self._confirmed = asyncio.Event()
        self._taken = asyncio.Event()
        self._error: Exception | None = None
        self.was_confirmed = False

    def push(self, item: Item) -> None:
        """Adds an item; never waits."""
        self._items.append(item)
        self._bytes += _size(item)
        if len(self._items) > self._entries_max or self._bytes > self._bytes_max:
            self._make_room()
        self._arrived.set()

    def _make_room(self) -> None:
        gap: Gap | None = None
        is_subscribed, dropped = False, 0
        # Two places are for items that are put back in front.
        while len(self._items) > 1 and (len(self._items) + 2 > self._entries_max or self._bytes > self._bytes_max):
            item = self._items.popleft()
            self._bytes -= _size(item)
            dropped += isinstance(item, UpstreamMessage)
            gap = item if isinstance(item, Gap) else gap
            # A confirmed subscription is no message, but a reason to look at kept messages.
            is_subscribed |= isinstance(item, Subscribed)
        if is_subscribed:
            self._items.appendleft(SUBSCRIBED)
        if dropped:
            gap = Gap(0.0, "overflow")
        if gap is not None and not (self._is_told and gap.reason == "overflow"):
            self._items.appendleft(gap)
        self._dropped += dropped
        if self.warns and dropped:
            self.warn(f"the reader is too slow, the oldest messages are dropped ({self._dropped} so far)")

    def warn(self, what: str) -> None:
        """Logs that messages were lost, now and then."""
        now = time.monotonic()
        if self._warned is None or now - self._warned > _WARN_EVERY:
            self._warned = now
            _log.warning("%s: %s.", self._name, what)

    def confirm(self, gap_seconds: float | None) -> None:
        """The subscription stands, after an interruption of so many seconds if it stood before.

        ``None``: nothing was missed in it.
        """
        if self.was_confirmed and gap_seconds is not None:
            self.push(Gap(gap_seconds, "connection"))
        self.was_confirmed = True
        self.push(SUBSCRIBED)
        self._confirmed.set()

    def fail(self, error: Exception) -> None:
        """Ends the reader with an error that waiting does not mend."""
        self._error = error
        self._arrived.set()
        self._confirmed.set()

    async def confirmed(self) -> None:
        """Waits until the subscription stands for the first time."""
        await self._confirmed.wait()
        if self._error is not None and not self._items:
            raise self._error

    async def next(self) -> Item:
        """The next item, in the order of arrival."""
        while not self._items:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        self._taken.set()
        item = self._items.popleft()
        self._bytes -= _size(item)
        if isinstance(item, UpstreamMessage):
            self._is_told = False
        elif isinstance(item, Gap):
            self._is_told = item.reason == "overflow"
        return item

    async def room(self) -> None:
        """Waits while the queue is so full that more messages might be lost."""
        while len(self._items) >= self._entries_max // 2 or self._bytes >= self._bytes_max // 2:
            self._taken.clear()
            await self._taken.wait()

    @property
    def waiting(self) -> int:
        """Number of messages that wait."""
        return sum(isinstance(item, UpstreamMessage) for item in self._items)

    def drain(self) -> list[Item]:
        """Takes all waiting items."""
        items = list(self._items)
        self._items.clear()
        self._bytes, self._is_told = 0, False
        return items

    def close(self) -> None:
        """Gives the subscription up; may be called more than once, and from anywhere in the loop's thread."""
        self._drop(self)


def _size(item: Item) -> int:
    return len(item.data) if isinstance(item, UpstreamMessage) else 0


class Finished(Exception):
    """The end of a queue, behind all that waits."""


class Kept(Protocol):
    """Messages that were kept while no worker listened. An entry is done when the next one is asked for."""

    look_after: float | None

    def look(self) -> None: ...
    async def next(self) -> UpstreamMessage | None: ...
    async def settle(self) -> None: ...
    async def aclose(self, *, done: bool) -> None: ...
    def abandon(self) -> None: ...


class Subscription(Generic[T]):
    """An asynchronous iterator that survives every outage: it waits, resubscribes and goes on.

    Where messages may be missing, ``on_gap`` is called, in sequence with them. ``async with`` waits until the
    subscription is confirmed and gives it up at the end; a plain ``async for`` subscribes at its first step and
    gives up when the iterator is let go::

        async with worker.upstream(session) as messages:
            async for message in messages:
                ...
    """

    def __init__(
        self,
        open_consumer: Callable[[], Consumer],
        parse: Callable[[UpstreamMessage], T | None],
        on_gap: GapCallback | None,
        kept: Kept | None = None,
        log: ReadLog | None = None,
    ) -> None:
        self._open = open_consumer
        self._parse = parse
        self._on_gap = on_gap
        # Messages that were kept while no worker listened: read whenever the subscription is confirmed.
        self._kept = kept
        self._ahead: deque[Item] = deque()
        # Entries to deliver instead of the channel's messages, which then only say when to look, if there is a log.
        self._log = log
        self._look = log is not None
        self._consumer: Consumer | None = None
        self._closed = False

    async def __aenter__(self) -> Subscription[T]:
        try:
            await self.confirmed()
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._kept is not None:
            # After an exception it is unknown how far the loop came with its message.
            await self._kept.aclose(done=error is None)

    def __aiter__(self) -> Subscription[T]:
        return self

    async def __anext__(self) -> T:
        consumer = self._opened()
        while True:
            item = self._ahead.popleft() if self._ahead else await self._next(consumer)
            if isinstance(item, UpstreamMessage):
                parsed = self._parse(item)
                if parsed is not None:
                    return parsed
            elif isinstance(item, Gap):
                await self._tell(consumer, item)

    async def _tell(self, consumer: Consumer, gap: Gap) -> None:
        if self._on_gap is not None:
            answer = self._on_gap(gap)
            if inspect.isawaitable(answer):
                await answer
        elif gap.reason in ("overflow", "history_lost"):
            consumer.warn(f"messages are missing ({gap.reason})")

    async def _next(self, consumer: Consumer) -> Item:
        try:
            if self._log is not None:
                return await self._next_of_log(consumer, self._log)
            return await (consumer.next() if self._kept is None else self._next_or_kept(consumer, self._kept))
        except Finished:
            raise StopAsyncIteration from None

    async def _next_or_kept(self, consumer: Consumer, kept: Kept) -> Item:
        while True:
            if (message := await kept.next()) is not None:
                return message
            try:
                async with asyncio.timeout(kept.look_after):
                    item = await consumer.next()
            except TimeoutError:
                kept.look()
                continue
            if not isinstance(item, Subscribed):
                return item
            kept.look()

    async def _next_of_log(self, consumer: Consumer, log: ReadLog) -> Item:
        await consumer.confirmed()
        heard: list[Item] = []
        while True:
            if self._look:
                found = await log()
                # Without a log there are only the channel's own messages.
                self._ahead.extend(heard if found is None else found)
                self._look = bool(found)
                if self._ahead:
                    return self._ahead.popleft()
            # The next look at the log finds all messages of the channel so far.
            try:
                # `asyncio.wait_for` of Python 3.11 drops a cancellation that comes together with the result.
                async with asyncio.timeout(_LOOK_AFTER):
                    heard = [await consumer.next()]
                heard += consumer.drain()
            except TimeoutError:
                heard = []
            self._look = True

    async def aclose(self) -> None:
        """Gives the subscription up. What the loop got last counts as not done, if it was kept."""
        self._close()
        if self._kept is not None:
            await self._kept.aclose(done=False)

    @property
    def waiting(self) -> int:
        """Number of messages that the loop has not got yet, without those that are kept."""
        return self._consumer.waiting if self._consumer is not None else 0

    async def confirmed(self) -> None:
        """Waits until the subscription stands for the first time."""
        try:
            await self._opened().confirmed()
        except Finished:
            raise StopAsyncIteration from None

    async def settle(self) -> None:
        """Counts what the loop got last as done, without asking for the next one."""
        if self._kept is not None:
            await self._kept.settle()

    def finish(self) -> None:
        """Gives the subscription up; the iteration ends behind what has come until now."""
        if self._closed:
            return
        consumer = self._opened()
        consumer.close()
        consumer.fail(Finished())

    def _opened(self) -> Consumer:
        if self._closed:
            raise StopAsyncIteration
        if self._consumer is None:
            self._consumer = self._open()
            # Messages that are dropped here are found in the log, where there is one.
            self._consumer.warns = self._on_gap is None and self._log is None
        return self._consumer

    def _close(self) -> None:
        self._closed = True
        if self._consumer is not None:
            self._consumer.close()
            # A task that waits for the next message must not wait for ever.
            self._consumer.fail(Finished())

    def __del__(self) -> None:
        # A loop that was left by `break` must not hold its channel for ever.
        consumer, kept = getattr(self, "_consumer", None), getattr(self, "_kept", None)
        if consumer is not None and not self._closed:
            consumer.close()
            if kept is not None:
                kept.abandon()
