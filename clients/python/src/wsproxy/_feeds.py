"""Readers of channels: a bounded queue for each, and the public iterator on top. They know no transport."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Generic, Protocol, TypeAlias, TypeVar

from .types import Gap, GapCallback, UpstreamMessage

T = TypeVar("T")

# A reader that falls further behind loses the oldest and is told so; nobody else waits for it.
_ENTRIES_MAX = 10_000
# A log is read this often, in seconds, if its channel says nothing.
_LOOK_AFTER = 15.0


class Subscribed:
    """In a queue: from here on the subscription is confirmed (anew)."""


SUBSCRIBED = Subscribed()
Item: TypeAlias = UpstreamMessage | Gap | Subscribed


ReadLog: TypeAlias = Callable[[], Awaitable["list[UpstreamMessage | Gap] | None"]]
"""Reads on in a log; ``None`` where nobody keeps one."""


class Consumer:
    """What waits for one reader: at most ``entries_max`` items, beyond which the oldest make room for a gap."""

    def __init__(self, drop: Callable[[Consumer], None], entries_max: int = _ENTRIES_MAX) -> None:
        self._drop = drop
        self._entries_max = entries_max
        self._items: deque[Item] = deque()
        self._arrived = asyncio.Event()
        self._confirmed = asyncio.Event()
        self._taken = asyncio.Event()
        self._error: Exception | None = None
        self.was_confirmed = False

    def push(self, item: Item) -> None:
        """Adds an item; never waits."""
        if len(self._items) >= self._entries_max:
            self._items.clear()
            self._items.append(Gap(0.0, "overflow"))
        self._items.append(item)
        self._arrived.set()

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
        return self._items.popleft()

    async def room(self) -> None:
        """Waits while so much is in the queue that more might be lost."""
        while len(self._items) >= self._entries_max // 2:
            self._taken.clear()
            await self._taken.wait()

    @property
    def waiting(self) -> int:
        """How many messages wait."""
        return sum(isinstance(item, UpstreamMessage) for item in self._items)

    def drain(self) -> list[Item]:
        """Takes all that waits."""
        items = list(self._items)
        self._items.clear()
        return items

    def close(self) -> None:
        """Gives the subscription up; may be called more than once, and from anywhere in the loop's thread."""
        self._drop(self)


class Finished(Exception):
    """No more comes: how a reader ends behind all that waits."""


class Kept(Protocol):
    """What was kept while nobody listened. An entry that was handed out is done when the next one is asked for."""

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
        # What was kept while nobody listened: looked at whenever the subscription is confirmed.
        self._kept = kept
        self._ahead: deque[Item] = deque()
        # Entries to deliver instead of the channel's messages, which then only say when to look, if there is a log.
        self._log = log
        self._look = log is not None
        self._consumer: Consumer | None = None
        self._closed = False

    async def __aenter__(self) -> Subscription[T]:
        try:
            await self._opened().confirmed()
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._kept is not None:
            # After an exception nobody knows how far the loop came with what it got.
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
            elif isinstance(item, Gap) and self._on_gap is not None:
                answer = self._on_gap(item)
                if inspect.isawaitable(answer):
                    await answer

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
                # Without a log the channel's own messages are all that there is.
                self._ahead.extend(heard if found is None else found)
                self._look = bool(found)
                if self._ahead:
                    return self._ahead.popleft()
            # The look that follows finds all that the channel has said so far.
            try:
                heard = [await asyncio.wait_for(consumer.next(), _LOOK_AFTER), *consumer.drain()]
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
        """How many messages the loop has not got yet, but for those that are kept."""
        return self._consumer.waiting if self._consumer is not None else 0

    async def confirmed(self) -> None:
        """Waits until the subscription stands for the first time."""
        await self._opened().confirmed()

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
        return self._consumer

    def _close(self) -> None:
        self._closed = True
        if self._consumer is not None:
            self._consumer.close()

    def __del__(self) -> None:
        # A loop that was left by `break` must not hold its channel for ever.
        consumer, kept = getattr(self, "_consumer", None), getattr(self, "_kept", None)
        if consumer is not None and not self._closed:
            consumer.close()
            if kept is not None:
                kept.abandon()
